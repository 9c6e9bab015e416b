// The C++ kernel against plain loops in double, for processors that the tests do not have: compiled
// for them and run under an emulator. Prints the largest relative error of every element type.

#include "experts.cpp"

#include <cmath>
#include <cstdio>
#include <random>

namespace {

constexpr int64_t kHidden = 72, kTop = 3, kTokens = 23;
const std::vector<int64_t> kWidths = {33, 0, 70, 1, 128};

template <class Element>
double check(int dtype) {
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
  for (auto& matrix : matrices) matrix = draw(P * H, 1 / std::sqrt(float(H)));
  std::vector<Element> packed(3 * H * padded + 64 / sizeof(Element));
  padded = 0;
  for (int64_t e = 0; e < E; ++e) {
    std::vector<int64_t> atoms;
    for (int64_t row = offsets[e]; row < offsets[e + 1]; ++row) atoms.push_back(row);
    for (int projection = 0; projection < 3; ++projection)
      failed += atomic_moe_pack(packed.data() + 3 * H * padded, projection, 2,
                                matrices[projection].data(), H, 1, atoms.data(), atoms.size(), H,
                                dtype, 2, 2);
    padded += round_up(kWidths[e], 2);
  }
  std::vector<int32_t> bits(kSlots * W);
  for (int64_t e = 0; e < E; ++e)
    for (int64_t slot = 0; slot < kSlots; ++slot)
      for (int64_t row = 0; row < kWidths[e]; ++row)
        if (random() % 3 || slot == 0) bits[slot * W + words[e] + row / 32] |= 1u << row % 32;
  const auto x = draw(kTokens * H, 1);
  std::vector<float> weights(kTokens * kTop);
  std::vector<int32_t> ids(kTokens * kTop);
  for (size_t n = 0; n < ids.size(); ++n) {
    weights[n] = normal(random);
    ids[n] = (int32_t(random() % (E + 2)) - 1) * kSlots + n / kTop % kSlots;
  }
  std::vector<Element> out(kTokens * H);
  failed += atomic_moe_fused_experts(packed.data(), nullptr, nullptr, nullptr, bits.data(),
                                     words.data(), offsets.data(), E, W, H, dtype, 0, INFINITY, 1,
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
        if (!(bits[slot * W + words[e] + row / 32] >> row % 32 & 1)) continue;
        double gate = 0, up = 0;
        for (int64_t h = 0; h < H; ++h) {
          gate += double(x[t * H + h]) * double(matrices[0][(offsets[e] + row) * H + h]);
          up += double(x[t * H + h]) * double(matrices[1][(offsets[e] + row) * H + h]);
        }
        const double hidden = gate / (1 + std::exp(-gate)) * up * weights[t * kTop + k];
        for (int64_t h = 0; h < H; ++h)
          wanted[h] += hidden * double(matrices[2][(offsets[e] + row) * H + h]);
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
  const double errors[3] = {check<c10::BFloat16>(0), check<c10::Half>(1), check<float>(2)};
  const double most[3] = {8e-3, 1e-3, 2e-6};
  const char* names[3] = {"bfloat16", "float16", "float32"};
  bool right = true;
  for (int dtype = 0; dtype < 3; ++dtype) {
    std::printf("%s %.1e\n", names[dtype], errors[dtype]);
    right = right && errors[dtype] <= most[dtype];
  }
  return right ? 0 : 1;
}
