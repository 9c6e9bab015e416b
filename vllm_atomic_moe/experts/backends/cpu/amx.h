// Up to 16 bfloat16 rows times a panel, with AMX.

#pragma once

#include <immintrin.h>

#include "panels.h"

namespace {

constexpr int kAmxRows = 16;
constexpr int kAmxUnits = 16;  // units of the summed dimension in one tile

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// GCC's AMX intrinsics do not declare the memory that they read: finish earlier writes to it.
inline void finish_writing(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

// As `multiply`, for up to 16 rows at equal distances. Tiles 0-3 hold products of 16 columns each,
// tile 4 rows, tiles 5-6 weights of whole groups of columns, tile 7 those of the last group, which
// may be narrower.
void multiply_amx(const c10::BFloat16* const* rows, int count, const Panel<BFloat16>& panel,
                  float* product, bool fresh) {
  const int last = ceil_div(panel.columns, 16) - 1;
  TileConfig config;
  const auto shape = [&](int tile, int tile_rows, int units) {
    config.rows[tile] = units ? tile_rows : 0;
    config.row_bytes[tile] = 4 * units;
  };
  const int narrow = panel.columns - 16 * last, whole_columns = last ? 16 : 0;
  for (int group = 0; group <= last; ++group) shape(group, count, group < last ? 16 : narrow);
  shape(4, count, kAmxUnits);
  shape(5, kAmxUnits, whole_columns);
  shape(6, kAmxUnits, whole_columns);
  shape(7, kAmxUnits, narrow);
  finish_writing(&config);
  finish_writing(panel.units);  // they may be freshly decoded
  _tile_loadconfig(&config);
  // Tile numbers are part of the instructions, so they must be constants.
  const auto each_group = [&](const auto& zero, const auto& one, const auto& two,
                              const auto& three) {
    zero();
    if (last > 0) one();
    if (last > 1) two();
    if (last > 2) three();
  };
  constexpr int64_t kStride = sizeof(float) * kPanelColumns;
  if (fresh) {
    each_group([] { _tile_zero(0); }, [] { _tile_zero(1); }, [] { _tile_zero(2); },
               [] { _tile_zero(3); });
  } else {
    finish_writing(product);
    each_group([&] { _tile_loadd(0, product, kStride); },
               [&] { _tile_loadd(1, product + 16, kStride); },
               [&] { _tile_loadd(2, product + 32, kStride); },
               [&] { _tile_loadd(3, product + 48, kStride); });
  }
  const auto step = [&](const void* row, int64_t row_stride, const uint32_t* units) {
    const int64_t stride = 4 * panel.columns;
    _tile_loadd(4, row, row_stride);
    if (last > 0) {
      _tile_loadd(5, units, stride);
      _tile_dpbf16ps(0, 4, 5);
    }
    if (last > 1) {
      _tile_loadd(6, units + 16, stride);
      _tile_dpbf16ps(1, 4, 6);
    }
    if (last > 2) {
      _tile_loadd(5, units + 32, stride);
      _tile_dpbf16ps(2, 4, 5);
    }
    _tile_loadd(7, units + 16 * last, stride);
    // Some compilers define these as macros, which must be statements.
    switch (last) {
      case 0:
        _tile_dpbf16ps(0, 4, 7);
        break;
      case 1:
        _tile_dpbf16ps(1, 4, 7);
        break;
      case 2:
        _tile_dpbf16ps(2, 4, 7);
        break;
      case 3:
        _tile_dpbf16ps(3, 4, 7);
    }
  };
  const int64_t row_stride = count > 1 ? 2 * (rows[1] - rows[0]) : 4 * kAmxUnits;
  const int64_t whole = panel.steps / kAmxUnits * kAmxUnits, rest = panel.steps - whole;
  for (int64_t at = 0; at < whole; at += kAmxUnits)
    step(rows[0] + 2 * at, row_stride, panel.units + at * panel.columns);
  if (rest) {  // pad with zeros, since other data follows the rows and the panel
    alignas(64) uint32_t padded_rows[kAmxRows * kAmxUnits] = {},
                         padded[kAmxUnits * kPanelColumns] = {};
    for (int r = 0; r < count; ++r)
      std::memcpy(padded_rows + r * kAmxUnits, rows[r] + 2 * whole, 4 * rest);
    std::memcpy(padded, panel.units + whole * panel.columns, 4 * rest * panel.columns);
    finish_writing(padded_rows);
    finish_writing(padded);
    step(padded_rows, 4 * kAmxUnits, padded);
  }
  each_group([&] { _tile_stored(0, product, kStride); },
             [&] { _tile_stored(1, product + 16, kStride); },
             [&] { _tile_stored(2, product + 32, kStride); },
             [&] { _tile_stored(3, product + 48, kStride); });
  _tile_release();
}

}  // namespace
