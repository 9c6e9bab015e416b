// Panels of codes: weights of 8 or 4 bits, decoded in registers or into units of a type of panels.h.
//
// A unit is one byte: one code of 8 bits, or two of 4 bits that follow each other along the summed
// dimension, the first the low one. A weight is the meaning of its code times a scale, of which a
// panel has a table: rows of one number a column. Every step of the summed dimension has its row.

#pragma once

#include "panels.h"

namespace {

// By the number that Python gives them: formats.CODES without plain ones.
enum Code { kE4M3, kInt4, kUInt4, kE2M1 };

// Of a 4-bit code. Half of e2m1's values are not integers, so they are doubled.
alignas(16) constexpr int8_t kMeanings[4][16] = {
    {},
    {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7},
    {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15},
    {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12},
};
// By which scales are multiplied in turn; e4m3 is read as float16, which is smaller by 2^8.
constexpr float kMeaningUnit[4] = {256, 1, 1, 0.5f};

// ---- what instruction sets do in their own way --------------------------------------------------

// As many bytes as a vector has lanes, as integers.
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

// As many floats as a vector has lanes, and no more bytes than these.
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

// e4m3 codes, as float16 that has the same bits in the same places. It knows denormals, whatever the
// processor is told to do with those of float32.
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

// 16 meanings of codes of 4 bits in a register, and what the low or the high halves of bytes mean.
#if defined(CPU_CAPABILITY_AVX512)
using Meanings = __m512;
inline Meanings load_meanings(const int8_t* from) {
  return _mm512_cvtepi32_ps(
      _mm512_cvtepi8_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(from))));
}
[[gnu::always_inline]] inline Vec meanings_of_4(Meanings meanings, const uint8_t* codes, bool high) {
  __m512i places = load_bytes(codes);  // of which the four lowest bits count
  if (high) places = _mm512_srli_epi32(places, 4);
  return _mm512_permutexvar_ps(places, meanings);
}
#elif defined(CPU_CAPABILITY_AVX2)
using Meanings = __m128i;
inline Meanings load_meanings(const int8_t* from) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(from));
}
[[gnu::always_inline]] inline Vec meanings_of_4(Meanings meanings, const uint8_t* codes, bool high) {
  __m128i places = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes));
  if (high) places = _mm_srli_epi16(places, 4);
  places = _mm_and_si128(places, _mm_set1_epi8(15));
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(meanings, places)));
}
#else
using Meanings = int8x16_t;
inline Meanings load_meanings(const int8_t* from) { return vld1q_s8(from); }
[[gnu::always_inline]] inline Vec meanings_of_4(Meanings meanings, const uint8_t* codes, bool high) {
  uint32_t four;
  std::memcpy(&four, codes, 4);
  uint8x8_t places = vcreate_u8(four);
  places = high ? vshr_n_u8(places, 4) : vand_u8(places, vdup_n_u8(15));
  return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vqtbl1_s8(meanings, places)))));
}
#endif

// ---- codes as an element type -------------------------------------------------------------------

// What a panel of codes has beside them.
struct TableScales {
  const float* table;      // [rows][kPanelColumns], or twice as wide with −zero·scale behind
  const int32_t* rows;     // of every element of the summed dimension, its row of the table
  const int8_t* meanings;  // of 4 bits

  TableScales from(int64_t column) const { return {table + column, rows, meanings}; }
};

// Codes as a type whose steps decode in registers; rows of any type. See panels.h.
template <class AnyRow, int kBits, bool kZeros>
struct Codes {
  using Element = uint8_t;  // before they are packed
  using Unit = uint8_t;
  using Row = AnyRow;
  using Scales = TableScales;
  static constexpr int kPerUnit = 8 / kBits;
  static constexpr int kAhead = kAheadBytes;
  static constexpr int kTableColumns = (kZeros ? 2 : 1) * kPanelColumns;

  // Weights of element `at`, which is in `units`.
  [[gnu::always_inline]] static Vec weights(const float* table_row, Meanings meanings, bool high,
                                            const Unit* units) {
    Vec meaning;
    if constexpr (kBits == 8)
      meaning = meanings_of_8(units);
    else
      meaning = meanings_of_4(meanings, units, high);
    const Vec scale = Vec::loadu(table_row);
    if constexpr (kZeros) return fmadd(meaning, scale, Vec::loadu(table_row + kPanelColumns));
    return meaning * scale;
  }

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows,
                                              int64_t at, const Unit* units,
                                              const Scales& scales) {
    const Meanings meanings = load_meanings(scales.meanings);
#pragma GCC unroll 2
    for (int i = 0; i < kPerUnit; ++i) {
      const float* table_row = scales.table + scales.rows[at + i] * kTableColumns;
      add_products(sum, rows, at + i, [&](int j) {
        return weights(table_row + j * kWidth, meanings, i, units + j * kWidth);
      });
    }
  }
};

// A panel of codes as units of D, with whole vectors of columns. Reads and writes as far as these.
// Everything by value: what is written might otherwise be the panel itself, for all a compiler knows.
template <class D, class C>
void decode(const Panel<C> panel, typename D::Unit* to) {
  const int64_t wide = round_up(panel.columns, kWidth);
  const int64_t elements = panel.steps * C::kPerUnit;
  const Meanings meanings = load_meanings(panel.scales.meanings);
  const auto units_of = [=](int64_t at) { return panel.units + at / C::kPerUnit * panel.columns; };
  const auto table_of = [=](int64_t at) {
    return panel.scales.table + panel.scales.rows[at] * C::kTableColumns;
  };
  for (int64_t at = 0; at < elements; at += D::kPerUnit, to += wide) {
    const auto *low = units_of(at), *high = units_of(at + D::kPerUnit - 1);
    const float *low_table = table_of(at), *high_table = table_of(at + D::kPerUnit - 1);
    for (const uint8_t* line = low; line < high + wide; line += 64)
      __builtin_prefetch(line + kAheadBytes);
#pragma GCC unroll 4
    for (int64_t column = 0; column < wide; column += kWidth) {
      const auto weights = [&](const float* table, bool second, const uint8_t* units) {
        return C::weights(table + column, meanings, second, units + column);
      };
      if constexpr (D::kPerUnit == 2)
        D::store_unit(to + column, weights(low_table, false, low), weights(high_table, true, high));
      else
        D::store_unit(to + column, weights(low_table, at % C::kPerUnit, low));
    }
  }
}

}  // namespace
