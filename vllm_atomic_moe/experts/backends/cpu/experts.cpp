// Fused experts of any width over packed tiles: routing, the two GEMMs, and the packing.
//
// One algorithm for every instruction set (vectors.h), behind a plain C interface that is loaded by
// ctypes. Results are the same for any number of threads and whoever else is in the batch, since
// every sum is made by one thread, in one order; with AMX, whoever else but for how many rows an
// expert has, which says whether they are worth its set-up.
//
// Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, W words,
// F atoms of an expert, padded to an even number.
//
// An expert is (for units and panels see panels.h)
//   ⌈F/32⌉ panels that sum over H: gate of 32 atoms (if there is one) | up of the same atoms, then
//   ⌈H/64⌉ panels that sum over F: 64 columns of the output,
// the last of each as narrow as what is left.

#include <atomic>
#include <exception>
#include <vector>

#include "panels.h"

#ifdef __AMX_BF16__
#include "amx.h"
#endif

// Of the OpenMP runtime that torch has loaded, GNU's or one with its entry points: its threads are
// those that the process has bound to cores. Called by name, any compiler can build this.
extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
void GOMP_barrier();
int omp_get_thread_num();
}

namespace {

constexpr int kTileAtoms = 32;
constexpr int kSlotBits = 4;  // of an id, the lowest
constexpr int kSlots = 1 << kSlotBits;
// Products are summed over so many atoms of a down panel before they are weighted and added: 256 KiB
// of bfloat16, which stay in L2. Fixed, so that it does not depend on what a batch uses.
constexpr int64_t kStretchAtoms = 2048;
constexpr int64_t kScratchBytes = 64ll << 20;
constexpr int64_t kTokenRange = 512;  // sums of so many tokens: 128 KiB of a thread's stack

#ifdef __AMX_BF16__
template <class D>
constexpr bool kUsesAmx = std::is_same_v<D, BFloat16>;
constexpr int kMostRows = kAmxRows;
#else
template <class D>
constexpr bool kUsesAmx = false;
constexpr int kMostRows = kRows;
#endif

// How many rows one product takes at most: AMX needs some to be worth its set-up. It sums in
// another order, so this must depend on nothing but the routing.
template <class D>
int rows_at_once(int64_t rows_of_expert) {
  return kUsesAmx<D> && rows_of_expert > 4 ? kMostRows : kRows;
}

template <class D>
void multiply_block(const typename D::Row* const* rows, int count, [[maybe_unused]] int at_once,
                    const Panel<D>& panel, float* product, bool fresh) {
#ifdef __AMX_BF16__
  if constexpr (kUsesAmx<D>)
    if (at_once == kAmxRows) return multiply_amx(rows, count, panel, product, fresh);
#endif
  multiply<D>(rows, count, panel, product, fresh);
}

// ---- threads ------------------------------------------------------------------------------------

// Threads of a parallel region, all that torch has: a smaller team would end the others, and with
// them what bound them to cores. No more than `workers` of them work.
struct Threads {
  int count, workers;
};

template <class Body>
void parallel(const Threads& threads, Body&& body) {
  if (threads.count == 1) return body();
  GOMP_parallel([](void* data) { (*static_cast<std::remove_reference_t<Body>*>(data))(); }, &body,
                threads.count, 0);
}

// Inside `parallel`: items 0..count one by one, whoever is free; then all threads wait.
template <class Body>
void share(std::atomic<int64_t>& next, int64_t count, const Threads& threads, const Body& body) {
  if (threads.count == 1 || omp_get_thread_num() < threads.workers)
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(item);
  if (threads.count > 1) GOMP_barrier();
}

// ---- what one call has to do --------------------------------------------------------------------

// What an expert computes between its projections: Activation of activation.py, kinds in its order.
struct Activation {
  enum Kind { kSwish, kGeluTanh, kSwigluStep, kSitu, kRelu2 };
  int kind;
  float limit, alpha, beta;

  int sides() const { return kind == kRelu2 ? 1 : 2; }  // gate and up, or up alone
};

struct Call {
  const void* x_TH;
  const void* packed;
  // By atom, by atom, by expert [E, H]; all null, or gate's alone.
  const float *gate_bias, *up_bias, *down_bias;
  Activation activation;
  const int32_t* bits_SW;
  const int64_t *words_E1, *offsets_E1;
  const float* weights_TK;
  const void* ids_TK;
  bool wide_ids;  // int64, not int32
  void* out_TH;
  int64_t T, K, E, W, H;
  Threads threads;

  int64_t width(int64_t id) const { return offsets_E1[id + 1] - offsets_E1[id]; }
  int64_t id(int64_t n) const {
    return wide_ids ? static_cast<const int64_t*>(ids_TK)[n]
                    : static_cast<const int32_t*>(ids_TK)[n];
  }
  int64_t expert(int64_t n) const { return id(n) >> kSlotBits; }
  int slot(int64_t n) const { return id(n) & (kSlots - 1); }
};

template <class D>
struct Expert {
  int64_t id, rows;
  int64_t atoms;  // F
  const typename D::Unit *gate_up, *down;
};

// Rows of one expert and one range of tokens that are computed together.
struct Block {
  int64_t first;
  int count;
  int64_t words;  // where the OR of its rows' words begins
  int64_t first_segment, last_segment;
};

struct Segment {
  int64_t first, count;  // atoms, both even, within one stretch
};

struct Tile {
  int64_t expert, index;
};

template <class D>
struct Plan {
  using Row = typename D::Row;
  // Routed rows, sorted by expert, range of tokens, slot and token.
  std::vector<int64_t> tokens_N;
  std::vector<float> weights_N;
  std::vector<uint8_t> slots_N;
  std::vector<const Row*> rows_N;

  std::vector<Expert<D>> experts;  // those with rows
  std::vector<Block> blocks;
  std::vector<int64_t> blocks_ER1;  // first block of every expert and range
  std::vector<uint32_t> words;
  std::vector<Segment> segments;
  std::vector<Tile> tiles;

  std::vector<Row> x_NH;  // gathered for AMX, or converted: then one row a token
  std::vector<Row> hidden_NF;
  int64_t hidden_stride = 0;
  std::vector<int64_t> bounds;  // only for sorting
};

// The OR of the words of the block's rows, and the stretches of atoms that it covers.
template <class D>
void plan_block(Plan<D>& plan, const Call& call, const Expert<D>& expert, Block& block) {
  const int64_t tiles = ceil_div(expert.atoms, kTileAtoms);
  const int32_t* words = call.bits_SW + call.words_E1[expert.id];
  block.words = plan.words.size();
  plan.words.resize(block.words + tiles, 0);
  uint32_t* used = plan.words.data() + block.words;
  int slot = -1;
  for (int r = 0; r < block.count; ++r) {
    if (plan.slots_N[block.first + r] == slot) continue;
    slot = plan.slots_N[block.first + r];
    for (int64_t tile = 0; tile < tiles; ++tile) used[tile] |= words[slot * call.W + tile];
  }
  // Bits beyond the expert's rows are nobody's.
  if (const int64_t rest = call.width(expert.id) % kTileAtoms) used[tiles - 1] &= (1u << rest) - 1;
  block.first_segment = plan.segments.size();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!used[tile]) continue;
    int64_t first = tile * kTileAtoms + __builtin_ctz(used[tile]) / 2 * 2;
    int64_t end = (tile + 1) * kTileAtoms - __builtin_clz(used[tile]) / 2 * 2;
    if (kUsesAmx<D>) {  // which sums a tile at once: where that begins must not depend on the block
      first = tile * kTileAtoms;
      end = std::min(expert.atoms, first + kTileAtoms);
    }
    Segment* before =
        int64_t(plan.segments.size()) > block.first_segment ? &plan.segments.back() : nullptr;
    if (before && before->first + before->count == first && first % kStretchAtoms)
      before->count = end - before->first;
    else
      plan.segments.push_back({first, end - first});
  }
  block.last_segment = plan.segments.size();
}

// Sorts the routed rows of tokens begin..end, `range` tokens at a time, and finds the work.
template <class D>
void plan_tokens(Plan<D>& plan, const Call& call, int64_t begin, int64_t end, int64_t range) {
  // Keys: expert, range, and which of the slots that occur.
  const int64_t ranges = ceil_div(end - begin, range);
  uint32_t slots = 0;
  for (int64_t n = begin * call.K; n < end * call.K; ++n) slots |= 1u << call.slot(n);
  const int64_t num_slots = std::max(1, __builtin_popcount(slots));
  const auto key = [&](int64_t n) {
    const int64_t id = call.expert(n);
    if (id < 0 || id >= call.E) return int64_t(-1);
    const int64_t part = (n / call.K - begin) / range;
    return (id * ranges + part) * num_slots +
           __builtin_popcount(slots & ((1u << call.slot(n)) - 1));
  };
  auto& bounds = plan.bounds;
  bounds.assign(call.E * ranges * num_slots + 1, 0);
  for (int64_t n = begin * call.K; n < end * call.K; ++n)
    if (const int64_t at = key(n); at >= 0) ++bounds[at + 1];
  for (size_t at = 1; at < bounds.size(); ++at) bounds[at] += bounds[at - 1];
  const int64_t routed = bounds.back();
  plan.tokens_N.resize(routed);
  plan.weights_N.resize(routed);
  plan.slots_N.resize(routed);
  plan.rows_N.resize(routed);
  for (int64_t n = begin * call.K; n < end * call.K; ++n) {
    const int64_t at = key(n);
    if (at < 0) continue;
    const int64_t row = bounds[at]++;
    plan.tokens_N[row] = n / call.K;
    plan.weights_N[row] = call.weights_TK[n];
    plan.slots_N[row] = call.slot(n);
  }
  // Now every bound is the end of its key.
  plan.experts.clear(), plan.blocks.clear(), plan.blocks_ER1.clear();
  plan.words.clear(), plan.segments.clear(), plan.tiles.clear();
  int64_t padded = 0, first = 0;
  for (int64_t id = 0; id < call.E; ++id) {
    const int64_t atoms = round_up(call.width(id), 2);
    const int sides = call.activation.sides();
    const auto* units = static_cast<const typename D::Unit*>(call.packed) +
                        (sides + 1) * padded * call.H / D::kPerUnit;
    padded += atoms;
    const int64_t rows = bounds[(id + 1) * ranges * num_slots - 1] - first;
    if (!rows) continue;
    const int64_t index = plan.experts.size(), first_block = plan.blocks.size();
    plan.experts.push_back({id, rows, atoms, units, units + sides * atoms * call.H / D::kPerUnit});
    const int at_once = rows_at_once<D>(rows);
    for (int64_t part = 0; part < ranges; ++part) {
      plan.blocks_ER1.push_back(plan.blocks.size());
      const int64_t last = bounds[(id * ranges + part + 1) * num_slots - 1];
      const int64_t count = ceil_div(last - first, at_once);  // of nearly equal size
      for (int64_t block = 0; block < count; ++block) {
        const int64_t from = first + (last - first) * block / count;
        const int64_t to = first + (last - first) * (block + 1) / count;
        Block made{from, static_cast<int>(to - from), 0, 0, 0};
        const Block* before =
            int64_t(plan.blocks.size()) > first_block ? &plan.blocks.back() : nullptr;
        if (before && num_slots == 1)
          made = {from, made.count, before->words, before->first_segment, before->last_segment};
        else
          plan_block(plan, call, plan.experts.back(), made);
        plan.blocks.push_back(made);
      }
      first = last;
    }
    plan.blocks_ER1.push_back(plan.blocks.size());
    for (int64_t tile = 0; tile < ceil_div(atoms, kTileAtoms); ++tile)
      for (size_t block = first_block; block < plan.blocks.size(); ++block)
        if (plan.words[plan.blocks[block].words + tile]) {
          plan.tiles.push_back({index, tile});
          break;
        }
  }
}

// Whether rows have another type than the activations: then they are converted, once a token.
template <class D>
constexpr bool kConverts = !std::is_same_v<typename D::Row, typename D::Element>;

// How many rows a call prepares: one a token, or one a routed row for AMX, which reads rows at equal
// distances, or none.
template <class D>
int64_t rows_to_prepare(int64_t tokens, int64_t routed) {
  return kConverts<D> ? tokens : kUsesAmx<D> && tokens > 1 ? routed : 0;
}

// One of them; run by all threads.
template <class D>
void prepare_row(Plan<D>& plan, const Call& call, int64_t begin, int64_t index) {
  const auto* x_TH = static_cast<const typename D::Element*>(call.x_TH);
  auto* to = plan.x_NH.data() + index * call.H;
  if constexpr (kConverts<D>) {
    const auto* from = x_TH + (begin + index) * call.H;
    for (int64_t h = 0; h < call.H; ++h) to[h] = static_cast<float>(from[h]);
  } else {
    std::memcpy(to, x_TH + plan.tokens_N[index] * call.H, sizeof(*to) * call.H);
  }
}

template <class D>
void point_to_rows(Plan<D>& plan, const Call& call, int64_t begin, bool prepared) {
  const auto* x_TH = static_cast<const typename D::Element*>(call.x_TH);
  for (size_t row = 0; row < plan.rows_N.size(); ++row) {
    if constexpr (kConverts<D>)
      plan.rows_N[row] = plan.x_NH.data() + (plan.tokens_N[row] - begin) * call.H;
    else
      plan.rows_N[row] = prepared ? plan.x_NH.data() + row * call.H
                                  : x_TH + plan.tokens_N[row] * call.H;
  }
}

// ---- the two GEMMs ------------------------------------------------------------------------------

// Applies one kind of activation. Without a gate, `gate` is `up` and is not used.
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

alignas(64) constexpr float kNoBias[kTileAtoms] = {};

// h of one tile for all rows of its expert; zero for atoms that a row's slot does not use, whatever
// was computed there.
template <class D>
void gate_up_tile(Plan<D>& plan, const Call& call, int64_t ranges, const Tile& tile) {
  const Expert<D>& expert = plan.experts[tile.expert];
  const int64_t half = std::min<int64_t>(kTileAtoms, expert.atoms - tile.index * kTileAtoms);
  const int64_t steps = call.H / D::kPerUnit;
  const int sides = call.activation.sides();
  const Panel<D> panel{expert.gate_up + tile.index * sides * kTileAtoms * steps, steps,
                       sides * half};
  const int64_t first_atom = call.offsets_E1[expert.id] + tile.index * kTileAtoms;
  const float* up_bias = call.up_bias ? call.up_bias + first_atom : kNoBias;
  const float* gate_bias = call.gate_bias ? call.gate_bias + first_atom : up_bias;
  const int32_t* words = call.bits_SW + call.words_E1[expert.id] + tile.index;
  const int at_once = rows_at_once<D>(expert.rows);
  const int64_t* bounds = plan.blocks_ER1.data() + tile.expert * (ranges + 1);
  alignas(64) float product[kMostRows * kPanelColumns];
  for (int64_t index = bounds[0]; index < bounds[ranges]; ++index) {
    const Block& block = plan.blocks[index];
    const uint32_t by_any = plan.words[block.words + tile.index];
    if (!by_any) continue;
    multiply_block<D>(&plan.rows_N[block.first], block.count, at_once, panel, product, true);
    for (int r = 0; r < block.count; ++r) {
      const int64_t row = block.first + r;
      const uint32_t used = words[plan.slots_N[row] * call.W] & by_any;
      auto* hidden =
          plan.hidden_NF.data() + row * plan.hidden_stride + tile.index * kTileAtoms;
      const float *gate = product + r * kPanelColumns, *up = gate + (sides - 1) * half;
      with_kind(call.activation, [&](auto kind) {
        for (int j = 0; j < kTileAtoms; j += kWidth) {
          const Vec h =
              activate<decltype(kind)::value>(call.activation, Vec::loadu(gate + j) + Vec::loadu(gate_bias + j),
                             Vec::loadu(up + j) + Vec::loadu(up_bias + j));
          store_row(hidden + j, Vec::blendv(Vec(0.f), h, lane_mask(used >> j)));
        }
      });
    }
  }
}

// Adds 64 columns of an expert's bias, weighted, to the sums of the tokens of some blocks.
template <class D>
void add_bias(const Plan<D>& plan, const float* bias, int64_t columns, int64_t begin,
              const int64_t* bounds, float* sums) {
  for (int64_t index = bounds[0]; index < bounds[1]; ++index)
    for (int r = 0; r < plan.blocks[index].count; ++r) {
      const int64_t row = plan.blocks[index].first + r;
      float* sum = sums + (plan.tokens_N[row] - begin) * kPanelColumns;
      for (int64_t j = 0; j < columns; ++j) sum[j] += plan.weights_N[row] * bias[j];
    }
}

// 64 columns of the output of one range of tokens: experts in ascending order, whoever computes.
template <class D>
void down_block(const Plan<D>& plan, const Call& call, int64_t begin, int64_t end, int64_t ranges,
                int64_t range, int64_t block_of_columns) {
  const int64_t column = block_of_columns * kPanelColumns;
  const int64_t columns = std::min<int64_t>(kPanelColumns, call.H - column);
  alignas(64) float sums[kTokenRange * kPanelColumns];
  std::fill_n(sums, (end - begin) * kPanelColumns, 0.f);
  alignas(64) float product[kMostRows * kPanelColumns];
  for (size_t which = 0; which < plan.experts.size(); ++which) {
    const Expert<D>& expert = plan.experts[which];
    const int at_once = rows_at_once<D>(expert.rows);
    const int64_t* bounds = plan.blocks_ER1.data() + which * (ranges + 1) + range;
    const auto* units = expert.down + column * expert.atoms / D::kPerUnit;
    if (call.down_bias)
      add_bias(plan, call.down_bias + expert.id * call.H + column, columns, begin, bounds, sums);
    for (int64_t stretch = 0; stretch < expert.atoms; stretch += kStretchAtoms)
      for (int64_t index = bounds[0]; index < bounds[1]; ++index) {
        const Block& block = plan.blocks[index];
        bool fresh = true;
        for (int64_t s = block.first_segment; s < block.last_segment; ++s) {
          const Segment& segment = plan.segments[s];
          if (segment.first < stretch || segment.first >= stretch + kStretchAtoms) continue;
          const Panel<D> panel{units + segment.first / D::kPerUnit * columns,
                               segment.count / D::kPerUnit, columns};
          const typename D::Row* hidden[kMostRows];
          for (int r = 0; r < block.count; ++r)
            hidden[r] = plan.hidden_NF.data() + (block.first + r) * plan.hidden_stride +
                        segment.first;
          multiply_block<D>(hidden, block.count, at_once, panel, product, fresh);
          fresh = false;
        }
        if (fresh) continue;
        for (int r = 0; r < block.count; ++r) {
          float* sum = sums + (plan.tokens_N[block.first + r] - begin) * kPanelColumns;
          const Vec weight(plan.weights_N[block.first + r]);
          for (int j = 0; j < kPanelColumns; j += kWidth)
            fmadd(weight, Vec::loadu(product + r * kPanelColumns + j), Vec::loadu(sum + j))
                .store(sum + j);
        }
      }
  }
  for (int64_t token = begin; token < end; ++token) {
    auto* out = static_cast<typename D::Element*>(call.out_TH) + token * call.H + column;
    const float* sum = sums + (token - begin) * kPanelColumns;
    for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<typename D::Element>(sum[j]);
  }
}

// Scratch never shrinks, or growing again would clear it every time.
template <class T>
void grow(std::vector<T>& scratch, size_t size) {
  if (scratch.size() < size) scratch.resize(size);
}

template <class D>
void fused_experts(const Call& call) {
  static thread_local Plan<D> plan;  // keeps its memory for the next call
  int64_t widest = 0;
  for (int64_t id = 0; id < call.E; ++id) widest = std::max(widest, call.width(id));
  plan.hidden_stride = round_up(widest, kTileAtoms);
  const int64_t row_bytes = sizeof(typename D::Row) * (plan.hidden_stride + call.H);
  const int64_t chunk =
      std::max<int64_t>(1, kScratchBytes / std::max<int64_t>(1, call.K * row_bytes));
  const int64_t blocks = ceil_div(call.H, kPanelColumns);
  const Threads& threads = call.threads;
  for (int64_t begin = 0; begin < call.T; begin += chunk) {
    const int64_t end = std::min(call.T, begin + chunk);
    // Long ranges of tokens read a panel seldom, short ones occupy all threads.
    int64_t range = std::min(end - begin, kTokenRange);
    while (range > 64 && blocks * ceil_div(end - begin, range) < 4 * threads.workers) range /= 2;
    const int64_t ranges = ceil_div(end - begin, range);
    plan_tokens(plan, call, begin, end, range);
    const int64_t routed = plan.rows_N.size();
    grow(plan.hidden_NF, routed * plan.hidden_stride);
    const int64_t to_prepare = rows_to_prepare<D>(end - begin, routed);
    grow(plan.x_NH, to_prepare * call.H);
    point_to_rows(plan, call, begin, to_prepare > 0);
    Plan<D>& shared = plan;  // the calling thread's
    std::atomic<int64_t> next[3] = {};
    parallel(threads, [&] {
      if (to_prepare)
        share(next[0], to_prepare, threads,
              [&](int64_t row) { prepare_row(shared, call, begin, row); });
      share(next[1], shared.tiles.size(), threads, [&](int64_t tile) {
        gate_up_tile(shared, call, ranges, shared.tiles[tile]);
      });
      // Ranges inside: threads that work on one block share its panels in L3.
      share(next[2], blocks * ranges, threads, [&](int64_t task) {
        const int64_t first = begin + task % ranges * range;
        down_block(shared, call, first, std::min(end, first + range), ranges, task % ranges,
                   task / ranges);
      });
    });
  }
}

// ---- packing ------------------------------------------------------------------------------------

// The rows atoms[0..count) of a matrix, the atoms of one expert; strides in elements.
template <class D>
struct Source {
  int sides;  // of a tile: gate and up, or up alone
  using Element = std::conditional_t<sizeof(typename D::Element) == 2, uint16_t, uint32_t>;
  const Element* rows;
  int64_t row_stride, column_stride;
  const int64_t* atoms;
  int64_t count, H;

  int64_t padded() const { return round_up(count, 2); }
};

template <class D>
using Bits = std::conditional_t<sizeof(typename D::Unit) == 2, uint16_t, uint32_t>;

constexpr int kSquare = 16;

// Units of 16 lines, copied from `lines` (null for zeros), become 16 columns of a panel.
template <class D>
void pack_square(const void* const* lines, int64_t steps, Bits<D>* to, int64_t stride,
                 int64_t columns) {
  alignas(64) Bits<D> square[kSquare][kSquare] = {};
  for (int64_t i = 0; i < columns; ++i)
    if (lines[i]) std::memcpy(square[i], lines[i], steps * sizeof(Bits<D>));
  if (sizeof(Bits<D>) == sizeof(float) && columns == kSquare && steps == kSquare) {
    for (int row = 0; row < kSquare; row += kWidth)
      for (int step = 0; step < kSquare; step += kWidth)
        transpose(&square[row][step], kSquare, to + step * stride + row, stride);
    return;
  }
  for (int64_t step = 0; step < steps; ++step, to += stride)
    for (int64_t i = 0; i < columns; ++i) to[i] = square[i][step];
}

// The gate half or the up half of one tile, or all of it: the first or the second of its sides.
template <class D>
void pack_tile(const Source<D>& source, Bits<D>* gate_up, int64_t tile, int side) {
  const int64_t half = std::min<int64_t>(kTileAtoms, source.padded() - tile * kTileAtoms);
  const int64_t steps = source.H / D::kPerUnit;
  const int64_t width = source.sides * half;
  Bits<D>* panel = gate_up + tile * source.sides * kTileAtoms * steps + side * half;
  for (int64_t column = 0; column < half; column += kSquare) {
    const int64_t columns = std::min<int64_t>(kSquare, half - column);
    for (int64_t step = 0; step < steps; step += kSquare) {
      const void* lines[kSquare];
      for (int64_t i = 0; i < columns; ++i) {
        const int64_t atom = tile * kTileAtoms + column + i;
        lines[i] = atom < source.count ? source.rows + source.atoms[atom] * source.row_stride +
                                             step * D::kPerUnit
                                       : nullptr;
      }
      pack_square<D>(lines, std::min<int64_t>(kSquare, steps - step),
                     panel + step * width + column, width, columns);
    }
  }
}

// A block of down_proj transposed, from rows that are stored as such, one element after another.
template <class D>
void pack_rows(const Source<D>& source, Bits<D>* panel, int64_t first, int64_t columns) {
  using Element = typename Source<D>::Element;
  const Element none[kPanelColumns] = {};
  const auto row = [&](int64_t atom) {
    return atom < source.count ? source.rows + source.atoms[atom] * source.row_stride + first
                               : none;
  };
  for (int64_t atom = 0; atom < source.padded(); atom += D::kPerUnit, panel += columns) {
    if constexpr (D::kPerUnit == 1) {
      std::memcpy(panel, row(atom), columns * sizeof(Element));
    } else {
      const Element *low = row(atom), *high = row(atom + 1);
      for (int64_t column = 0; column < columns; ++column)
        panel[column] = low[column] | static_cast<uint32_t>(high[column]) << 16;
    }
  }
}

// The same from columns: what stays of 16 at a time is gathered into `kept`, then transposed.
template <class D>
void pack_columns(const Source<D>& source, Bits<D>* panel, int64_t first, int64_t columns,
                  typename Source<D>::Element* kept) {
  using Element = typename Source<D>::Element;
  const int64_t steps = source.padded() / D::kPerUnit;
  for (int64_t column = 0; column < columns; column += kSquare) {
    const int64_t wide = std::min<int64_t>(kSquare, columns - column);
    for (int64_t i = 0; i < wide; ++i) {
      const Element* from = source.rows + (first + column + i) * source.column_stride;
      Element* to = kept + i * source.padded();
      for (int64_t atom = 0; atom < source.count; ++atom)
        to[atom] = from[source.atoms[atom] * source.row_stride];
      std::fill(to + source.count, to + source.padded(), Element());
    }
    for (int64_t step = 0; step < steps; step += kSquare) {
      const void* lines[kSquare];
      for (int64_t i = 0; i < wide; ++i)
        lines[i] = kept + i * source.padded() + step * D::kPerUnit;
      pack_square<D>(lines, std::min<int64_t>(kSquare, steps - step),
                     panel + step * columns + column, columns, wide);
    }
  }
}

// 64 columns of down_proj transposed.
template <class D>
void pack_block(const Source<D>& source, Bits<D>* down, int64_t block,
                typename Source<D>::Element* kept) {
  const int64_t first = block * kPanelColumns,
                columns = std::min<int64_t>(kPanelColumns, source.H - first);
  Bits<D>* panel = down + first * source.padded() / D::kPerUnit;
  source.column_stride == 1 ? pack_rows(source, panel, first, columns)
                            : pack_columns(source, panel, first, columns, kept);
}

template <class D>
void pack(const Source<D>& source, void* expert, int projection, const Threads& threads) {
  auto* gate_up = static_cast<Bits<D>*>(expert);
  auto* down = gate_up + source.sides * source.padded() * source.H / D::kPerUnit;
  const int64_t parts =
      projection == 2 ? ceil_div(source.H, kPanelColumns) : ceil_div(source.count, kTileAtoms);
  // Parallel regions allocate nothing: an exception could not leave them.
  const int64_t gathered = projection == 2 ? kSquare * source.padded() : 0;
  std::vector<typename Source<D>::Element> kept(gathered * threads.count);
  std::atomic<int64_t> next{0};
  parallel(threads, [&] {
    auto* mine = kept.data() + gathered * (threads.count > 1 ? omp_get_thread_num() : 0);
    share(next, parts, threads, [&](int64_t part) {
      if (projection == 2)
        pack_block(source, down, part, mine);
      else
        pack_tile(source, gate_up, part, source.sides == 1 ? 0 : projection);
    });
  });
}

// Element types by the number that Python gives them.
template <class Body>
void with_type(int dtype, const Body& body) {
  switch (dtype) {
    case 0:
      return body(BFloat16());
    case 1:
      return body(Float16());
    case 2:
      return body(Float32());
  }
}

}  // namespace

extern "C" {

// Arguments as those of the op, all contiguous; H is even, biases may be null. Returns 0, or 1 where
// memory is short.
int atomic_moe_fused_experts(const void* packed, const float* gate_bias, const float* up_bias,
                             const float* down_bias, const int32_t* bits_SW,
                             const int64_t* words_E1, const int64_t* offsets_E1, int64_t E,
                             int64_t W, int64_t H, int dtype, int kind, float limit, float alpha,
                             float beta, const void* x_TH, const float* weights_TK,
                             const void* ids_TK, void* out_TH, int64_t T, int64_t K, int wide_ids,
                             int threads, int workers) try {
  const Call call{x_TH,     packed,     gate_bias,  up_bias, down_bias,     {kind, limit, alpha, beta},
                  bits_SW,  words_E1,   offsets_E1, weights_TK, ids_TK,     wide_ids != 0,
                  out_TH,   T,          K,          E,          W,          H,
                  {threads, workers}};
  with_type(dtype, [&](auto type) { fused_experts<decltype(type)>(call); });
  return 0;
} catch (const std::exception&) {  // of a vector that cannot grow; parallel regions allocate nothing
  return 1;
}

// Packs one projection (0 gate, 1 up, 2 down) of the expert that begins at `expert`, with gate and up
// or up alone; strides in elements. Returns as above.
int atomic_moe_pack(void* expert, int projection, int sides, const void* rows, int64_t row_stride,
                    int64_t column_stride, const int64_t* atoms, int64_t count, int64_t H,
                    int dtype, int threads, int workers) try {
  with_type(dtype, [&](auto type) {
    using D = decltype(type);
    pack(Source<D>{sides, static_cast<const typename Source<D>::Element*>(rows), row_stride,
                   column_stride, atoms, count, H},
         expert, projection, Threads{threads, workers});
  });
  return 0;
} catch (const std::exception&) {
  return 1;
}

}  // extern "C"
