// The activation between an expert's projections: Activation of activation.py, kinds in its order.

#pragma once

#include "vectors.h"

namespace {

struct Activation {
  enum Kind { kSwish, kGeluTanh, kSwigluStep, kSitu, kRelu2 };
  int kind;
  float limit, alpha, beta;

  int sides() const { return kind == kRelu2 ? 1 : 2; }  // gate and up, or only up
};

// Applies one kind of activation. Without a gate, `gate` equals `up` and is ignored.
template <int kKind>
Vec activate(const Activation& to, const Vec& gate, const Vec& up) {
  const Vec limit(to.limit), alpha(to.alpha), beta(to.beta);
  if constexpr (kKind == Activation::kSwish) {
    const Vec low = at::vec::minimum(gate, limit);
    return times_logistic(low, alpha * low) * (at::vec::clamp(up, limit.neg(), limit) + beta);
  } else if constexpr (kKind == Activation::kGeluTanh) {
    // ½(1 + tanh z) is the logistic function of 2z.
    const Vec cube = gate * gate * gate;
    return times_logistic(gate, Vec(1.5957691216f) * fmadd(Vec(0.044715f), cube, gate)) * up;
  } else if constexpr (kKind == Activation::kSwigluStep) {
    const Vec low = at::vec::minimum(times_logistic(gate, gate), limit);
    return low * at::vec::clamp(up, limit.neg(), limit);
  } else if constexpr (kKind == Activation::kSitu) {
    const Vec bent = times_logistic(alpha * tanh(gate / alpha), gate);
    return bent * (to.beta > 0 ? beta * tanh(up / beta) : up);
  } else {
    const Vec positive = at::vec::maximum(up, Vec(0.f));
    return positive * positive;
  }
}

// Calls `body` with an activation's kind as a constant.
template <class Body>
void with_kind(const Activation& activation, const Body& body) {
  switch (activation.kind) {
    case Activation::kSwish:
      return body(std::integral_constant<int, Activation::kSwish>());
    case Activation::kGeluTanh:
      return body(std::integral_constant<int, Activation::kGeluTanh>());
    case Activation::kSwigluStep:
      return body(std::integral_constant<int, Activation::kSwigluStep>());
    case Activation::kSitu:
      return body(std::integral_constant<int, Activation::kSitu>());
    case Activation::kRelu2:
      return body(std::integral_constant<int, Activation::kRelu2>());
  }
}

}  // namespace
