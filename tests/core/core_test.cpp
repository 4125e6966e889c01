// The core without Python, for the sanitizers: every instruction set, type and rounding, sizes
// around every vector width and piece, any number of threads, each against the formula for one
// number. (tests/*.py compare with NumPy.)
#include "fastema/core.hpp"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <thread>
#include <vector>

#include "formula.hpp"
#include "openmp.hpp"
#include "team.hpp"
#include "tuning.hpp"

namespace {

using namespace fastema;

int failures = 0;

struct Case {
  std::size_t size, offset;
  int threads;
};

void expect(bool holds, const char* type, const char* what, const Case& c) {
  if (holds) return;
  std::printf("%s %s: %s differs at size %zu, offset %zu, %d threads\n", instruction_set(), type,
              what, c.size, c.offset, c.threads);
  ++failures;
}

template <class T>
struct Type;
template <class T>
struct Itself {
  static T widen(T x) { return x; }
  static T narrow(T x) { return x; }
  static T narrow_at_random(T x, std::uint32_t) { return x; }
};
template <>
struct Type<float> : Itself<float> {
  static constexpr DType dtype = DType::f32;
  static constexpr const char* name = "f32";
};
template <>
struct Type<double> : Itself<double> {
  static constexpr DType dtype = DType::f64;
  static constexpr const char* name = "f64";
};
template <>
struct Type<bf16> {
  static constexpr DType dtype = DType::bf16;
  static constexpr const char* name = "bf16";
  static float widen(bf16 x) { return widen_bf16<float>(x.bits); }
  static bf16 narrow(float x) { return {static_cast<std::uint16_t>(round_bf16(x) >> 16)}; }
  static bf16 narrow_at_random(float x, std::uint32_t random) {
    return {static_cast<std::uint16_t>(round_bf16_at_random(x, random) >> 16)};
  }
};
template <>
struct Type<f16> {
  static constexpr DType dtype = DType::f16;
  static constexpr const char* name = "f16";
  static float widen(f16 x) { return widen_f16<float>(x.bits); }
  static f16 narrow(float x) { return {static_cast<std::uint16_t>(narrow_f16(x))}; }
  static f16 narrow_at_random(float x, std::uint32_t random) {
    return {static_cast<std::uint16_t>(narrow_f16_at_random(x, random))};
  }
};

// Numbers of many magnitudes, subnormals among them, by a fixed generator.
template <class T>
std::vector<T> noise(std::size_t size, std::uint64_t seed) {
  std::vector<T> out(size);
  for (T& x : out) {
    seed = seed * 6364136223846793005ULL + 1442695040888963407ULL;
    const auto mantissa = static_cast<float>(static_cast<std::int32_t>(seed >> 32));
    x = Type<T>::narrow(mantissa * ((seed >> 20 & 1) != 0 ? 1e-9f : 3e-44f));
  }
  return out;
}

template <class T>
bool same(const T* x, const T* y, std::size_t size) {
  return size == 0 || std::memcmp(x, y, size * sizeof(T)) == 0;
}

template <class T>
Span span(std::vector<T>& x, std::size_t offset) {
  return {x.data() + offset, x.size() - offset, Type<T>::dtype};
}

template <class A, class V>
void check_update(const Case& c, bool stochastic) {
  const double decay = 0.99;
  auto a = noise<A>(c.size + c.offset, 1);
  auto v = noise<V>(c.size + c.offset, 2);
  auto small = noise<A>(3, 3);
  auto other = noise<V>(3, 4);
  auto none = noise<A>(0, 5);
  auto nothing = noise<V>(0, 6);
  auto expected = a;
  using C = Compute<A>;
  const C w = weight_of<C>(decay);
  const Options options{c.threads, stochastic, 11, 12};
  const std::uint64_t key = key_of(11, 12, 2, 0);
  const auto rounded = [&](C x, std::size_t i) {
    const std::uint32_t two = hash(static_cast<std::uint32_t>(i / 2), key);
    const std::uint32_t random = i % 2 == 0 ? two & 0xffff : two >> 16;
    return stochastic ? Type<A>::narrow_at_random(x, random) : Type<A>::narrow(x);
  };
  for (std::size_t i = 0; i < c.size; ++i) {
    const std::size_t at = i + c.offset;
    const C x = blend<C>(Type<A>::widen(expected[at]), Type<V>::widen(v[at]), w);
    expected[at] = rounded(x, i);
  }
  const std::vector<Pair> pairs{
      {span(small, 0), span(other, 0)},
      {span(none, 0), span(nothing, 0)},
      {span(a, c.offset), span(v, c.offset)},
  };
  fastema::update(pairs, {&decay, 1}, options);
  expect(same(a.data(), expected.data(), a.size()), Type<A>::name,
         stochastic ? "stochastic update" : "update", c);

  const double zero = 0.0;
  fastema::update(pairs, {&zero, 1}, options);
  for (std::size_t i = c.offset; i < a.size(); ++i) {
    expected[i] = rounded(static_cast<C>(Type<V>::widen(v[i])), i - c.offset);
  }
  expect(same(a.data(), expected.data(), a.size()), Type<A>::name, "copy", c);
}

void check_compensated(const Case& c) {
  const double decay = 0.9999;
  const float w = static_cast<float>(1.0 - decay);
  auto a = noise<float>(c.size + c.offset, 1), v = noise<float>(c.size + c.offset, 2);
  auto carry = noise<float>(c.size + c.offset, 3);
  for (float& x : carry) x *= 1e-9f;
  auto a_expected = a, carry_expected = carry;
  for (std::size_t i = c.offset; i < a.size(); ++i) {
    blend_compensated(a_expected[i], carry_expected[i], v[i], w);
  }
  const Pair pair{span(a, c.offset), span(v, c.offset), carry.data() + c.offset};
  fastema::update({&pair, 1}, {&decay, 1}, {.threads = c.threads});
  expect(same(a.data(), a_expected.data(), a.size()) &&
             same(carry.data(), carry_expected.data(), a.size()),
         "f32", "compensated update", c);
}

// A bfloat16 and its carry are a float32 together.
template <class V>
void check_split(const Case& c) {
  const double decay = 0.9999;
  const float w = static_cast<float>(1.0 - decay);
  auto v = noise<V>(c.size + c.offset, 2);
  const auto whole = noise<float>(c.size + c.offset, 1);
  std::vector<bf16> high(whole.size());
  std::vector<std::uint16_t> low(whole.size());
  for (std::size_t i = 0; i < whole.size(); ++i) {
    std::uint32_t upper = 0, lower = 0;
    split_bf16(whole[i], upper, lower);
    high[i].bits = static_cast<std::uint16_t>(upper >> 16);
    low[i] = static_cast<std::uint16_t>(lower);
  }
  const Pair split{span(high, c.offset), span(v, c.offset), low.data() + c.offset};
  const auto holds = [&](auto&& expected) {
    bool equal = true;
    for (std::size_t i = c.offset; i < high.size(); ++i) {
      const float x = expected(i);
      const float y = join_bf16<float>(high[i].bits, low[i]);
      equal = equal && same(&x, &y, 1);
    }
    return equal;
  };
  fastema::update({&split, 1}, {&decay, 1}, {.threads = c.threads});
  expect(holds([&](std::size_t i) { return blend(whole[i], Type<V>::widen(v[i]), w); }), "bf16",
         "compensated update", c);
  const double zero = 0.0;
  fastema::update({&split, 1}, {&zero, 1}, {.threads = c.threads});
  expect(holds([&](std::size_t i) { return Type<V>::widen(v[i]); }), "bf16", "compensated copy", c);
}

template <class T>
void check_swap(const Case& c) {
  auto a = noise<T>(c.size + c.offset, 1), b = noise<T>(c.size + c.offset, 2);
  const auto a0 = a, b0 = b;
  const Pair pair{span(a, c.offset), span(b, c.offset)};
  fastema::swap({&pair, 1}, c.threads);
  expect(same(a.data() + c.offset, b0.data() + c.offset, c.size) &&
             same(b.data() + c.offset, a0.data() + c.offset, c.size),
         Type<T>::name, "swap", c);
  fastema::swap({&pair, 1}, c.threads);
  expect(same(a.data(), a0.data(), a.size()) && same(b.data(), b0.data(), b.size()), Type<T>::name,
         "swap twice", c);
}

// Of three values, one of which has any bits, then finite ones alone, then one NaN in all of it.
template <class T>
void check_finite(const Case& c) {
  auto a = noise<T>(c.size + c.offset, 1), v = noise<T>(c.size + c.offset, 2), one = a;
  for (T& x : one) x = {};
  const Pair pairs[] = {
      {span(a, c.offset), span(one, c.offset)},
      {span(a, c.offset), span(v, c.offset)},
      {span(a, c.offset), span(one, c.offset)},
  };
  const auto is_finite = [](T x) { return std::isfinite(Type<T>::widen(x)); };
  const auto expect_first = [&](std::size_t expected) {
    expect(first_non_finite(pairs, 1, c.threads) == expected, Type<T>::name, "first non-finite", c);
  };
  expect_first(
      std::all_of(v.begin() + static_cast<std::ptrdiff_t>(c.offset), v.end(), is_finite) ? 3 : 1);
  for (T& x : v) x = is_finite(x) ? x : T{};
  expect_first(3);
  if (c.size == 0) return;
  std::memset(&v.back(), 0xff, sizeof(T));
  expect_first(1);
  one.back() = v.back();
  expect_first(0);
}

// Bytes in any number at any address, of types that the core need not know.
void check_bytes(const Case& c) {
  std::vector<unsigned char> a(3 * c.size + c.offset), b(a.size());
  for (std::size_t i = 0; i < b.size(); ++i) b[i] = static_cast<unsigned char>(31 * i + 7);
  const auto b0 = b;
  const auto bytes = [&](std::vector<unsigned char>& x) {
    return Span{x.data() + c.offset, x.size() - c.offset, DType::byte};
  };
  const Pair pair{bytes(a), bytes(b)};
  fastema::copy({&pair, 1}, c.threads);
  expect(same(a.data() + c.offset, b0.data() + c.offset, b.size() - c.offset) && b == b0, "bytes",
         "copy", c);
  a.assign(a.size(), 1);
  fastema::swap({&pair, 1}, c.threads);
  expect(same(a.data() + c.offset, b0.data() + c.offset, b.size() - c.offset), "bytes", "swap", c);
}

// Several averages of one value are those averages one by one.
void check_several(const Case& c) {
  const double decays[] = {0.9, 0.99, 0.0};
  auto v = noise<float>(c.size + c.offset, 2);
  std::vector<std::vector<float>> together(3, noise<float>(c.size + c.offset, 1));
  auto alone = together;
  std::vector<Pair> pairs;
  for (auto& a : together) pairs.push_back({span(a, c.offset), span(v, c.offset)});
  fastema::update(pairs, decays, {.threads = c.threads});
  for (std::size_t k = 0; k < 3; ++k) {
    const Pair pair{span(alone[k], c.offset), span(v, c.offset)};
    fastema::update({&pair, 1}, {&decays[k], 1}, {.threads = c.threads});
    expect(same(together[k].data(), alone[k].data(), v.size()), "f32", "one of several", c);
  }
}

// A new average beside the old one is what it would have become in its place, also where the two
// begin at other places in their lines.
template <class A, class V>
void check_beside(const Case& c) {
  auto a = noise<A>(c.size + c.offset, 1);
  auto v = noise<V>(c.size + c.offset, 2);
  const auto before = a;
  auto made = noise<A>(c.size + 3, 3);
  for (const bool stochastic : {false, true}) {
    for (const double decay : {0.9, 0.0}) {
      const Options options{c.threads, stochastic, 11, 12};
      const Pair beside{span(a, c.offset), span(v, c.offset), nullptr, made.data() + 3};
      fastema::update({&beside, 1}, {&decay, 1}, options);
      expect(same(a.data(), before.data(), a.size()), Type<A>::name, "an average beside which", c);
      auto moved = before;
      const Pair in_place{span(moved, c.offset), span(v, c.offset)};
      fastema::update({&in_place, 1}, {&decay, 1}, options);
      expect(same(made.data() + 3, moved.data() + c.offset, c.size), Type<A>::name, "beside", c);
    }
  }
}

void check_all(const Case& c) {
  check_beside<bf16, bf16>(c);
  check_beside<f16, f16>(c);
  check_beside<float, float>(c);
  check_beside<double, double>(c);
  check_beside<float, bf16>(c);
  check_beside<float, f16>(c);
  check_beside<double, float>(c);
  check_beside<double, bf16>(c);
  check_beside<double, f16>(c);
  check_beside<bf16, float>(c);
  check_beside<f16, float>(c);
  check_update<float, float>(c, false);
  check_update<double, double>(c, false);
  check_update<float, bf16>(c, false);
  check_update<float, f16>(c, false);
  check_update<double, float>(c, false);
  check_update<double, bf16>(c, false);
  check_update<double, f16>(c, false);
  for (const bool stochastic : {false, true}) {
    check_update<bf16, bf16>(c, stochastic);
    check_update<f16, f16>(c, stochastic);
    check_update<bf16, float>(c, stochastic);
    check_update<f16, float>(c, stochastic);
  }
  check_compensated(c);
  check_split<bf16>(c);
  check_split<float>(c);
  check_several(c);
  check_swap<bf16>(c);
  check_swap<float>(c);
  check_swap<double>(c);
  check_finite<f16>(c);
  check_finite<bf16>(c);
  check_finite<float>(c);
  check_finite<double>(c);
  check_bytes(c);
}

// Calls from many threads at once, over shared values, while the instruction set is chosen anew.
void check_storm() {
  const auto values = noise<float>(100'003, 2);
  const double decay = 0.9;
  auto expected = noise<float>(values.size(), 1);
  const auto start = expected;
  const float w = static_cast<float>(1.0 - decay);
  for (int i = 0; i < 20; ++i) {
    for (std::size_t j = 0; j < values.size(); ++j) {
      expected[j] = blend(expected[j], values[j], w);
    }
  }
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < 6; ++t) {
    threads.emplace_back([&, t] {
      auto mine = start, other = noise<float>(values.size(), 3);
      const Pair pair{span(mine, 0),
                      {const_cast<float*>(values.data()), values.size(), DType::f32}};
      const Pair exchanged{span(mine, 0), span(other, 0)};
      for (int i = 0; i < 20; ++i) {
        use_instruction_set(
            instruction_sets()[static_cast<std::size_t>(i + t) % instruction_sets().size()]);
        fastema::update({&pair, 1}, {&decay, 1}, {});
        fastema::swap({&exchanged, 1}, 0);
        fastema::swap({&exchanged, 1}, 0);
      }
      if (!same(mine.data(), expected.data(), mine.size())) ++wrong;
    });
  }
  for (std::thread& thread : threads) thread.join();
  expect(wrong == 0, "f32", "a storm of calls", {values.size(), 0, 6});
}

// Two pieces that each wait for the other to be begun, so that one thread alone cannot finish.
void check_helpers() {
  std::atomic<int> begun{0};
  run_pieces(
      2, 2,
      [](Pieces::Walk& walk, const void* context) noexcept {
        auto& count = *static_cast<std::atomic<int>*>(const_cast<void*>(context));
        const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(20);
        for (std::size_t piece; walk.take(piece);) {
          ++count;
          while (count < 2 && std::chrono::steady_clock::now() < end) std::this_thread::yield();
          if (count < 2) count = 3;  // nobody came: the next piece must not look like a helper's
        }
      },
      &begun);
  expect(begun == 2, "any", "the number of threads that came", {2, 0, 2});
}

// Each thread begins in a part of its own, the same one at each call, and all pieces are taken
// once.
void check_parts() {
  for (const std::size_t threads : {1u, 2u, 3u, 64u, 100u}) {
    for (const std::size_t count : {100u, 101u, 1000u}) {
      std::vector<std::size_t> first(threads), taken(count);
      Pieces pieces(count, threads);
      std::vector<Pieces::Walk> walks;
      for (std::size_t t = 0; t < threads; ++t) walks.emplace_back(pieces, t);
      for (std::size_t t = 0; t < threads; ++t) walks[t].take(first[t]);
      for (const std::size_t piece : first) ++taken[piece];
      for (std::size_t piece; walks[0].take(piece);) ++taken[piece];  // the others do not go on
      expect(std::ranges::all_of(taken, [](std::size_t n) { return n == 1; }), "any",
             "how often a piece is taken", {count, 0, static_cast<int>(threads)});
      expect(
          first[0] == 0 && (threads > 64 || first[threads - 1] == count * (threads - 1) / threads),
          "any", "where a thread begins", {count, 0, static_cast<int>(threads)});
    }
  }
}

// Does one call of so many parts, each of which takes `times[candidate]` nanoseconds a byte.
void do_call(Tuner& tuner, std::uint32_t call, const std::vector<double>& times) {
  constexpr std::size_t kPart = std::size_t{1} << 20;
  for (std::size_t part = 0; part < 192; ++part) {
    const Tuner::Trial trial = tuner.trial(call, part, kPart);
    if (!trial.timed) continue;
    const auto time = static_cast<std::int64_t>(times[trial.candidate] * double{kPart});
    tuner.took(trial, kPart, std::chrono::nanoseconds(time));
  }
}

void check_tuner() {
  Tuner tuner;
  const auto found = [&](const char* what, int distance) {
    expect(tuner.found() == distance, "any", what, {0, 0, 1});
  };
  found("a distance before any look", -1);
  expect(!tuner.trial(0, 0, Tuner::kLeast - 1).timed, "any", "a look at small parts", {});
  expect(tuner.trial(0, 0, 1).ahead == kUsualAhead, "any", "the usual distance", {});
  std::uint32_t call = 0;
  while (call < 10) do_call(tuner, call++, {5, 4, 3, 2, 3, 4});
  found("the fastest distance", 1024);
  expect(tuner.trial(call, 0, 1).ahead == 1024, "any", "the distance in use", {});
  while (call < 100) do_call(tuner, call++, {5, 4, 3, 2, 1.99, 4});
  found("a distance that is hardly better", 1024);
  while (call < 200) do_call(tuner, call++, {5, 1, 3, 2, 1.99, 4});
  found("a distance that became better", 256);
  int looks = 0;
  for (; call < 20'000; ++call) {
    looks += tuner.trial(call, 0, Tuner::kLeast).timed ? 1 : 0;
    do_call(tuner, call, {1, 1, 1, 1, 1, 1});
  }
  expect(looks > 0 && looks < 100, "any", "the share of calls with looks", {});
  tuner.forget();
  found("a distance after it was forgotten", -1);

  std::vector<std::thread> threads;
  for (std::uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (std::uint32_t i = 0; i < 50; ++i) do_call(tuner, call + 4 * i + t, {5, 4, 3, 2, 3, 4});
    });
  }
  for (std::thread& thread : threads) thread.join();
  found("the fastest distance, looked at by several threads", 1024);
}

// The team that OpenMP has for this thread, as another library would have used it.
void check_openmp() {
#if defined(_OPENMP) && defined(__linux__)
  expect(!openmp_spins(), "any", "a team that nobody used", {});
  const auto use = [] {
    std::atomic<int> threads{0};
#pragma omp parallel
    ++threads;
    return threads.load();
  };
  if (use() < 2) return;
  std::atomic<int> threads{0};
  run_by_openmp(
      [](const void* count, std::size_t) noexcept {
        ++*static_cast<std::atomic<int>*>(const_cast<void*>(count));
      },
      &threads);
  expect(threads == default_threads(), "any", "the threads of OpenMP's team", {});
  bool spun = false, slept = false;
  // on a busy machine the team may not be on a processor for a while
  for (int i = 0; i < 10'000 && !spun; ++i) {
    if (i % 100 == 99) std::this_thread::sleep_for(std::chrono::milliseconds(10));
    use();
    spun = openmp_spins();
  }
  expect(spun, "any", "a team right after its work", {});
  for (int i = 0; i < 1000 && !slept; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    slept = !openmp_spins();
  }
  expect(slept, "any", "a team after a while", {});
  std::thread([] {
    run_by_openmp([](const void*, std::size_t) noexcept {}, nullptr);
    expect(!openmp_spins(), "any", "a team that only we use", {});
  }).join();
#pragma omp parallel
  expect(!openmp_spins(), "any", "a team at work", {});
#endif
}

}  // namespace

int main() {
  check_helpers();
  check_parts();
  check_tuner();
  check_openmp();
  for (const char* name : instruction_sets()) {
    use_instruction_set(name);
    for (const std::size_t offset : {0u, 1u, 5u}) {
      for (std::size_t size = 0; size < 140; ++size) check_all({size, offset, 1});
      for (const std::size_t size : {65535u, 131073u, 262147u}) {
        for (const int threads : {1, 3}) check_all({size, offset, threads});
      }
    }
  }
  check_all({std::size_t{9} << 19, 1, 2});  // lists larger than caches take other loops
  check_storm();
  if (failures != 0) return 1;
  std::printf("every kernel agrees with the formula:");  // tests/support/platforms.py reads which
  for (const char* name : instruction_sets()) std::printf(" %s", name);
  std::puts("");
}
