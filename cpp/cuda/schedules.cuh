// The decays of an update: given by the host, or computed on the device from a step it counts
// itself.
#pragma once

#include "numbers.cuh"

namespace fastema {

constexpr int kLists = 8;  // the most lists of averages that one pass over the values serves

// What changes from step to step, where it is computed on the device by advance().
struct State {
  uint64_t step;
  double decay[kLists];
};

// The decays of an update. A negative one leaves its averages as they are.
struct Decays {
  const State* device;  // not null: decays and step come from there
  double value[kLists];
};

// A decay for each step. k = step - start_step.
struct Schedule {
  uint32_t kind;   // 0 constant: decay; 1 dynamic: min(decay, (1 + k) / (scale + k));
                   // 2 warmup: 1 - (1 + (k - 1) / scale)^-power between least and decay, but
                   // 0 while k <= 1; 3 power: (1 - 1 / step)^power; 4 equal weights: k / (k + 1);
                   // 5 ramp: decay (1 - exp(-step / scale)); from least to decay in scale steps,
                   // 6 cosine, 7 linear; 8 growing: 0.5^(1 / min(power, scale step))
  uint32_t every;  // averages after every so many steps, with decay^every; 1 or more
  int64_t start_step;  // before it, the decay is 0: a copy
  double decay;
  double scale;
  double power;
  double least;
};

struct Schedules {
  Schedule of[kLists];
};

namespace {

// By multiplications alone, as fastema.schedules.compound.
inline Double compound(Double decay, uint32_t updates) {
  uint32_t bit = 1;
  while (bit <= updates / 2) bit *= 2;
  Double result = decay;
  while (bit > 1) {
    bit /= 2;
    result = result * result;
    if ((updates & bit) != 0) result = result * decay;
  }
  return result;
}

// (cos(pi x) + 1) / 2 for x from 0 to 1, by the series of the sine about the middle. The library's
// cos would have a stack for large numbers, and fuse.
inline Double half_cosine(double x) {
  if (x >= 1) return 0.0;
  const Double turn = Double{3.14159265358979323846} * (x - 0.5), square = turn * turn;
  Double series = 1.0;
  for (int n = 20; n > 0; n -= 2) series = Double{1.0} - series * square * (1.0 / (n * (n + 1)));
  return Double{0.5} - Double{0.5} * (turn * series);
}

inline double decay_at(const Schedule& schedule, uint64_t step) {
  const int64_t k = static_cast<int64_t>(step) - schedule.start_step;
  if (k < 0) return 0;
  double limit = schedule.decay;
  const double after = static_cast<double>(k);
  if (schedule.kind == 1) {
    const double rising = (1 + after) / (schedule.scale + after);
    return rising < limit ? rising : limit;
  }
  if (schedule.kind == 2) {
    if (k <= 1) return 0;
    const double falling = pow(1 + (after - 1) / schedule.scale, -schedule.power);
    const double rising = 1 - falling, limited = rising < limit ? rising : limit;
    return limited > schedule.least ? limited : schedule.least;
  }
  if (schedule.kind == 3) {
    return pow(1 - 1 / static_cast<double>(step), schedule.power);
  }
  if (schedule.kind == 4) return after / (after + 1);
  if (schedule.kind == 5) {
    const double left = pow(2.71828182845904523536, -after / schedule.scale);
    return (Double{1 - left} * limit).x;
  }
  if (schedule.kind == 6 || schedule.kind == 7) {
    const double done = (after < schedule.scale ? after : schedule.scale) / schedule.scale;
    const Double left = schedule.kind == 6 ? half_cosine(done) : Double{1 - done};
    return limit - (left * (limit - schedule.least)).x;
  }
  if (schedule.kind == 8) {
    const Double grown = Double{schedule.scale} * after;
    return pow(0.5, 1 / (grown.x < schedule.power ? grown.x : schedule.power));
  }
  return limit;
}

// The decay of one update that takes the last `every` steps at once, as Schedule.over in Python:
// the product of theirs, in the same order.
inline double decay_over(const Schedule& schedule, uint64_t step) {
  const uint64_t before = step - schedule.every;
  if (schedule.every == 1) return decay_at(schedule, step);
  if (schedule.kind == 3) {
    return pow(static_cast<double>(before) / static_cast<double>(step), schedule.power);
  }
  if (schedule.kind == 4) {
    const int64_t all = static_cast<int64_t>(step) - schedule.start_step + 1;
    const int64_t old = all - static_cast<int64_t>(schedule.every);
    return old > 0 ? static_cast<double>(old) / static_cast<double>(all) : 0;
  }
  const double first = decay_at(schedule, before + 1);
  if (first == schedule.decay) return compound(first, schedule.every).x;
  Double product = first;
  for (uint64_t t = before + 2; t <= step; ++t) product = product * decay_at(schedule, t);
  return product.x;
}

}  // namespace

// Counts a step and computes its decays, one for each list: one thread of one block. A step that is
// not due has a decay of -1.
inline void advance(State* state, const Schedules& schedules, uint32_t lists) {
  if (threadIdx.x != 0) return;
  const uint64_t step = state->step + 1;
  state->step = step;
  for (uint32_t k = 0; k < lists; ++k) {
    const Schedule& schedule = schedules.of[k];
    const bool due = step % schedule.every == 0;
    state->decay[k] = due ? decay_over(schedule, step) : -1;
  }
}

}  // namespace fastema
