// Compiled without exceptions: with them pthread_cleanup_push() is an object, whose destructor is
// left to the C++ library, and one that is linked in (zig's) cannot unwind what glibc began.
#include "unlocked.hpp"

#include <pthread.h>
#include <unistd.h>

namespace bindings {
namespace {

void wait_for_the_end(void*) {
  for (;;) pause();
}

}  // namespace

void take_lock(PyThreadState* state) {
  pthread_cleanup_push(wait_for_the_end, nullptr);
  PyEval_RestoreThread(state);
  pthread_cleanup_pop(0);
}

}  // namespace bindings
