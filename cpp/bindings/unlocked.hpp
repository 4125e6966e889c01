// Time without the interpreter's lock.
#pragma once

#include <Python.h>

namespace bindings {

// Takes the lock again. While Python is finalizing, up to 3.13, a daemon thread that does so gets
// pthread_exit(), which on glibc unwinds the stack: through destructors that may not throw, and
// others that touch objects without the lock. It waits for the end of the process instead, as in
// Python 3.14.
void take_lock(PyThreadState* state);

// Gives the lock back and takes it again at the end.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() { take_lock(state_); }

 private:
  PyThreadState* const state_;
};

}  // namespace bindings
