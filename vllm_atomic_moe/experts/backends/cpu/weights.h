// Rows times the weights, plain or codes, of a tile or of a block of down.
//
// If an expert has few rows, codes are decoded in registers. If it has more, they are decoded piece
// by piece into a thread's scratch for the kernels of plain weights: to bfloat16 if rows are
// bfloat16, else to float32, which gives the same bits. The choice depends only on the routing.

#pragma once

#include <limits>

#include "plan.h"
#include "scales.h"

namespace {

template <class D>
void multiply_block(const typename D::Row* const* rows, int count, [[maybe_unused]] int at_once,
                    const Panel<D>& panel, float* product, bool fresh) {
#ifdef __AMX_BF16__
  if constexpr (kUsesAmx<D>)
    if (at_once == kAmxRows) return multiply_amx(rows, count, panel, product, fresh);
#endif
  multiply<D>(rows, count, panel, product, fresh);
}

// The type that codes are decoded to; its rows have the type of D's.
template <class D>
using Decoded = std::conditional_t<std::is_same_v<typename D::Row, float>, Float32, D>;

// Number of elements of the summed dimension to decode at once, so that they stay in the nearest
// caches for the rows of a whole batch. AMX decodes all at once, since every product has its
// set-up.
template <class D>
constexpr int64_t kDecodedAtOnce =
    kUsesAmx<D> ? std::numeric_limits<int64_t>::max()
                : (32 << 10) / (kPanelColumns * sizeof(typename Decoded<D>::Unit)) *
                      Decoded<D>::kPerUnit;
// Number of rows that share decoded weights; their products are on a thread's stack.
constexpr int kBatchRows = kTokenRange;

// Calls `body` with the type of a layer's codes.
template <class Row, class Body>
void with_codes(const Quantized& quantized, const Body& body) {
  if (quantized.code == kE4M3) return body(Codes<Row, 8, false>());
  if (quantized.zeros()) return body(Codes<Row, 4, true>());
  body(Codes<Row, 4, false>());
}

// Weights of some columns of one expert; elements of the summed dimension count from its first one.
template <class D>
struct Weights {
  const char* packed;
  int64_t columns;
  int64_t rows;                // of the expert
  const Quantized* quantized;  // null: weights are plain
  TableScales scales{};
  typename Decoded<D>::Unit* scratch = nullptr;

  bool decodes_ahead() const { return quantized && rows > kFewRows; }

  // The first blocks, as many as `multiply` takes in one call.
  std::span<const Block> batch(std::span<const Block> blocks) const {
    size_t count = 0;
    for (int64_t batch_rows = 0; count < blocks.size(); ++count) {
      batch_rows += blocks[count].count;
      if (count && (batch_rows > kBatchRows || !decodes_ahead())) break;
    }
    return blocks.first(count);
  }

  // Computes products of a batch's rows, [rows][64], over the segments of each block: `row_at`
  // returns the rows, `segments_of` the segments. Products of blocks without segments are not
  // written.
  template <class RowAt, class SegmentsOf>
  void multiply(std::span<const Block> blocks, const RowAt& row_at, const SegmentsOf& segments_of,
                float* products) {
    int64_t first = std::numeric_limits<int64_t>::max(), end = 0;
    for (const Block& block : blocks)
      for (const Segment& segment : segments_of(block)) {
        first = std::min(first, segment.first);
        end = std::max(end, segment.first + segment.count);
      }
    for (Segment piece; first < end; first += piece.count) {
      piece = {first, end - first};
      if (decodes_ahead()) {
        piece.count = std::min(piece.count, kDecodedAtOnce<D>);
        decode_piece(piece);
      }
      float* product = products;
      for (const Block& block : blocks) {
        const std::span<const Segment> segments = segments_of(block);
        for (const Segment& segment : overlapping(segments, piece)) {
          const int64_t begin = std::max(segment.first, piece.first);
          const int64_t count =
              std::min(segment.first + segment.count, piece.first + piece.count) - begin;
          const typename D::Row* rows_of_block[kMostRows];
          for (int r = 0; r < block.count; ++r) rows_of_block[r] = row_at(block.first + r) + begin;
          multiply(rows_of_block, block.count, {begin, count}, piece, product,
                   begin == segments.front().first);
        }
        product += block.count * kPanelColumns;
      }
    }
  }

 private:
  void decode_piece(const Segment& piece) const {
    with_codes<typename D::Row>(*quantized, [&](auto type) {
      decode<Decoded<D>>(codes<decltype(type)>(piece), scratch);
    });
  }

  // Multiplies one block by the elements `of`, which are inside `piece`, the decoded part for
  // codes.
  void multiply(const typename D::Row* const* rows_of_block, int block_rows, const Segment& of,
                const Segment& piece, float* product, bool fresh) const {
    if (!quantized)
      return multiply_panel<D>(reinterpret_cast<const typename D::Unit*>(packed), columns,
                               rows_of_block, block_rows, of, product, fresh);
    if (decodes_ahead())
      return multiply_panel<Decoded<D>>(scratch, round_up(columns, kWidth), rows_of_block,
                                        block_rows, {of.first - piece.first, of.count}, product,
                                        fresh);
    with_codes<typename D::Row>(*quantized, [&](auto type) {
      using C = decltype(type);
      ::multiply<C, kFewRows>(rows_of_block, block_rows, codes<C>(of), product, fresh);
    });
  }
  template <class Type>
  void multiply_panel(const typename Type::Unit* units, int64_t wide,
                      const typename D::Row* const* rows_of_block, int block_rows,
                      const Segment& of, float* product, bool fresh) const {
    multiply_block<Type>(
        rows_of_block, block_rows, rows_at_once<D>(rows),
        {units + of.first / Type::kPerUnit * wide, of.count / Type::kPerUnit, wide, {},
         decodes_ahead()},
        product, fresh);
  }
  template <class C>
  Panel<C> codes(const Segment& of) const {
    return {reinterpret_cast<const uint8_t*>(packed) + of.first / C::kPerUnit * columns,
            of.count / C::kPerUnit,
            columns,
            {scales.table, scales.rows + of.first, scales.meanings}};
  }
};

// A thread's scratch for decoding codes.
template <class D>
struct Scratch {
  float* table;
  typename Decoded<D>::Unit* units;
};

// The weights of one tile: gate | up, or only up; products sum over H.
template <class D>
Weights<D> tile_weights(const Plan<D>& plan, const Call& call, const Tile& tile,
                        const Scratch<D>& scratch) {
  const Expert& expert = plan.experts[tile.expert];
  const int64_t first_atom = tile.index * kTileAtoms;
  const int64_t half = std::min<int64_t>(kTileAtoms, expert.atoms - first_atom);
  const int sides = call.activation.sides();
  Weights<D> weights{expert.gate_up + call.bytes(first_atom * sides * call.H), sides * half,
                     expert.rows, call.quantized};
  if (!call.quantized) return weights;
  for (int side = 0; side < sides; ++side)
    fill_side(*call.quantized, call.quantized->tables[2 - sides + side], expert.id,
              call.offsets_E1[expert.id] + first_atom, half, call.offsets_E1[expert.id + 1],
              scratch.table + side * half);
  weights.scales = {scratch.table, plan.table_rows_H.data(), &kMeanings[call.quantized->code]};
  weights.scratch = scratch.units;
  return weights;
}

// The weights of 64 columns of down; products sum over atoms.
template <class D>
Weights<D> down_weights(const Plan<D>& plan, const Call& call, const Expert& expert,
                        int64_t column, const Scratch<D>& scratch) {
  const int64_t first = column * expert.atoms;
  Weights<D> weights{
      expert.down + (call.down ? sizeof(typename D::Element) * first : call.bytes(first)),
      std::min<int64_t>(kPanelColumns, call.H - column), expert.rows, call.quantized_down()};
  if (!weights.quantized) return weights;
  fill_down(*call.quantized, expert.id, expert.first_scale_row, expert.scale_rows, column, call.H,
            scratch.table);
  weights.scales = {scratch.table, plan.table_rows_F.data() + expert.table_rows,
                    &kMeanings[call.quantized->code]};
  weights.scratch = scratch.units;
  return weights;
}

}  // namespace
