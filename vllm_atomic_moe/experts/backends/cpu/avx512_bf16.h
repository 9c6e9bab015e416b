// bfloat16 with the AVX-512 dot product of pairs: rows stay bfloat16.

#pragma once

#include <immintrin.h>

#include <array>

#include "vectors.h"

namespace {

struct PairedBFloat16 {
  using Element = c10::BFloat16;
  using Unit = uint32_t;
  using Row = c10::BFloat16;
  using Scales = NoScales;
  static constexpr int kPerUnit = 2;
  static constexpr int kAhead = 0;
  static constexpr int kConstants = 0;

  template <int R, int J>
  [[gnu::always_inline]] static void add_step(Native (&sum)[R][J], const Row* const* rows, int64_t at,
                                              const Unit* units, NoScales) {
    __m512i weights[J];
#pragma GCC unroll 4
    for (int j = 0; j < J; ++j) weights[j] = _mm512_loadu_si512(units + j * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, rows[r] + at, sizeof pair);
#pragma GCC unroll 4
      for (int j = 0; j < J; ++j)
        sum[r][j] = _mm512_dpbf16_ps(sum[r][j], (__m512bh)_mm512_set1_epi32(pair),
                                     (__m512bh)weights[j]);
    }
  }
  static void store_unit(Unit* to, const Vec& low, const Vec& high) {
    const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    alignas(64) static constexpr auto kInterleaved = [] {
      std::array<uint16_t, 32> places{};
      for (int i = 0; i < 32; ++i) places[i] = i / 2 + i % 2 * 16;
      return places;
    }();
    const __m512i places = _mm512_load_si512(kInterleaved.data());
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(places, halves));
  }
};

inline void store_row(c10::BFloat16* to, const Vec& value) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(value));
}

}  // namespace
