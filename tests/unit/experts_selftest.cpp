// The C++ kernel against plain loops in double, for processors that the tests do not have: compiled
// for them and run under an emulator. Prints the largest relative error of every element type, of
// plain weights and of codes.

#include "experts.cpp"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

constexpr int64_t kHidden = 72, kTop = 3, kTokens = 23;
const std::vector<int64_t> kWidths = {33, 0, 70, 1, 128};

// Codes, scales and where these are of one projection, rows of `columns`-wide blocks of scales.
struct Coded {
  std::vector<uint8_t> codes, zeros;
  std::vector<float> scales;
  std::vector<int32_t> rows, firsts;
  std::vector<int16_t> relative;
  int64_t columns;

  ScaleTable table() const {
    const int64_t C = kHidden / columns;
    return {scales.data(), relative.data(), firsts.data(), zeros.empty() ? nullptr : zeros.data(), nullptr, C, columns};
  }
  double weight(int code, int64_t row, int64_t h) const {
    const uint8_t found = codes[row * kHidden + h];
    const int64_t at = rows[row] * (kHidden / columns) + h / columns;
    static const double kHalves[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    double meaning = found;
    if (code == kInt4) meaning -= 8;
    if (code == kE2M1) meaning = kHalves[found & 7] * (found & 8 ? -1 : 1);
    if (code == kE4M3) {
      const int exponent = found >> 3 & 15, fraction = found & 7;
      meaning = exponent ? std::ldexp(8 + fraction, exponent - 10) : std::ldexp(fraction, -9);
      if (found & 128) meaning = -meaning;
    }
    return (meaning - (zeros.empty() ? 0 : zeros[at])) * scales[at];
  }
};

// `code` is −1 for plain weights.
template <class Element>
double check(int dtype, int code) {
  std::mt19937 random(dtype);
  std::normal_distribution<float> normal;
  const auto draw = [&](size_t count, float scale) {
    std::vector<Element> numbers(count);
    for (auto& number : numbers) number = static_cast<Element>(normal(random) * scale);
    return numbers;
  };
  const int64_t E = kWidths.size();
  std::vector<int64_t> offsets{0}, words{0};
  int failed = 0;
  int64_t padded = 0;
  for (int64_t width : kWidths) {
    offsets.push_back(offsets.back() + width);
    words.push_back(words.back() + ceil_div(width, 32));
    padded += round_up(width, 2);
  }
  const int64_t P = offsets.back(), W = words.back(), H = kHidden;
  std::vector<Element> matrices[3];
  Coded coded[3];
  std::vector<double> weights_of[3];
  const float scale = 1 / std::sqrt(float(H));
  for (int which = 0; which < 3; ++which) {
    auto& [codes, zeros, scales, rows, firsts, relative, columns] = coded[which];
    if (code < 0) {
      matrices[which] = draw(P * H, scale);
      weights_of[which].assign(matrices[which].begin(), matrices[which].end());
      continue;
    }
    columns = which == 2 ? 1 : 24;
    for (int64_t row = 0; row < P; ++row) rows.push_back(which == 2 ? row / 8 : row);
    for (int64_t e = 0; e < E; ++e) {
      firsts.push_back(offsets[e] < P ? rows[offsets[e]] : rows.back());
      for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row)
        relative.push_back(rows[row] - firsts[e]);
    }
    for (int64_t n = 0; n < P * H; ++n)
      codes.push_back(code == kE4M3 ? random() % 120 + random() % 2 * 128 : random() % 16);
    const float largest = code == kE4M3 ? 480 : 8;
    for (int64_t n = 0; n < (rows.back() + 1) * H / columns; ++n) {
      scales.push_back(scale * 3 / largest * (1 + random() % 8 / 8.f));
      if (code == kUInt4) zeros.push_back(random() % 16);
    }
    for (int64_t n = 0; n < P * H; ++n)
      weights_of[which].push_back(coded[which].weight(code, n / H, n % H));
  }
  const Quantized quantized{code, Quantized::kFloat32, Quantized::kNone,
                            {coded[0].table(), coded[1].table(), coded[2].table()}};
  const int bits = code < 0 ? 8 * sizeof(Element) : quantized.bits();
  const int stored = code < 0 ? dtype : quantized.bits() == 8 ? 3 : 4;
  std::vector<uint8_t> packed(3 * H * padded * bits / 8 + 64);
  padded = 0;
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> atoms;
    for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) atoms.push_back(row);
    for (int projection = 0; projection < 3; ++projection)
      failed += atomic_moe_pack(
          packed.data() + 3 * H * padded * bits / 8, projection, 2,
          code < 0 ? static_cast<const void*>(matrices[projection].data())
                   : coded[projection].codes.data(),
          H, 1, atoms.data(), atoms.size(), H, stored, 2, 2);
    padded += round_up(kWidths[e], 2);
  }
  std::vector<int32_t> slot_bits(kSlots * W);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t slot = 0; slot < kSlots; ++slot)
      for (int64_t row = 0; row < kWidths[e]; ++row)
        if (random() % 3 || slot == 0) slot_bits[slot * W + words[e] + row / 32] |= 1u << row % 32;
  const auto x = draw(kTokens * H, 1);
  std::vector<float> weights(kTokens * kTop);
  std::vector<int32_t> ids(kTokens * kTop);
  for (size_t n = 0; n < ids.size(); ++n) {
    weights[n] = normal(random);
    ids[n] = (int32_t(random() % (E + 2)) - 1) * kSlots + n / kTop % kSlots;
  }
  std::vector<Element> out(kTokens * H);
  failed += atomic_moe_fused_experts(packed.data(), nullptr, code < 0 ? nullptr : &quantized, nullptr,
                                     nullptr, nullptr, slot_bits.data(), words.data(), offsets.data(), E, W, H, dtype, 0, INFINITY, 1,
                                     0, x.data(), weights.data(), ids.data(), out.data(), kTokens,
                                     kTop, false, 3, 2);
  if (failed) return 1;  // a relative error that is far too large
  double error = 0, size = 0;
  for (int64_t t = 0; t < kTokens; ++t) {
    std::vector<double> wanted(H);
    for (int64_t k = 0; k < kTop; ++k) {
      const int32_t carried = ids[t * kTop + k], e = carried >> 4, slot = carried & 15;
      if (e < 0 || e >= E) continue;
      for (int64_t row = 0; row < kWidths[e]; ++row) {
        if (!(slot_bits[slot * W + words[e] + row / 32] >> row % 32 & 1)) continue;
        double gate = 0, up = 0;
        for (int64_t h = 0; h < H; ++h) {
          gate += double(x[t * H + h]) * weights_of[0][(offsets[e] + row) * H + h];
          up += double(x[t * H + h]) * weights_of[1][(offsets[e] + row) * H + h];
        }
        const double hidden = gate / (1 + std::exp(-gate)) * up * weights[t * kTop + k];
        for (int64_t h = 0; h < H; ++h)
          wanted[h] += hidden * weights_of[2][(offsets[e] + row) * H + h];
      }
    }
    for (int64_t h = 0; h < H; ++h) {
      error += std::pow(double(out[t * H + h]) - wanted[h], 2);
      size += wanted[h] * wanted[h];
    }
  }
  return std::sqrt(error / size);
}

}  // namespace

int main() {
  const double most[3] = {8e-3, 1e-3, 2e-6};
  const char* names[3] = {"bfloat16", "float16", "float32"};
  const char* codes[] = {"plain", "e4m3", "int4", "uint4", "e2m1"};
  bool right = true;
  for (int code = -1; code < 4; ++code) {
    const double errors[3] = {check<c10::BFloat16>(0, code), check<c10::Half>(1, code),
                              check<float>(2, code)};
    for (int dtype = 0; dtype < 3; ++dtype) {
      std::printf("%s, %s %.1e\n", names[dtype], codes[code + 1], errors[dtype]);
      right = right && errors[dtype] <= most[dtype];
    }
  }
  return right ? 0 : 1;
}
