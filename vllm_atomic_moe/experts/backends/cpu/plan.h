// Plans one call: sorts its routed rows, and finds the blocks, segments and tiles of its experts.
//
// For the legend see experts.cpp.

#pragma once

#include <span>
#include <vector>

#include "activation.h"
#include "panels.h"
#include "scales.h"
#include "threads.h"

#ifdef __AMX_BF16__
#include "amx.h"
#endif

namespace {

constexpr int kTileAtoms = 32;
constexpr int kSlotBits = 4;  // the lowest bits of an id
constexpr int kSlots = 1 << kSlotBits;
// Number of atoms of a down panel to sum over before weighting and adding: 256 KiB of bfloat16,
// which stay in L2. Fixed, so that it does not depend on the batch.
constexpr int64_t kStretchAtoms = 2048;
constexpr int64_t kScratchBytes = 64ll << 20;
constexpr int64_t kTokenRange = 512;  // their sums take 128 KiB of a thread's stack

#ifdef __AMX_BF16__
template <class D>
constexpr bool kUsesAmx = std::is_same_v<D, BFloat16>;
constexpr int kMostRows = kAmxRows;
#else
template <class D>
constexpr bool kUsesAmx = false;
constexpr int kMostRows = kRows;
#endif

// Maximum number of rows of one product: AMX needs several to be worth its set-up. It sums in
// another order, so this must depend only on the routing.
template <class D>
int rows_at_once(int64_t rows_of_expert) {
  return kUsesAmx<D> && rows_of_expert > kFewRows ? kMostRows : kRows;
}

struct Call {
  const void* x_TH;
  const void* packed;
  const void* down;  // of all experts, if it is plain beside codes; else null: it is in `packed`
  int bits;          // of one weight in `packed`
  const Quantized* quantized;  // null: weights are plain
  // Per atom, per atom, per expert [E, H]; all may be null, or only gate's.
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
  int64_t bytes(int64_t weights) const { return weights * bits / 8; }
  const Quantized* quantized_down() const { return down ? nullptr : quantized; }
  int64_t id(int64_t n) const {
    return wide_ids ? static_cast<const int64_t*>(ids_TK)[n]
                    : static_cast<const int32_t*>(ids_TK)[n];
  }
  int64_t expert(int64_t n) const { return id(n) >> kSlotBits; }
  int slot(int64_t n) const { return id(n) & (kSlots - 1); }
};

struct Expert {
  int64_t id, rows;
  int64_t atoms;  // F
  const char *gate_up, *down;
  // For codes: down's scale rows of this expert, and where its part of table_rows_F begins.
  int64_t first_scale_row = 0, scale_rows = 0, table_rows = 0;
};

// Rows of one expert and one range of tokens, computed together.
struct Block {
  int64_t first;
  int count;
  int64_t words;  // index of the OR of its rows' words
  int64_t first_segment, last_segment;
};

struct Segment {
  int64_t first, count;  // in atoms; both even, within one stretch
};

// The segments, of ascending ones, that overlap with another one.
inline std::span<const Segment> overlapping(std::span<const Segment> segments,
                                            const Segment& with) {
  const auto begin = std::partition_point(
      segments.begin(), segments.end(),
      [&](const Segment& segment) { return segment.first + segment.count <= with.first; });
  const auto end = std::partition_point(begin, segments.end(), [&](const Segment& segment) {
    return segment.first < with.first + with.count;
  });
  return {begin, end};
}

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

  std::vector<Expert> experts;  // only those with rows
  std::vector<Block> blocks;
  std::vector<int64_t> blocks_ER1;  // first block of every expert and range
  std::vector<uint32_t> words;
  std::vector<Segment> segments;
  std::vector<Tile> tiles;

  std::vector<Row> x_NH;  // gathered for AMX, or converted (then one row per token)
  std::vector<Row> hidden_NF;
  int64_t hidden_stride = 0;

  // For codes: the row in a table of scales of each element of H, or of each atom of `experts`.
  std::vector<int32_t> table_rows_H, table_rows_F;
  std::vector<float> scratch;
  std::vector<int64_t> bounds;  // for sorting

  // Blocks of one expert: of `ranges` ranges, from blocks_ER1[at] on.
  std::span<const Block> blocks_of(int64_t at, int64_t ranges) const {
    return {blocks.data() + blocks_ER1[at], blocks.data() + blocks_ER1[at + ranges]};
  }
  std::span<const Segment> segments_of(const Block& block) const {
    return {segments.data() + block.first_segment, segments.data() + block.last_segment};
  }
};

// Computes the OR of the words of the block's rows, and the segments of atoms that they use.
template <class D>
void plan_block(Plan<D>& plan, const Call& call, const Expert& expert, Block& block) {
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
  // Bits beyond the expert's atoms do not count.
  if (const int64_t rest = call.width(expert.id) % kTileAtoms) used[tiles - 1] &= (1u << rest) - 1;
  block.first_segment = plan.segments.size();
  for (int64_t tile = 0; tile < tiles; ++tile) {
    if (!used[tile]) continue;
    int64_t first = tile * kTileAtoms + __builtin_ctz(used[tile]) / 2 * 2;
    int64_t end = (tile + 1) * kTileAtoms - __builtin_clz(used[tile]) / 2 * 2;
    if (kUsesAmx<D>) {  // AMX sums whole tiles: their bounds must not depend on the block
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

// Finds the rows of down's scales for an expert's atoms, relative to its first. Padding uses row 0.
template <class D>
void plan_scales(Plan<D>& plan, const Call& call, Expert& expert) {
  const int64_t first = call.offsets_E1[expert.id], width = call.width(expert.id);
  const ScaleTable& table = call.quantized->tables[2];
  const int16_t* rows = table.rows_P;
  expert.table_rows = plan.table_rows_F.size();
  plan.table_rows_F.resize(expert.table_rows + expert.atoms, 0);
  if (!width) return;
  int32_t* to = plan.table_rows_F.data() + expert.table_rows;
  expert.first_scale_row = rows ? table.firsts_E[expert.id] : first;
  for (int64_t atom = 0; atom < width; ++atom) to[atom] = rows ? rows[first + atom] : atom;
  expert.scale_rows = *std::max_element(to, to + width) + 1;
}

// Sorts the routed rows of tokens begin..end, `range` tokens at a time, and finds the work.
template <class D>
void plan_tokens(Plan<D>& plan, const Call& call, int64_t begin, int64_t end, int64_t range) {
  // Keys: expert, range, and the rank of the slot among those that occur.
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
  // Now every bound marks the end of its key's rows.
  plan.experts.clear(), plan.blocks.clear(), plan.blocks_ER1.clear();
  plan.words.clear(), plan.segments.clear(), plan.tiles.clear(), plan.table_rows_F.clear();
  int64_t padded = 0, first = 0;
  for (int64_t id = 0; id < call.E; ++id) {
    const int64_t atoms = round_up(call.width(id), 2);
    const int sides = call.activation.sides();
    const int64_t before = padded * call.H;
    const char* gate_up =
        static_cast<const char*>(call.packed) + call.bytes((sides + !call.down) * before);
    const char* down =
        call.down ? static_cast<const char*>(call.down) + sizeof(typename D::Element) * before
                  : gate_up + call.bytes(sides * atoms * call.H);
    padded += atoms;
    const int64_t rows = bounds[(id + 1) * ranges * num_slots - 1] - first;
    if (!rows) continue;
    const int64_t index = plan.experts.size(), first_block = plan.blocks.size();
    plan.experts.push_back({id, rows, atoms, gate_up, down});
    if (call.quantized_down()) plan_scales(plan, call, plan.experts.back());
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

// Whether rows have another type than the activations, so that each token is converted once.
template <class D>
constexpr bool kConverts = !std::is_same_v<typename D::Row, typename D::Element>;

// Number of rows that a call prepares: one per token; or one per routed row for AMX, which reads
// rows at equal distances; or none.
template <class D>
int64_t rows_to_prepare(int64_t tokens, int64_t routed) {
  return kConverts<D> ? tokens : kUsesAmx<D> && tokens > 1 ? routed : 0;
}

// Prepares one row; all threads take part.
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

}  // namespace
