// The numbers that formula.hpp computes with on a CUDA device.
//
// CuPy appends -ftz=true to any options, so no arithmetic of floats is left to the compiler on a
// device: it is in PTX, each operation rounded and none fused or flushed to zero.
#pragma once

#if defined(__CUDACC_RTC__)  // NVRTC has no headers
using uint16_t = unsigned short;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;
using uint64_t = unsigned long long;
using uintptr_t = unsigned long long;
#if __CUDACC_VER_MAJOR__ < 13  // nor has every NVRTC of CUDA 12 what formula.hpp takes bits with
template <class To, class From>
inline To bits_as(const From& from) {
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}
#define __builtin_bit_cast(To, from) bits_as<To>(from)
#endif
#endif

#include "formula.hpp"

namespace fastema {
namespace {

#if defined(__CUDA_ARCH__)
#define FASTEMA_ROUNDED(name, op, type, ptx, reg)                            \
  inline type name(type a, type b) {                                         \
    type result;                                                             \
    asm(#name ".rn." ptx " %0, %1, %2;" : "=" reg(result) : reg(a), reg(b)); \
    return result;                                                           \
  }
#else
#define FASTEMA_ROUNDED(name, op, type, ptx, reg) \
  inline type name(type a, type b) { return a op b; }
#endif
FASTEMA_ROUNDED(add, +, float, "f32", "f")
FASTEMA_ROUNDED(sub, -, float, "f32", "f")
FASTEMA_ROUNDED(mul, *, float, "f32", "f")
FASTEMA_ROUNDED(add, +, double, "f64", "d")
FASTEMA_ROUNDED(sub, -, double, "f64", "d")
FASTEMA_ROUNDED(mul, *, double, "f64", "d")
#undef FASTEMA_ROUNDED

inline float narrow(double from) {
#if defined(__CUDA_ARCH__)
  float to;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(to) : "d"(from));
  return to;
#else
  return static_cast<float>(from);
#endif
}

// What formula.hpp computes with.
template <class T>
struct Number {
  T x;
  Number() = default;
  Number(T y) : x(y) {}
  explicit operator Number<float>() const { return narrow(x); }
  friend Number operator+(Number a, Number b) { return add(a.x, b.x); }
  friend Number operator-(Number a, Number b) { return sub(a.x, b.x); }
  friend Number operator*(Number a, Number b) { return mul(a.x, b.x); }
};
using Single = Number<float>;
using Double = Number<double>;

inline Double widen(Single from) {
#if defined(__CUDA_ARCH__)
  double to;
  asm("cvt.f64.f32 %0, %1;" : "=d"(to) : "f"(from.x));
  return to;
#else
  return static_cast<double>(from.x);
#endif
}

#if defined(__CUDA_ARCH__)
inline Single magnitude(Single from) {
  float to;
  asm("abs.f32 %0, %1;" : "=f"(to) : "f"(from.x));
  return to;
}

// Returns `then` where a >= b, which NaN is not.
inline uint32_t select_ge(Single a, float b, uint32_t then, uint32_t otherwise) {
  uint32_t chosen;
  asm("{\n\t.reg .pred is_ge;\n\tsetp.ge.f32 is_ge, %1, %2;\n\tselp.b32 %0, %3, %4, is_ge;\n\t}"
      : "=r"(chosen)
      : "f"(a.x), "f"(b), "r"(then), "r"(otherwise));
  return chosen;
}

inline Single add_towards_zero(Single a, Single b) {
  float sum;
  asm("add.rz.f32 %0, %1, %2;" : "=f"(sum) : "f"(a.x), "f"(b.x));
  return sum;
}
#endif

template <>
struct Lanes<Single> {
  using Word = uint32_t;
  static Single to_float(uint32_t from) {
#if defined(__CUDA_ARCH__)
    float to;
    asm("cvt.rn.f32.u32 %0, %1;" : "=f"(to) : "r"(from));
    return to;
#else
    return static_cast<float>(from);
#endif
  }
  static uint32_t to_word(Single from) {
#if defined(__CUDA_ARCH__)
    uint32_t to;
    asm("cvt.rzi.u32.f32 %0, %1;" : "=r"(to) : "f"(from.x));
    return to;
#else
    return static_cast<uint32_t>(from.x);
#endif
  }
};

template <class Element>
using NumberOf = Number<Compute<Element>>;

}  // namespace
}  // namespace fastema
