// What is asked of the operating system, and by no other file. Where a system cannot do a thing,
// the answer is the harmless one.
#pragma once

#include <cstddef>
#include <span>
#include <thread>

#if defined(__unix__) || defined(__APPLE__)
#include <csignal>
#endif

namespace fastema {

// --- threads -------------------------------------------------------------------------------------

using ThreadHandle = std::thread::native_handle_type;

// How many processors the caller may use.
std::size_t processors() noexcept;

// The processor that the caller is on, < 0: not told.
int current_processor() noexcept;

// Threads may use the caller's processors but this one, if there are others. Returns whether they
// were told.
bool keep_off(int processor, std::span<const ThreadHandle> threads) noexcept;

// A thread that has work for half a millisecond must not wait for one that only spins, as other
// libraries' threads do between their own jobs. Linux, since 6.12, lets those go first who ask for
// less at a time.
void take_short_slices() noexcept;

// Threads that are made while it lives get no signals: these are for the threads of the program.
class SignalsBlocked {
 public:
  SignalsBlocked() noexcept;
  ~SignalsBlocked();
  SignalsBlocked(const SignalsBlocked&) = delete;
  SignalsBlocked& operator=(const SignalsBlocked&) = delete;

#if defined(__unix__) || defined(__APPLE__)
 private:
  sigset_t before_;
#endif
};

// Has a function called in each child that is forked from now on.
bool call_in_children(void (*function)()) noexcept;

// Of threads that are others' a number is known. 0: not told.
using ThreadNumber = int;
ThreadNumber this_thread() noexcept;
bool is_main_thread() noexcept;  // false, where that is not told
unsigned long threads_of_process() noexcept;

// Whether a thread is on a processor at this moment; false, where that is not told.
bool runs(ThreadNumber thread) noexcept;

// --- libraries that are loaded -------------------------------------------------------------------

// Changes when a library is loaded; always 0 where that is not told.
unsigned long long count_of_loads() noexcept;

// A library that is loaded already, and from then on stays; null: there is none.
void* loaded_library(const char* name) noexcept;
// The first whose file's name begins with one of these.
void* loaded_library_like(std::span<const char* const> prefixes) noexcept;

// A function of a library or one that it was linked with; of null: of those that all can see.
void* function_in(void* library, const char* name) noexcept;

// The path of the library that a function is in, or "".
const char* library_of(void* function) noexcept;

}  // namespace fastema
