// The AMX instructions that experts.cpp uses, in plain C++, so that its AMX code is tested on
// any machine with AVX-512: compile with `-include` of this file. Breaking a rule of the hardware
// (a shape that is not configured, one that does not fit another) aborts.

#include <immintrin.h>

#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace amx {

struct Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

inline thread_local Config config{};
inline thread_local uint8_t tiles[8][16][64];
inline std::atomic<int64_t> products{0};

inline void check(bool holds) {
  if (!holds) std::abort();
}

inline void loadconfig(const void* from) {
  std::memcpy(&config, from, sizeof config);
  check(config.palette == 1 && config.start_row == 0);
  for (int t = 0; t < 16; ++t) {
    check(config.rows[t] <= 16 && config.row_bytes[t] <= 64);
    check((config.rows[t] == 0) == (config.row_bytes[t] == 0) && (t < 8 || config.rows[t] == 0));
  }
  std::memset(tiles, 0, sizeof tiles);
}

inline void zero(int t) {
  check(config.rows[t]);
  std::memset(tiles[t], 0, sizeof tiles[t]);
}

inline void load(int t, const void* from, int64_t stride) {
  zero(t);
  for (int row = 0; row < config.rows[t]; ++row)
    std::memcpy(tiles[t][row], static_cast<const char*>(from) + row * stride, config.row_bytes[t]);
}

inline void store(int t, void* to, int64_t stride) {
  check(config.rows[t]);
  for (int row = 0; row < config.rows[t]; ++row)
    std::memcpy(static_cast<char*>(to) + row * stride, tiles[t][row], config.row_bytes[t]);
}

inline float widen(const uint8_t* from) {
  const uint8_t bytes[4] = {0, 0, from[0], from[1]};
  float value;
  std::memcpy(&value, bytes, 4);
  return value;
}

inline void multiply(int to, int a, int b) {
  check(config.rows[to] && config.rows[to] == config.rows[a]);
  check(config.row_bytes[to] == config.row_bytes[b] && config.row_bytes[a] == 4 * config.rows[b]);
  for (int m = 0; m < config.rows[to]; ++m)
    for (int n = 0; n < config.row_bytes[to] / 4; ++n) {
      float sums[2] = {0, 0}, total;
      for (int k = 0; k < config.rows[b]; ++k)
        for (int i = 0; i < 2; ++i)
          sums[i] += widen(tiles[a][m] + 4 * k + 2 * i) * widen(tiles[b][k] + 4 * n + 2 * i);
      std::memcpy(&total, tiles[to][m] + 4 * n, 4);
      total += sums[0] + sums[1];
      std::memcpy(tiles[to][m] + 4 * n, &total, 4);
    }
  products.fetch_add(1, std::memory_order_relaxed);
}

}  // namespace amx

extern "C" inline __attribute__((used)) int64_t amx_products() { return amx::products; }

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#define _tile_loadconfig(from) amx::loadconfig(from)
#define _tile_release() std::memset(&amx::config, 0, sizeof amx::config)
#define _tile_zero(t) amx::zero(t)
#define _tile_loadd(t, from, stride) amx::load(t, from, stride)
#define _tile_stored(t, to, stride) amx::store(t, to, stride)
#define _tile_dpbf16ps(to, a, b) amx::multiply(to, a, b)
