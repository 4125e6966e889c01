// What is asked of the OpenMP that another library has loaded: how many threads there are to be,
// and its own threads while they are awake anyway.
#pragma once

#include <cstddef>

namespace fastema {

// A library that has just computed with OpenMP, as torch does, leaves its threads spinning for
// milliseconds, each on a processor of its own, and whoever wakes other threads there loses. So the
// work may go to those that spin. Threads that sleep are left alone: the call would wait for them,
// for up to 8 ms. Each calling thread has a team of its own; all of this is about the caller's.

// Whether that team spins at this moment, as far as it is known.
bool openmp_spins() noexcept;

// Whether a call would be well spent on getting to know that team.
bool openmp_is_worth_a_look() noexcept;

// Calls work(context, thread) on all threads of that team, and gets to know it.
void run_by_openmp(void (*work)(const void*, std::size_t) noexcept, const void* context) noexcept;

}  // namespace fastema
