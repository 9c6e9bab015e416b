// The scales of packed codes: as the layer has them, and as the table of a panel.
//
// Legend: H hidden size, P packed rows, E experts, G scale rows of a layer, C scale columns.

#pragma once

#include "codes.h"

namespace {

// One projection's, as in formats.ScaleTables.
struct ScaleTable {
  const void* scales_GC;
  const int32_t* rows_P;     // the scale row of every packed row; null: its own number
  const uint8_t* zeros_GC;   // or null
  const float* factors_E;    // or null
  int64_t C;
  int64_t columns;  // of the projection's H, that one scale is for
};

// What a layer of codes has beside them.
struct Quantized {
  int32_t code;    // Code
  int32_t scale;   // dtype: Scale
  int32_t factor;  // Factor
  ScaleTable tables[3];  // gate (if there is one), up, down

  enum Scale { kFloat32, kBFloat16, kFloat16, kE8M0, kE4M3Scale };
  enum Factor { kNone, kTimes, kOver };

  int bits() const { return code == kE4M3 ? 8 : 4; }
  bool zeros() const { return tables[2].zeros_GC; }
  int64_t table_columns() const { return (zeros() ? 2 : 1) * kPanelColumns; }
};

// Up to a vector of numbers, the rest of it zeros.
template <class Number>
const Number* padded(const Number* from, int64_t count, Number (&copy)[kWidth]) {
  if (count >= kWidth) return from;
  std::fill(std::copy_n(from, count, copy), copy + kWidth, Number());
  return copy;
}

template <class Number>
Vec load_some(const void* from, int64_t at, int64_t count) {
  Number copy[kWidth];
  return load_floats(padded(static_cast<const Number*>(from) + at, count, copy));
}

// Up to a vector of scales of one row.
inline Vec load_scales(int dtype, const void* scales, int64_t at, int64_t count) {
  switch (dtype) {
    case Quantized::kFloat32:
      return load_some<float>(scales, at, count);
    case Quantized::kBFloat16:
      return load_some<c10::BFloat16>(scales, at, count);
    case Quantized::kFloat16:
      return load_some<c10::Half>(scales, at, count);
  }
  uint8_t copy[kWidth];
  const uint8_t* bytes = padded(static_cast<const uint8_t*>(scales) + at, count, copy);
  if (dtype == Quantized::kE4M3Scale) return meanings_of_8(bytes) * Vec(kMeaningUnit[kE4M3]);
  // A power of two; the smallest is a denormal float.
  return as_floats(at::vec::maximum(load_bytes(bytes) << Ints(23), Ints(1 << 22)));
}

// What codes of one row are multiplied with, and what is then added, for up to a vector of columns.
struct ScalesAndZeros {
  Vec scales, minus_zeros;
};
inline ScalesAndZeros load_effective(const Quantized& of, const ScaleTable& table, int64_t expert,
                                     int64_t row, int64_t column, int64_t count) {
  const int64_t at = row * table.C + column;
  Vec scales = load_scales(of.scale, table.scales_GC, at, count);
  if (of.factor == Quantized::kTimes) scales = scales * Vec(table.factors_E[expert]);
  if (of.factor == Quantized::kOver) scales = scales / Vec(table.factors_E[expert]);
  scales = scales * Vec(kMeaningUnit[of.code]);
  if (!table.zeros_GC) return {scales, Vec(0.f)};
  uint8_t copy[kWidth];
  const Ints zeros = load_bytes(padded(table.zeros_GC + at, count, copy));
  return {scales, at::vec::convert_to_fp_of_same_size<float>(zeros).neg() * scales};
}

// The table of one side of a tile: a row for every C, the scales of `atoms` packed rows from `first`
// on. Columns from `to` on; as far as whole vectors, rows as well.
inline void fill_side(const Quantized& of, const ScaleTable& table, int64_t expert, int64_t first,
                      int64_t atoms, int64_t end, float* to) {
  const int64_t stride = of.table_columns();
  alignas(64) float squares[2][kWidth * kWidth];
  for (int64_t atom = 0; atom < atoms; atom += kWidth)
    for (int64_t column = 0; column < table.C; column += kWidth) {
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t packed = std::min(first + atom + i, end - 1);  // padding is like the last
        const int64_t row = table.rows_P ? table.rows_P[packed] : packed;
        const auto loaded = load_effective(of, table, expert, row, column,
                                           std::min<int64_t>(kWidth, table.C - column));
        loaded.scales.store(squares[0] + i * kWidth);
        loaded.minus_zeros.store(squares[1] + i * kWidth);
      }
      float* corner = to + column * stride + atom;
      transpose(squares[0], kWidth, corner, stride);
      if (of.zeros()) transpose(squares[1], kWidth, corner + kPanelColumns, stride);
    }
}

// Asks for the memory that `fill_down` reads: short pieces far apart, which processors do not foresee.
// Into L2: by their distance they often share too few places of L1. Inlined, or compilers drop a call
// that has no effect.
[[gnu::always_inline]] inline void prefetch_down(const Quantized& of, int64_t first_row, int64_t count, int64_t column) {
  const ScaleTable& table = of.tables[2];
  static constexpr int kBytes[] = {4, 2, 2, 1, 1};  // of dtypes of scales
  const int bytes = kBytes[of.scale];
  const auto* from = static_cast<const char*>(table.scales_GC);
  for (int64_t row = first_row; row < first_row + count; ++row) {
    const char* at = from + (row * table.C + column / table.columns) * bytes;
    __builtin_prefetch(at, 0, 2);
    if (table.columns == 1 && bytes > 1) __builtin_prefetch(at + 64, 0, 2);
  }
}

// The table of 64 columns of down from `column` on: one row for each of `count` scale rows.
inline void fill_down(const Quantized& of, int64_t expert, int64_t first_row, int64_t count,
                      int64_t column, int64_t H, float* to) {
  const ScaleTable& table = of.tables[2];
  const int64_t end = std::min<int64_t>(H, column + kPanelColumns);
  const auto put = [&](const ScalesAndZeros& loaded, float* at) {
    loaded.scales.store(at);
    if (of.zeros()) loaded.minus_zeros.store(at + kPanelColumns);
  };
  for (int64_t row = first_row; row < first_row + count; ++row, to += of.table_columns()) {
    if (table.columns == 1) {
      for (int64_t j = column; j < end; j += kWidth)
        put(load_effective(of, table, expert, row, j, std::min<int64_t>(kWidth, end - j)),
            to + j - column);
      continue;
    }
    for (int64_t c = column / table.columns; c * table.columns < end; ++c) {
      const auto loaded = load_effective(of, table, expert, row, c, 1);
      alignas(64) float scale[kWidth], minus_zero[kWidth];
      loaded.scales.store(scale), loaded.minus_zeros.store(minus_zero);
      for (int64_t j = std::max(column, c * table.columns);
           j < std::min(end, (c + 1) * table.columns); ++j) {
        to[j - column] = scale[0];
        if (of.zeros()) to[kPanelColumns + j - column] = minus_zero[0];
      }
    }
  }
}

}  // namespace
