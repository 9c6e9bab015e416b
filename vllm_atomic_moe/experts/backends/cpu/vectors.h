// Vectors of floats, from torch's own headers: 8 lanes with AVX2, 16 with AVX-512, 4 with NEON.
// Small headers per instruction set, avx512_bf16.h and amx.h, hold what torch's lack or do too
// slowly.
//
// Everything has internal linkage, since one process may load several variants.

#pragma once

#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <tuple>

namespace {

using Vec = at::vec::Vectorized<float>;
using Ints = at::vec::Vectorized<int32_t>;

constexpr int kWidth = Vec::size();
// The register itself. Use it for arrays that must stay in registers: arrays of Vec, which has
// constructors, go through the stack.
typedef float Native __attribute__((vector_size(4 * kWidth)));
#if defined(CPU_CAPABILITY_AVX2)
constexpr int kRegisters = 16;
#else
constexpr int kRegisters = 32;
#endif

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

Vec fmadd(const Vec& a, const Vec& b, const Vec& c) { return at::vec::fmadd(a, b, c); }
#ifdef __ARM_NEON
Vec as_floats(const Ints& bits) { return vreinterpretq_f32_s32(bits); }
#else
Vec as_floats(const Ints& bits) { return at::vec::cast<float, int32_t>(bits); }
#endif

// Transposes a square: row i is load(i), one vector; the stride is in elements.
template <class Load>
[[gnu::always_inline]] inline void transpose(const Load& load, void* to, int64_t to_stride) {
#if defined(CPU_CAPABILITY_AVX2)
  at::vec::VectorizedN<float, kWidth> rows;
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) rows[i] = load(i);
  at::vec::transpose_block(rows);  // half the instructions of the code below
#else
  Native rows[kWidth], mixed[kWidth];
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) rows[i] = load(i);
  // Interleaving the halves shifts the bits of an element's position by one.
#pragma GCC unroll 4
  for (int round = 1; round < kWidth; round *= 2) {
#pragma GCC unroll 16
    for (int i = 0; i < kWidth / 2; ++i)
      std::tie(mixed[2 * i], mixed[2 * i + 1]) =
          at::vec::interleave2(Vec(rows[i]), Vec(rows[i + kWidth / 2]));
#pragma GCC unroll 16
    for (int i = 0; i < kWidth; ++i) rows[i] = mixed[i];
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) Vec(rows[i]).store(static_cast<float*>(to) + i * to_stride);
}

// Lane i is all ones if bit i of `bits` is set.
Vec lane_mask(uint32_t bits) {
  alignas(64) static constexpr int32_t kBits[16] = {1,      1 << 1,  1 << 2,  1 << 3,
                                                    1 << 4, 1 << 5,  1 << 6,  1 << 7,
                                                    1 << 8, 1 << 9,  1 << 10, 1 << 11,
                                                    1 << 12, 1 << 13, 1 << 14, 1 << 15};
  const Ints lanes = Ints::loadu(kBits);
  return as_floats((Ints(static_cast<int32_t>(bits)) & lanes) == lanes);
}

// e^x, accurate to the last bit or two, for |x| ≤ 100; infinite for x ≥ 89.
Vec exponential(const Vec& x) {
  const Vec whole = (x * Vec(1.44269504f)).round();
  const Ints n = at::vec::convert_to_int_of_same_size(whole);
  Vec rest = fmadd(whole, Vec(-0.693359375f), x);
  rest = fmadd(whole, Vec(2.12194440e-4f), rest);
  Vec sum(1.f / 5040);
  for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    sum = fmadd(sum, rest, Vec(factor));
  // 2^n as two factors, since n may exceed a float's exponents.
  const Ints half = n >> Ints(1);
  const auto power = [](const Ints& exponent) {
    return as_floats((exponent + Ints(127)) << Ints(23));
  };
  return sum * power(half) * power(n - half);
}

// x · σ(z), σ the logistic function.
Vec times_logistic(const Vec& x, const Vec& z) {
  // Clamp: `exponential` is wrong beyond; e^100 is infinite and e^-100 too small to change 1.
  const Vec minus_z = at::vec::clamp(z.neg(), Vec(-100.f), Vec(100.f));
  return x / (Vec(1.f) + exponential(minus_z));
}

// 2σ(2x) − 1; near zero, where that loses digits, a polynomial.
[[maybe_unused]] Vec tanh(const Vec& x) {
  const Vec far = Vec(2.f) * times_logistic(Vec(1.f), x + x) - Vec(1.f);
  const Vec square = x * x;
  Vec sum = fmadd(square, Vec(-17.f / 315), Vec(2.f / 15));
  sum = fmadd(square, sum, Vec(-1.f / 3));
  const Vec near = fmadd(x * square, sum, x);
  return Vec::blendv(far, near, square < Vec(0.04f));
}

}  // namespace
