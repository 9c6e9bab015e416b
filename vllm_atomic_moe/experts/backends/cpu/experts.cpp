// Fused experts of any width over packed tiles: routing, the two GEMMs, and the packing.
//
// One algorithm for every instruction set (vectors.h), behind a plain C interface that ctypes
// loads. Results depend neither on the number of threads nor on the rest of the batch, since one
// thread computes each sum, in one order. There are two exceptions, which depend on the number of
// an expert's rows: AMX is used only if they are worth its set-up; and with bf16 instructions, up
// to 4 rows multiply exact quantized weights, more rows multiply weights rounded to bf16.
//
// Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, W words,
// F atoms of an expert, padded to an even number.
//
// Layout of an expert (for units and panels see panels.h):
//   ⌈F/32⌉ panels that sum over H: gate of 32 atoms (if there is one) | up of the same atoms, then
//   ⌈H/64⌉ panels that sum over F: 64 columns of the output.
// The last panel of each kind may be narrower. If down is plain beside codes of gate and up, the
// panels of the second kind have memory of their own, expert after expert.

#include <exception>

#include "packing.h"
#include "plan.h"
#include "weights.h"

namespace {

alignas(64) constexpr float kNoBias[kTileAtoms] = {};

// Computes h of one tile for all rows of its expert. Atoms that a row's slot does not use become
// zero, even if their computed value is NaN.
template <class D>
void gate_up_tile(Plan<D>& plan, const Call& call, int64_t ranges, const Tile& tile,
                  const Scratch<D>& scratch) {
  const Expert& expert = plan.experts[tile.expert];
  const int64_t half = std::min<int64_t>(kTileAtoms, expert.atoms - tile.index * kTileAtoms);
  const int sides = call.activation.sides();
  Weights<D> weights = tile_weights(plan, call, tile, scratch);
  const int64_t first_atom = call.offsets_E1[expert.id] + tile.index * kTileAtoms;
  const float* up_bias = call.up_bias ? call.up_bias + first_atom : kNoBias;
  const float* gate_bias = call.gate_bias ? call.gate_bias + first_atom : up_bias;
  const int32_t* words = call.bits_SW + call.words_E1[expert.id] + tile.index;
  const Segment all{0, call.H};
  const auto segments_of = [&](const Block& block) {
    return std::span(&all, plan.words[block.words + tile.index] ? 1 : 0);
  };
  const auto row_at = [&](int64_t row) { return plan.rows_N[row]; };
  alignas(64) float products[kBatchRows * kPanelColumns];
  auto blocks = plan.blocks_of(tile.expert * (ranges + 1), ranges);
  while (!blocks.empty()) {
    const auto batch = weights.batch(blocks);
    blocks = blocks.subspan(batch.size());
    weights.multiply(batch, row_at, segments_of, products);
    const float* product = products;
    for (const Block& block : batch)
      for (int64_t row = block.first; row < block.first + block.count;
           ++row, product += kPanelColumns) {
        const uint32_t by_any = plan.words[block.words + tile.index];
        if (!by_any) continue;
        const uint32_t used = words[plan.slots_N[row] * call.W] & by_any;
        auto* hidden =
            plan.hidden_NF.data() + row * plan.hidden_stride + tile.index * kTileAtoms;
        const float *gate = product, *up = gate + (sides - 1) * half;
        with_kind(call.activation, [&](auto kind) {
          for (int j = 0; j < kTileAtoms; j += kWidth) {
            const Vec h = activate<decltype(kind)::value>(
                call.activation, Vec::loadu(gate + j) + Vec::loadu(gate_bias + j),
                Vec::loadu(up + j) + Vec::loadu(up_bias + j));
            store_row(hidden + j, Vec::blendv(Vec(0.f), h, lane_mask(used >> j)));
          }
        });
      }
  }
}

// Adds 64 columns of an expert's weighted bias to the sums of the tokens in `blocks`.
template <class D>
void add_bias(const Plan<D>& plan, const float* bias, int64_t columns, int64_t begin,
              std::span<const Block> blocks, float* sums) {
  for (const Block& block : blocks)
    for (int64_t row = block.first; row < block.first + block.count; ++row) {
      float* sum = sums + (plan.tokens_N[row] - begin) * kPanelColumns;
      for (int64_t j = 0; j < columns; ++j) sum[j] += plan.weights_N[row] * bias[j];
    }
}

// Computes 64 columns of the output for one range of tokens, adding experts in ascending order.
template <class D>
void down_block(const Plan<D>& plan, const Call& call, int64_t begin, int64_t end, int64_t ranges,
                int64_t range, int64_t block_of_columns, const Scratch<D>& scratch) {
  const int64_t column = block_of_columns * kPanelColumns;
  const int64_t columns = std::min<int64_t>(kPanelColumns, call.H - column);
  alignas(64) float sums[kTokenRange * kPanelColumns];
  std::fill_n(sums, (end - begin) * kPanelColumns, 0.f);
  alignas(64) float products[kBatchRows * kPanelColumns];
  const auto row_at = [&](int64_t row) {
    return plan.hidden_NF.data() + row * plan.hidden_stride;
  };
  for (size_t which = 0; which < plan.experts.size(); ++which) {
    const Expert& expert = plan.experts[which];
    const auto all_blocks = plan.blocks_of(which * (ranges + 1) + range, 1);
    if (all_blocks.empty()) continue;
    Weights<D> weights = down_weights(plan, call, expert, column, scratch);
    if (call.quantized_down()) {  // prefetch for the next expert, or the first one of the next block
      const bool last = which + 1 == plan.experts.size();
      const Expert& next = plan.experts[last ? 0 : which + 1];
      const int64_t next_column = last ? column + kPanelColumns : column;
      if (next_column < call.H)
        prefetch_down(*call.quantized, next.first_scale_row, next.scale_rows, next_column);
    }
    if (call.down_bias)
      add_bias(plan, call.down_bias + expert.id * call.H + column, columns, begin, all_blocks, sums);
    for (int64_t stretch = 0; stretch < expert.atoms; stretch += kStretchAtoms) {
      const auto segments_of = [&](const Block& block) {
        return overlapping(plan.segments_of(block), {stretch, kStretchAtoms});
      };
      auto blocks = all_blocks;
      while (!blocks.empty()) {
        const auto batch = weights.batch(blocks);
        blocks = blocks.subspan(batch.size());
        weights.multiply(batch, row_at, segments_of, products);
        const float* product = products;
        for (const Block& block : batch) {
          const bool used = !segments_of(block).empty();
          for (int64_t row = block.first; row < block.first + block.count;
               ++row, product += kPanelColumns) {
            if (!used) continue;
            float* sum = sums + (plan.tokens_N[row] - begin) * kPanelColumns;
            const Vec weight(plan.weights_N[row]);
            for (int j = 0; j < kPanelColumns; j += kWidth)
              fmadd(weight, Vec::loadu(product + j), Vec::loadu(sum + j)).store(sum + j);
          }
        }
      }
    }
  }
  for (int64_t token = begin; token < end; ++token) {
    auto* out = static_cast<typename D::Element*>(call.out_TH) + token * call.H + column;
    const float* sum = sums + (token - begin) * kPanelColumns;
    for (int64_t j = 0; j < columns; ++j) out[j] = static_cast<typename D::Element>(sum[j]);
  }
}

constexpr int64_t kAligned = 16;  // floats in a cache line, to which scratch is aligned

// Scratch never shrinks: growing it again would clear it every time.
template <class T>
void grow(std::vector<T>& scratch, size_t size) {
  if (scratch.size() < size) scratch.resize(size);
}

// Scratch that one thread needs to decode codes: a table of scales, then units; sizes in floats.
struct ScratchSizes {
  int64_t table = 0, units = 0;

  int64_t of_thread() const { return table + units; }
};

template <class D>
ScratchSizes make_scratch(Plan<D>& plan, const Call& call) {
  if (!call.quantized) return {};
  const auto& tables = call.quantized->tables;
  int64_t rows = round_up(tables[1].C, kWidth), elements = 0;
  for (const Expert& expert : plan.experts) {
    rows = std::max(rows, expert.scale_rows);
    if (expert.rows > kFewRows)
      elements = std::max({elements, call.H, std::min(expert.atoms, kStretchAtoms)});
  }
  const ScratchSizes sizes{rows * call.quantized->table_columns(),
                           std::min(elements, kDecodedAtOnce<D>) / Decoded<D>::kPerUnit *
                               kPanelColumns};
  grow(plan.scratch, sizes.of_thread() * call.threads.count + kAligned);
  plan.table_rows_H.resize(call.H);
  for (int64_t h = 0; h < call.H; ++h) plan.table_rows_H[h] = h / tables[1].columns;
  return sizes;
}

template <class D>
Scratch<D> scratch_of_thread(Plan<D>& plan, const Threads& threads, const ScratchSizes& sizes) {
  const auto begin = reinterpret_cast<uintptr_t>(plan.scratch.data());
  auto* table = reinterpret_cast<float*>(round_up(begin, kAligned * sizeof(float)));
  table += sizes.of_thread() * (threads.count > 1 ? omp_get_thread_num() : 0);
  return {table, reinterpret_cast<typename Decoded<D>::Unit*>(table + sizes.table)};
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
    // Long ranges of tokens read each panel less often; short ranges keep all threads busy.
    int64_t range = std::min(end - begin, kTokenRange);
    while (range > 64 && blocks * ceil_div(end - begin, range) < 4 * threads.workers) range /= 2;
    const int64_t ranges = ceil_div(end - begin, range);
    plan_tokens(plan, call, begin, end, range);
    const int64_t routed = plan.rows_N.size();
    grow(plan.hidden_NF, routed * plan.hidden_stride);
    const int64_t to_prepare = rows_to_prepare<D>(end - begin, routed);
    grow(plan.x_NH, to_prepare * call.H);
    point_to_rows(plan, call, begin, to_prepare > 0);
    const ScratchSizes sizes = make_scratch(plan, call);
    Plan<D>& shared = plan;  // other threads have their own `plan`
    std::atomic<int64_t> next[3] = {};
    parallel(threads, [&] {
      const Scratch<D> scratch = scratch_of_thread(shared, threads, sizes);
      if (to_prepare)
        share(next[0], to_prepare, threads,
              [&](int64_t row) { prepare_row(shared, call, begin, row); });
      share(next[1], shared.tiles.size(), threads, [&](int64_t tile) {
        gate_up_tile(shared, call, ranges, shared.tiles[tile], scratch);
      });
      // Ranges are the inner loop, so that threads working on one block share its panels in L3.
      share(next[2], blocks * ranges, threads, [&](int64_t task) {
        const int64_t first = begin + task % ranges * range;
        down_block(shared, call, first, std::min(end, first + range), ranges, task % ranges,
                   task / ranges, scratch);
      });
    });
  }
}

// Calls `body` with an element type, numbered as in Python.
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

// As `with_type`, and codes of 8 or 4 bits, each in a byte of its own before packing.
template <class Body>
void with_stored_type(int dtype, const Body& body) {
  if (dtype == 3) return body(Codes<float, 8, false>());
  if (dtype == 4) return body(Codes<float, 4, false>());
  with_type(dtype, body);
}

}  // namespace

extern "C" {

// Arguments are those of the op, all contiguous; H is even. Biases may be null, `down` is null unless
// it is plain beside codes, and `quantized` is null for plain weights. Returns 0, or 1 if memory is
// short.
int atomic_moe_fused_experts(const void* packed, const void* down, const Quantized* quantized,
                             const float* gate_bias, const float* up_bias, const float* down_bias, const int32_t* bits_SW,
                             const int64_t* words_E1, const int64_t* offsets_E1, int64_t E,
                             int64_t W, int64_t H, int dtype, int kind, float limit, float alpha,
                             float beta, const void* x_TH, const float* weights_TK,
                             const void* ids_TK, void* out_TH, int64_t T, int64_t K, int wide_ids,
                             int threads, int workers) try {
  with_type(dtype, [&](auto type) {
    using D = decltype(type);
    const int bits = quantized ? quantized->bits() : 8 * sizeof(typename D::Element);
    fused_experts<D>({x_TH,       packed,   down,      bits,      quantized,
                      gate_bias,  up_bias,  down_bias, {kind, limit, alpha, beta},
                      bits_SW,    words_E1, offsets_E1, weights_TK,
                      ids_TK,     wide_ids != 0, out_TH, T,
                      K,          E,        W,         H,
                      {threads, workers}});
  });
  return 0;
} catch (const std::exception&) {  // a vector cannot grow; parallel regions do not allocate
  return 1;
}

// Packs one projection (0 gate, 1 up, 2 down) of the expert that begins at `expert`; `sides` is 2
// with a gate, else 1, and 0 if down stands alone; strides are in elements. Returns as above.
int atomic_moe_pack(void* expert, int projection, int sides, const void* rows, int64_t row_stride,
                    int64_t column_stride, const int64_t* atoms, int64_t count, int64_t H,
                    int dtype, int threads, int workers) try {
  with_stored_type(dtype, [&](auto type) {
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
