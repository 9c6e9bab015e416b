// Rows times panels of weights: the inner loops of experts.cpp.
//
// One lane loads a *unit*: two bfloat16, adjacent along the summed dimension, one float16, or one
// float32. A *panel* multiplies a row by up to 64 columns. Its layout is [units of the summed
// dimension][columns], so that one step multiplies one broadcast unit of the row by consecutive
// memory. Vectors may read beyond a panel's columns, up to 64 bytes behind the last panel; the
// results of such lanes are never used.
//
// Every sum runs along the summed dimension in one order, whatever the number of rows.

#pragma once

#include "vectors.h"

namespace {

// The scales of plain weights: none.
struct NoScales {
  NoScales from(int64_t) const { return {}; }
};

}  // namespace

#ifdef __AVX512BF16__
#include "avx512_bf16.h"
#endif

namespace {

constexpr int kPanelColumns = 64;
// Size of the chunks of a panel that is read several times: later reads come from the L1 cache.
constexpr int64_t kChunkBytes = 8 << 10;
// Distance of prefetches ahead of the codes being decoded: hardware prefetchers are too late when
// each byte takes long to decode.
constexpr int64_t kAheadBytes = 4 << 10;

// ---- element types ------------------------------------------------------------------------------

// A type has: Element, of the weights; Unit, and kPerUnit, its number of elements; Row, of the
// rows; Scales, of a panel; and add_step, which adds one step of R rows times J vectors of units to
// their sums. Types that codes are decoded to have store_unit, which makes units from kPerUnit
// vectors of weights.

inline float as_float(float number) { return number; }
inline float as_float(c10::BFloat16 number) { return number; }

template <class Load, class Row, int R, int J>
[[gnu::always_inline]] inline void add_products(Native (&sum)[R][J], const Row* const* rows,
                                                int64_t at, const Load& weights) {
  if constexpr (R > J) {  // keep the weights in registers, and stream the rows
    Native held[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) held[j] = weights(j);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const Vec x(as_float(rows[r][at]));
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) sum[r][j] = fmadd(x, Vec(held[j]), Vec(sum[r][j]));
    }
  } else {
    Native x[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) x[r] = Vec(as_float(rows[r][at]));
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      const Vec held = weights(j);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][j] = fmadd(Vec(x[r]), held, Vec(sum[r][j]));
    }
  }
}

struct Float32 {
  using Element = float;
  using Unit = float;
  using Row = float;
  using Scales = NoScales;
  static constexpr int kPerUnit = 1;
  static constexpr int kAhead = 0;
  static constexpr int kConstants = 0;

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows, int64_t at,
                                              const Unit* units, NoScales) {
    add_products(sum, rows, at, [&](int j) { return Vec::loadu(units + j * kWidth); });
  }
  static void store_unit(Unit* to, const Vec& weights) { weights.store(to); }
};

struct Float16 {
  using Element = c10::Half;
  using Unit = uint16_t;
  using Row = float;
  using Scales = NoScales;
  static constexpr int kPerUnit = 1;
  static constexpr int kAhead = 0;
  static constexpr int kConstants = 0;

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows, int64_t at,
                                              const Unit* units, NoScales) {
    add_products(sum, rows, at, [&](int j) {
      Vec weights;
      at::vec::load_fp32_from_fp16(reinterpret_cast<const Element*>(units + j * kWidth), weights);
      return weights;
    });
  }
};

#ifdef __AVX512BF16__
using BFloat16 = PairedBFloat16;
#else
struct BFloat16 {
  using Element = c10::BFloat16;
  using Unit = uint32_t;
  using Row = float;
  using Scales = NoScales;
  static constexpr int kPerUnit = 2;
  static constexpr int kAhead = 0;
  static constexpr int kConstants = 1;

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows, int64_t at,
                                              const Unit* units, NoScales) {
    const auto pairs = [&](int j) { return Ints::loadu(units + j * kWidth); };
    add_products(sum, rows, at, [&](int j) { return as_floats(pairs(j) << Ints(16)); });
    add_products(sum, rows, at + 1,
                 [&](int j) { return as_floats(pairs(j) & Ints(int32_t(0xffff0000))); });
  }
};
#endif

// Stores numbers in the type of the rows that panels are multiplied with.
inline void store_row(float* to, const Vec& value) { value.store(to); }

// ---- rows times a panel -------------------------------------------------------------------------

template <class D>
struct Panel {
  const typename D::Unit* units;
  int64_t steps;
  int64_t columns;
  typename D::Scales scales{};
  bool cached = false;  // whether all of it was just decoded
};

// Adds steps at..at+steps of R rows times J vectors of columns to the sums, [R][64] floats.
// Prefetches as many bytes as it reads, from `next` on if not null: memory streams best in its own
// order.
template <class D, int R, int J>
void multiply_vectors(const typename D::Row* const* rows, int64_t at, int64_t steps,
                      const typename D::Unit* units, int64_t stride, typename D::Scales scales,
                      float* sums, bool fresh, const char* next) {
  constexpr int kStepBytes = J * kWidth * sizeof *units;
  Native sum[R][J];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j)
      sum[r][j] = fresh ? Vec(0.f) : Vec::loadu(sums + r * kPanelColumns + j * kWidth);
  const int64_t end = (at + steps) * D::kPerUnit;
  for (at *= D::kPerUnit; at < end; at += D::kPerUnit, units += stride) {
    if (next) {
#pragma GCC unroll 4
      for (int line = 0; line < kStepBytes; line += 64) __builtin_prefetch(next + line);
      next += kStepBytes;
    }
    D::add_step(sum, rows, at, units, scales);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) Vec(sum[r][j]).store(sums + r * kPanelColumns + j * kWidth);
}

// Multiplies vectors from `vector` to the last: J at a time as long as possible, then fewer.
template <class D, int R, int J>
void multiply_all_vectors(const typename D::Row* const* rows, int64_t at, int64_t steps,
                          const Panel<D>& panel, float* product, bool fresh, int vector,
                          int vectors, const char* next) {
  const auto* units = panel.units + at * panel.columns;
  for (; vectors - vector >= J; vector += J) {
    multiply_vectors<D, R, J>(rows, at, steps, units + vector * kWidth, panel.columns,
                              panel.scales.from(vector * kWidth), product + vector * kWidth, fresh,
                              next);
    if (next) next += steps * J * kWidth * sizeof *units;
  }
  if constexpr (J > 1)
    multiply_all_vectors<D, R, J / 2>(rows, at, steps, panel, product, fresh, vector, vectors, next);
}

// Number of vectors of columns that R rows take at once: their sums stay in registers, beside the
// operands of add_products and D's constants.
template <class D>
constexpr int vectors_at_once(int rows) {
  int vectors = kPanelColumns / kWidth;
  while (vectors * rows + std::min(vectors, rows) + 1 + D::kConstants > kRegisters) vectors /= 2;
  return vectors;
}

// Computes products of R rows, [R][64] floats; adds them to `product` unless `fresh`.
template <class D, int R>
void multiply_rows(const typename D::Row* const* rows, const Panel<D>& panel, float* product,
                   bool fresh) {
  constexpr int J = vectors_at_once<D>(R);
  const int vectors = ceil_div(panel.columns, kWidth);
  const bool whole = vectors <= J || panel.cached;
  int64_t chunk = panel.steps;
  if (!whole)
    chunk = std::max<int64_t>(1, kChunkBytes / int64_t(panel.columns * sizeof *panel.units));
  for (int64_t at = 0; at < panel.steps; at += chunk) {
    const auto* next = reinterpret_cast<const char*>(panel.units + (at + chunk) * panel.columns);
    if (whole)
      next = D::kAhead ? reinterpret_cast<const char*>(panel.units) + D::kAhead : nullptr;
    multiply_all_vectors<D, R, J>(rows, at, std::min(chunk, panel.steps - at), panel, product,
                                  fresh && at == 0, 0, vectors, next);
  }
}

constexpr int kRows = 6;
constexpr int kFewRows = 4;

// Multiplies `count` rows, at most kMost, which is 4 or 6.
template <class D, int kMost = kRows>
void multiply(const typename D::Row* const* rows, int count, const Panel<D>& panel, float* product,
              bool fresh) {
  if constexpr (kMost > 4) {
    if (count == 5) return multiply_rows<D, 5>(rows, panel, product, fresh);
    if (count == 6) return multiply_rows<D, 6>(rows, panel, product, fresh);
  }
  switch (count) {
    case 1:
      return multiply_rows<D, 1>(rows, panel, product, fresh);
    case 2:
      return multiply_rows<D, 2>(rows, panel, product, fresh);
    case 3:
      return multiply_rows<D, 3>(rows, panel, product, fresh);
    case 4:
      return multiply_rows<D, 4>(rows, panel, product, fresh);
  }
  static_assert(kRows == 6);
}

}  // namespace
