// Rows times panels of weights, for x86 with AVX-512 (and AMX where it is compiled in): the inner
// loops of cpu_experts.cpp. The compiler's macros (__AVX512BF16__, __AMX_BF16__) say which variant
// this is.
//
// A *unit* is 32 bits: two bfloat16 that follow each other along the summed dimension, or one
// float32. A *panel* multiplies a row by up to 64 columns, which are two halves of up to 32. Its
// layout is [units of the summed dimension][columns], so that one step is one broadcast unit of the
// row times 256 consecutive bytes.
//
// Everything has internal linkage: the variants may be loaded into one process.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

namespace {

using Unit = uint32_t;

constexpr int kPanelColumns = 64;
constexpr int kAmxRows = 16;
constexpr int kAmxUnits = 16;  // of the summed dimension in one AMX tile

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

__mmask16 lanes(int64_t count) {
  return static_cast<__mmask16>((1u << std::clamp<int64_t>(count, 0, 16)) - 1);
}

// ---- element types ------------------------------------------------------------------------------

struct Float32 {
  using Element = float;
  static constexpr int kPerUnit = 1;
  static constexpr int kRows = 6;  // 24 sums, 4 registers of weights, 1 of activations

  static __m512 multiply_add(__m512 sum, Unit x, __m512i weights) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_set1_epi32(x)), _mm512_castsi512_ps(weights),
                           sum);
  }
  static void store(Element* to, __m512 value, __mmask16 mask) {
    _mm512_mask_storeu_ps(to, mask, value);
  }
};

struct BFloat16 {
  using Element = uint16_t;
  static constexpr int kPerUnit = 2;
#ifdef __AVX512BF16__
  static constexpr int kRows = 6;

  static __m512 multiply_add(__m512 sum, Unit x, __m512i weights) {
    return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_set1_epi32(x), (__m512bh)weights);
  }
#else
  static constexpr int kRows = 4;  // both halves of every unit need registers

  static __m512 multiply_add(__m512 sum, Unit x, __m512i weights) {
    const __m512i xs = _mm512_set1_epi32(x), top = _mm512_set1_epi32(0xffff0000);
    sum = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(xs, 16)),
                          _mm512_castsi512_ps(_mm512_slli_epi32(weights, 16)), sum);
    return _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(xs, top)),
                           _mm512_castsi512_ps(_mm512_and_si512(weights, top)), sum);
  }
#endif
  // Round to nearest even; a NaN stays one.
  static void store(Element* to, __m512 value, __mmask16 mask) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i rounded = _mm512_srli_epi32(
        _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd), 16);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    rounded = _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc0));
    _mm512_mask_cvtepi32_storeu_epi16(to, mask, rounded);
  }
};

// ---- rows times a panel -------------------------------------------------------------------------

// One panel, or a stretch of its summed dimension.
struct Panel {
  const Unit* units;
  int64_t steps;
  int half;  // columns in each half
};

// Products of R rows, [R][64] floats, the second half from column 32.
template <class D, int R>
void multiply_rows(const Unit* const* rows, const Panel& panel, float* product) {
  const __mmask16 first = lanes(panel.half), second = lanes(panel.half - 16);
  const int64_t stride = 2 * panel.half;
  const Unit* units = panel.units;
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_setzero_ps();
  for (int64_t step = 0; step < panel.steps; ++step, units += stride) {
    const __m512i weights[4] = {_mm512_maskz_loadu_epi32(first, units),
                                _mm512_maskz_loadu_epi32(second, units + 16),
                                _mm512_maskz_loadu_epi32(first, units + panel.half),
                                _mm512_maskz_loadu_epi32(second, units + panel.half + 16)};
    // Unrolled here, early, or the sums would go through the stack.
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = D::multiply_add(sum[r][j], rows[r][step], weights[j]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(product + r * kPanelColumns + 16 * j, sum[r][j]);
}

#ifdef __AMX_BF16__

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's AMX intrinsics do not say what memory they read: what was written there must be, by now.
inline void finish_writing(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// The same for up to 16 bfloat16 rows at equal distances. Tiles: 0-3 products, 4 rows, 5-7 weights.
void multiply_rows_amx(const Unit* const* rows, int count, const Panel& panel, float* product) {
  const int columns[2] = {std::min(panel.half, 16), panel.half - std::min(panel.half, 16)};
  const bool wide = columns[1] > 0;
  TileConfig config;
  const auto shape = [&](int tile, int tile_rows, int units) {
    config.rows[tile] = units ? tile_rows : 0;
    config.row_bytes[tile] = 4 * units;
  };
  for (int tile : {0, 1, 2, 3}) shape(tile, count, columns[tile % 2]);
  shape(4, count, kAmxUnits);
  for (int tile : {5, 6, 7}) shape(tile, kAmxUnits, columns[tile == 6]);
  finish_writing(&config);
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(2);
  if (wide) {
    _tile_zero(1);
    _tile_zero(3);
  }
  const auto step = [&](const Unit* row, int64_t row_stride, const Unit* weights) {
    const int64_t stride = 4 * 2 * panel.half;
    _tile_loadd(4, row, row_stride);
    _tile_loadd(5, weights, stride);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(7, weights + panel.half, stride);
    _tile_dpbf16ps(2, 4, 7);
    if (!wide) return;
    _tile_loadd(6, weights + 16, stride);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(6, weights + panel.half + 16, stride);
    _tile_dpbf16ps(3, 4, 6);
  };
  const int64_t row_stride = count > 1 ? 4 * (rows[1] - rows[0]) : 4 * kAmxUnits;
  const int64_t whole = panel.steps / kAmxUnits * kAmxUnits, rest = panel.steps - whole;
  for (int64_t at = 0; at < whole; at += kAmxUnits)
    step(rows[0] + at, row_stride, panel.units + at * 2 * panel.half);
  if (rest) {  // padded with zeros: beyond the rows and the panel lies other data
    alignas(64) Unit padded_rows[kAmxRows * kAmxUnits] = {}, padded[kAmxUnits * kPanelColumns] = {};
    for (int r = 0; r < count; ++r)
      std::memcpy(padded_rows + r * kAmxUnits, rows[r] + whole, 4 * rest);
    std::memcpy(padded, panel.units + whole * 2 * panel.half, 4 * rest * 2 * panel.half);
    finish_writing(padded_rows);
    finish_writing(padded);
    step(padded_rows, 4 * kAmxUnits, padded);
  }
  const int64_t stride = sizeof(float) * kPanelColumns;
  _tile_stored(0, product, stride);
  _tile_stored(2, product + 32, stride);
  if (wide) {
    _tile_stored(1, product + 16, stride);
    _tile_stored(3, product + 48, stride);
  }
  _tile_release();
}

#endif

#ifdef __AMX_BF16__
template <class D>
constexpr bool kUsesAmx = std::is_same_v<D, BFloat16>;
#else
template <class D>
constexpr bool kUsesAmx = false;
#endif

// How many rows one product takes at most: AMX needs some to be worth its set-up. It sums in
// another order, so this must depend on nothing but the routing.
template <class D>
int rows_at_once(int64_t rows_of_expert) {
  return kUsesAmx<D> && rows_of_expert > 4 ? kAmxRows : D::kRows;
}

template <class D>
void multiply(const Unit* const* rows, int count, [[maybe_unused]] int at_once, const Panel& panel,
              float* product) {
#ifdef __AMX_BF16__
  if (at_once == kAmxRows) return multiply_rows_amx(rows, count, panel, product);
#endif
  static_assert(D::kRows <= 6);
  switch (count) {
    case 1:
      return multiply_rows<D, 1>(rows, panel, product);
    case 2:
      return multiply_rows<D, 2>(rows, panel, product);
    case 3:
      return multiply_rows<D, 3>(rows, panel, product);
    case 4:
      return multiply_rows<D, 4>(rows, panel, product);
    case 5:
      return multiply_rows<D, 5>(rows, panel, product);
    case 6:
      return multiply_rows<D, 6>(rows, panel, product);
  }
}

// Calls body(first, count) for rows begin..end in blocks of nearly equal size.
template <class Body>
void for_row_blocks(int64_t begin, int64_t end, int at_once, const Body& body) {
  const int64_t blocks = ceil_div(end - begin, at_once);
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t first = begin + (end - begin) * block / blocks;
    body(first, static_cast<int>(begin + (end - begin) * (block + 1) / blocks - first));
  }
}

}  // namespace
