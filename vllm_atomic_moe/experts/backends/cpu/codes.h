// Panels of codes: weights of 8 or 4 bits, decoded in registers or into units of a type in
// panels.h.
//
// A unit is one byte: one code of 8 bits, or two of 4 bits, adjacent along the summed dimension,
// the first in the low half. A weight is the meaning of its code times a scale. A panel has a table
// of scales with one number per column; every element of the summed dimension uses one of its rows.

#pragma once

#include <array>
#include <bit>

#include "panels.h"

namespace {

// Numbered as in Python: formats.CODES without `plain`.
enum Code { kE4M3, kInt4, kUInt4, kE2M1 };

// Meanings of the 16 codes of 4 bits, as the two bytes of a bfloat16, which represents all exactly.
struct MeaningsOf4 {
  alignas(16) uint8_t low[16] = {}, high[16] = {};

  constexpr MeaningsOf4() = default;
  constexpr MeaningsOf4(const std::array<float, 16>& meanings) {
    for (int code = 0; code < 16; ++code) {
      low[code] = std::bit_cast<uint32_t>(meanings[code]) >> 16;
      high[code] = std::bit_cast<uint32_t>(meanings[code]) >> 24;
    }
  }
};
constexpr MeaningsOf4 kMeanings[4] = {
    {},
    {{-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7}},
    {{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}},
    {{0, 0.5f, 1, 1.5f, 2, 3, 4, 6, -0.f, -0.5f, -1, -1.5f, -2, -3, -4, -6}},
};
// Factors for the scales: e4m3 codes are read as float16, which makes them smaller by 2^8.
constexpr float kMeaningUnit[4] = {256, 1, 1, 1};

// ---- specific to instruction sets ---------------------------------------------------------------

// Loads one byte per lane, as integers.
inline Ints load_bytes(const uint8_t* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
#else
  uint32_t four;
  std::memcpy(&four, from, 4);
  return vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(vmovl_u8(vcreate_u8(four)))));
#endif
}

// Loads one number per lane, as floats; reads no bytes beyond them.
inline Vec load_floats(const float* from) { return Vec::loadu(from); }
inline Vec load_floats(const c10::BFloat16* from) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
#else
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from)), 16));
#endif
}
inline Vec load_floats(const c10::Half* from) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(from))));
#endif
}

// Reads e4m3 codes as float16 with the same bits in the same places. Its denormals work even if the
// processor flushes those of float32 to zero.
[[gnu::always_inline]] inline Vec meanings_of_8(const uint8_t* codes) {
#if defined(CPU_CAPABILITY_AVX512)
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
  return _mm512_cvtph_ps(
      _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(int16_t(0xbfff))));
#elif defined(CPU_CAPABILITY_AVX2)
  const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
  return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(int16_t(0xbfff))));
#else
  uint32_t four;
  std::memcpy(&four, codes, 4);
  const int16x4_t wide = vget_low_s16(vmovl_s8(vcreate_s8(four)));
  return vcvt_f32_f16(vreinterpret_f16_s16(vand_s16(vshl_n_s16(wide, 7), vdup_n_s16(0xbfff))));
#endif
}

// Calls use(0, j, meanings) for J vectors of columns.
template <int J, class Use>
[[gnu::always_inline]] inline void each_of_8(const uint8_t* codes, const Use& use) {
#if defined(CPU_CAPABILITY_AVX2)
#pragma GCC unroll 2
  for (int first = 0; first < J; first += 4) {
    const __m256i bytes =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + first * kWidth));
#pragma GCC unroll 2
    for (int odd = 0; odd < 2; ++odd) {
      const int j = first + odd;
      if (j >= J) break;
      // Unpacking works within 16 bytes, so its two results are two vectors apart.
      const __m256i words = odd ? _mm256_unpackhi_epi8(_mm256_setzero_si256(), bytes)
                                : _mm256_unpacklo_epi8(_mm256_setzero_si256(), bytes);
      const __m256i halves =
          _mm256_and_si256(_mm256_srai_epi16(words, 1), _mm256_set1_epi16(int16_t(0xbf80)));
      use(0, j, Vec(_mm256_cvtph_ps(_mm256_castsi256_si128(halves))));
      if (j + 2 < J) use(0, j + 2, Vec(_mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))));
    }
  }
#else
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) use(0, j, meanings_of_8(codes + j * kWidth));
#endif
}

// Calls use(i, j, meanings) for J vectors of columns: i is 0 for the low halves of bytes, then 1
// for the high halves.
#if defined(CPU_CAPABILITY_AVX512)
using Meanings = __m512;
inline Meanings load_meanings(const MeaningsOf4& from) {
  const __m512i low = load_bytes(from.low), high = load_bytes(from.high);
  return _mm512_castsi512_ps(
      _mm512_or_si512(_mm512_slli_epi32(low, 16), _mm512_slli_epi32(high, 24)));
}
template <int J, class Use>
[[gnu::always_inline]] inline void each_of_4(Meanings meanings, const uint8_t* codes,
                                             const Use& use) {
#pragma GCC unroll 4
  for (int j = 0; j < J; ++j) {
    const __m512i places = load_bytes(codes + j * kWidth);  // only the four lowest bits count
    use(0, j, Vec(_mm512_permutexvar_ps(places, meanings)));
    use(1, j, Vec(_mm512_permutexvar_ps(_mm512_srli_epi32(places, 4), meanings)));
  }
}
#elif defined(CPU_CAPABILITY_AVX2)
struct Meanings {
  __m256i low, high;
};
inline Meanings load_meanings(const MeaningsOf4& from) {
  const auto twice = [](const uint8_t* bytes) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(bytes)));
  };
  return {twice(from.low), twice(from.high)};
}
template <int J, class Use>
[[gnu::always_inline]] inline void each_of_4(const Meanings& meanings, const uint8_t* codes,
                                             const Use& use) {
#pragma GCC unroll 2
  for (int first = 0; first < J; first += 4) {
    // Put columns c and c + 8 side by side, so that adjacent bfloat16 belong to different vectors.
    __m256i bytes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + first * kWidth));
    bytes = _mm256_permutevar8x32_epi32(bytes, _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7));
    bytes = _mm256_shuffle_epi8(bytes, _mm256_broadcastsi128_si256(_mm_setr_epi8(
                                           0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15)));
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const __m256i places =
          _mm256_and_si256(i ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
      const __m256i low = _mm256_shuffle_epi8(meanings.low, places);
      const __m256i high = _mm256_shuffle_epi8(meanings.high, places);
#pragma GCC unroll 2
      for (int late = 0; late < 2; ++late) {
        const int j = first + 2 * late;
        if (j >= J) break;
        const __m256i two =
            late ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
        use(i, j, Vec(_mm256_castsi256_ps(_mm256_slli_epi32(two, 16))));
        if (j + 1 < J)
          use(i, j + 1, Vec(_mm256_castsi256_ps(
                            _mm256_and_si256(two, _mm256_set1_epi32(int32_t(0xffff0000))))));
      }
    }
  }
}
#else
struct Meanings {
  uint8x16_t low, high;
};
inline Meanings load_meanings(const MeaningsOf4& from) {
  return {vld1q_u8(from.low), vld1q_u8(from.high)};
}
template <int J, class Use>
[[gnu::always_inline]] inline void each_of_4(const Meanings& meanings, const uint8_t* codes,
                                             const Use& use) {
#pragma GCC unroll 16
  for (int j = 0; j < J; ++j) {
    uint32_t four;
    std::memcpy(&four, codes + j * kWidth, 4);
    const uint8x8_t bytes = vcreate_u8(four);
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const uint8x8_t places = i ? vshr_n_u8(bytes, 4) : vand_u8(bytes, vdup_n_u8(15));
      const uint8x8_t halves =
          vzip1_u8(vqtbl1_u8(meanings.low, places), vqtbl1_u8(meanings.high, places));
      use(i, j, Vec(vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(halves), 16))));
    }
  }
}
#endif

// ---- codes as an element type -------------------------------------------------------------------

// The scales of a panel of codes.
struct TableScales {
  const float* table;           // [rows][kPanelColumns]; with zeros twice as wide, −zero·scale last
  const int32_t* rows;          // the table row of every element of the summed dimension
  const MeaningsOf4* meanings;  // of codes of 4 bits

  TableScales from(int64_t column) const { return {table + column, rows, meanings}; }
};

// An element type (see panels.h) whose steps decode in registers; rows may have any type.
template <class AnyRow, int kBits, bool kZeros>
struct Codes {
  using Element = uint8_t;  // one code, before packing
  using Unit = uint8_t;
  using Row = AnyRow;
  using Scales = TableScales;
  static constexpr int kPerUnit = 8 / kBits;
  static constexpr int kAhead = kAheadBytes;
  static constexpr int kConstants = 0;
  static constexpr int kTableColumns = (kZeros ? 2 : 1) * kPanelColumns;

  // Calls use(i, j, weights) for J vectors of columns of each element `at` + i in `units`.
  template <int J, class Use>
  [[gnu::always_inline]] static void each_weight(int64_t at, const Unit* units,
                                                 const Scales& scales, const Meanings& meanings,
                                                 const Use& use) {
    const float* tables[kPerUnit];
#pragma GCC unroll 2
    for (int i = 0; i < kPerUnit; ++i)
      tables[i] = scales.table + scales.rows[at + i] * kTableColumns;
    const auto scaled = [&](int i, int j, const Vec& meaning) {
      const Vec scale = Vec::loadu(tables[i] + j * kWidth);
      if constexpr (kZeros)
        use(i, j, fmadd(meaning, scale, Vec::loadu(tables[i] + kPanelColumns + j * kWidth)));
      else
        use(i, j, meaning * scale);
    };
    if constexpr (kBits == 8)
      each_of_8<J>(units, scaled);
    else
      each_of_4<J>(meanings, units, scaled);
  }

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows,
                                              int64_t at, const Unit* units,
                                              const Scales& scales) {
    const Meanings meanings = load_meanings(*scales.meanings);
    each_weight<J>(at, units, scales, meanings, [&](int i, int j, const Vec& weights) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        sum[r][j] = fmadd(Vec(as_float(rows[r][at + i])), weights, Vec(sum[r][j]));
    });
  }
};

// Decodes J vectors of columns of a panel of codes into units of D. Takes everything by value,
// since a compiler would otherwise assume that the writes may change the panel.
template <class D, int J, class C>
void decode_vectors(const Panel<C> panel, typename D::Unit* to, const int64_t stride) {
  constexpr int kElements = std::max(C::kPerUnit, D::kPerUnit);
  const auto* units = panel.units;
  const Meanings meanings = load_meanings(*panel.scales.meanings);
  for (int64_t at = 0; at < panel.steps * C::kPerUnit; at += kElements) {
    Native weights[D::kPerUnit][J];
    for (int i = 0; i < kElements; i += C::kPerUnit, units += panel.columns) {
#pragma GCC unroll 4
      for (int line = 0; line < J * kWidth; line += 64)
        __builtin_prefetch(units + line + kAheadBytes);
      C::template each_weight<J>(
          at + i, units, panel.scales, meanings, [&](int k, int j, const Vec& weight) {
            if constexpr (D::kPerUnit == 1)
              D::store_unit(to + k * stride + j * kWidth, weight);
            else
              weights[i + k][j] = weight;
          });
    }
    if constexpr (D::kPerUnit == 2)
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j)
        D::store_unit(to + j * kWidth, Vec(weights[0][j]), Vec(weights[1][j]));
    to += kElements / D::kPerUnit * stride;
  }
}

// Decodes a panel of codes into units of D. Columns are rounded up to whole vectors, all written.
template <class D, class C>
void decode(const Panel<C>& panel, typename D::Unit* to) {
  if (panel.columns == kPanelColumns)
    return decode_vectors<D, kPanelColumns / kWidth>(panel, to, kPanelColumns);
  const int64_t wide = round_up(panel.columns, kWidth);
  for (int64_t column = 0; column < wide; column += kWidth)
    decode_vectors<D, 1>(Panel<C>{panel.units + column, panel.steps, panel.columns,
                                  panel.scales.from(column)},
                         to + column, wide);
}

}  // namespace
