// The scales of packed codes: those of the layer, and the table of a panel.
//
// Legend: H hidden size, P packed rows, E experts, G scale rows of a layer, C scale columns.

#pragma once

#include "codes.h"

namespace {

// The scales of one projection, as in formats.ScaleTables.
struct ScaleTable {
  const void* scales_GC;
  const int16_t* rows_P;     // the scale row of every packed row, from its expert's first one;
                             // null: its own index
  const int32_t* firsts_E;   // these first ones
  const uint8_t* zeros_GC;   // may be null
  const float* factors_E;    // may be null
  int64_t C;
  int64_t columns;  // number of elements of H that share a scale
};

// The scales of a layer of codes.
struct Quantized {
  int32_t code;    // Code
  int32_t scale;   // dtype: Scale
  int32_t factor;  // Factor
  ScaleTable tables[3];  // gate (if there is one), up, down (if it has codes)

  enum Scale { kFloat32, kBFloat16, kFloat16, kE8M0, kE4M3Scale };
  enum Factor { kNone, kTimes, kOver };

  int bits() const { return code == kE4M3 ? 8 : 4; }
  bool zeros() const { return tables[1].zeros_GC; }
  int64_t table_columns() const { return (zeros() ? 2 : 1) * kPanelColumns; }
};

// Scales of one byte, and how to load a vector of them.
struct E8M0 {
  uint8_t bits;
};
struct E4M3 {
  uint8_t bits;
};
inline Vec load_floats(const E8M0* from) {
  // A power of two; the smallest is a denormal float.
  return as_floats(at::vec::maximum(load_bytes(&from->bits) << Ints(23), Ints(1 << 22)));
}
inline Vec load_floats(const E4M3* from) {
  return meanings_of_8(&from->bits) * Vec(kMeaningUnit[kE4M3]);
}

// Pads `count` numbers with zeros to a vector, if they are fewer.
template <class Number>
const Number* padded(const Number* from, int64_t count, Number (&copy)[kWidth]) {
  if (count >= kWidth) [[likely]]
    return from;
  std::fill(std::copy_n(from, count, copy), copy + kWidth, Number());
  return copy;
}

// Codes times `scales`, plus `minus_zeros`, for a vector of columns.
struct ScalesAndZeros {
  Vec scales, minus_zeros;
};

// Reads the scales of one projection of one expert; their type is known at compile time.
template <class Number>
struct ScaleReader {
  const Number* scales_GC;
  const uint8_t* zeros_GC;
  int64_t C;
  int factor_is;
  float factor, unit;

  // Loads up to a vector of columns of one row.
  [[gnu::always_inline]] ScalesAndZeros load(int64_t row, int64_t column, int64_t count) const {
    const int64_t at = row * C + column;
    Number copy[kWidth];
    Vec scales = load_floats(padded(scales_GC + at, count, copy));
    if (factor_is == Quantized::kTimes) scales = scales * Vec(factor);
    if (factor_is == Quantized::kOver) scales = scales / Vec(factor);
    scales = scales * Vec(unit);
    if (!zeros_GC) return {scales, Vec(0.f)};
    uint8_t bytes[kWidth];
    const Ints zeros = load_bytes(padded(zeros_GC + at, count, bytes));
    return {scales, at::vec::convert_to_fp_of_same_size<float>(zeros).neg() * scales};
  }
};

// Calls `body` with a reader of one projection's scales. It passes the reader by value, since
// compilers would otherwise reload it after every write; the same goes for anything else that loops
// need.
template <class Body>
void with_scales(const Quantized& of, const ScaleTable& table, int64_t expert, Body body) {
  const auto call = [&](auto number) {
    using Number = decltype(number);
    body(ScaleReader<Number>{static_cast<const Number*>(table.scales_GC), table.zeros_GC, table.C,
                             of.factor, table.factors_E ? table.factors_E[expert] : 1,
                             kMeaningUnit[of.code]});
  };
  switch (of.scale) {
    case Quantized::kFloat32:
      return call(float());
    case Quantized::kBFloat16:
      return call(c10::BFloat16());
    case Quantized::kFloat16:
      return call(c10::Half());
    case Quantized::kE8M0:
      return call(E8M0());
    case Quantized::kE4M3Scale:
      return call(E4M3());
  }
}

// Fills the table of one side of a tile: a row per C, with the scales of `atoms` packed rows from
// `first` on. Rows and columns are rounded up to whole vectors, all written from `to` on.
inline void fill_side(const Quantized& of, const ScaleTable& table, int64_t expert, int64_t first,
                      int64_t atoms, int64_t end, float* to) {
  const int64_t stride = of.table_columns();
  const int16_t* rows_P = table.rows_P;
  const int64_t first_row = rows_P ? table.firsts_E[expert] : 0;
  with_scales(of, table, expert, [=](const auto reader) {
    for (int64_t atom = 0; atom < atoms; atom += kWidth) {
      int64_t rows[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        const int64_t packed = std::min(first + atom + i, end - 1);  // padding repeats the last
        rows[i] = rows_P ? first_row + rows_P[packed] : packed;
      }
      for (int64_t column = 0; column < reader.C; column += kWidth) {
        const auto load = [&](int i) { return reader.load(rows[i], column, reader.C - column); };
        float* corner = to + column * stride + atom;
        transpose([&](int i) { return load(i).scales; }, corner, stride);
        if (reader.zeros_GC)
          transpose([&](int i) { return load(i).minus_zeros; }, corner + kPanelColumns, stride);
      }
    }
  });
}

// Prefetches the memory that `fill_down` reads: short pieces far apart, which hardware prefetchers
// miss. It goes to L2, since at such distances the pieces often compete for few sets of L1.
// Inlined, since compilers drop a call without effects.
[[gnu::always_inline]] inline void prefetch_down(const Quantized& of, int64_t first_row, int64_t count, int64_t column) {
  const ScaleTable& table = of.tables[2];
  static constexpr int kBytes[] = {4, 2, 2, 1, 1};  // by Quantized::Scale
  const int bytes = kBytes[of.scale];
  const auto* from = static_cast<const char*>(table.scales_GC);
  for (int64_t row = first_row; row < first_row + count; ++row) {
    const char* at = from + (row * table.C + column / table.columns) * bytes;
    __builtin_prefetch(at, 0, 2);
    if (table.columns == 1 && bytes > 1) __builtin_prefetch(at + 64, 0, 2);
  }
}

// Fills the table of 64 columns of down from `column` on: one row for each of `count` scale rows.
inline void fill_down(const Quantized& of, int64_t expert, int64_t first_row, int64_t count,
                      int64_t column, int64_t H, float* to) {
  const int64_t stride = of.table_columns(), end = std::min<int64_t>(H, column + kPanelColumns);
  const int64_t per_scale = of.tables[2].columns;
  with_scales(of, of.tables[2], expert, [=, to = to](const auto reader) mutable {
    for (int64_t row = first_row; row < first_row + count; ++row, to += stride) {
      if (per_scale == 1) {
        for (int64_t j = column; j < end; j += kWidth) {
          const auto loaded = reader.load(row, j, end - j);
          loaded.scales.store(to + j - column);
          if (reader.zeros_GC) loaded.minus_zeros.store(to + kPanelColumns + j - column);
        }
        continue;
      }
      for (int64_t c = column / per_scale; c * per_scale < end; ++c) {
        const auto loaded = reader.load(row, c, 1);
        alignas(64) float scale[kWidth], minus_zero[kWidth];
        loaded.scales.store(scale), loaded.minus_zeros.store(minus_zero);
        for (int64_t j = std::max(column, c * per_scale); j < std::min(end, (c + 1) * per_scale);
             ++j) {
          to[j - column] = scale[0];
          if (reader.zeros_GC) to[kPanelColumns + j - column] = minus_zero[0];
        }
      }
    }
  });
}

}  // namespace
