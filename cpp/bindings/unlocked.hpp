// Time without the interpreter's lock.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>
#include <thread>

namespace bindings {

// Gives the lock back and takes it again at the end. While Python is finalizing, up to 3.13, a
// daemon thread that takes the lock gets pthread_exit(), which unwinds: through destructors that
// may not throw, and others that touch objects without the lock. It waits for the end of the
// process instead, as in Python 3.14.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  Unlocked(const Unlocked&) = delete;
  Unlocked& operator=(const Unlocked&) = delete;
  ~Unlocked() {
    try {
      PyEval_RestoreThread(state_);
    } catch (...) {  // nothing else comes out of it
      for (;;) std::this_thread::sleep_for(std::chrono::hours(1));
    }
  }

 private:
  PyThreadState* const state_;
};

}  // namespace bindings
