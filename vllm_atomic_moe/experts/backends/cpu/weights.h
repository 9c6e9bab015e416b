// The weights of a tile or of a block of down, plain or codes, times rows.
//
// Codes are decoded in registers where an expert has few rows; where it has more, once into a
// thread's scratch for the kernels of plain weights: as float32, which gives the same bits, but as
// bfloat16 where rows are. Which of the two follows from the routing alone.

#pragma once

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

// What codes are decoded to: a type with rows like those of D.
template <class D>
using Decoded = std::conditional_t<std::is_same_v<typename D::Row, float>, Float32, D>;

// Calls `body` with the type of a layer's codes.
template <class Row, class Body>
void with_codes(const Quantized& quantized, const Body& body) {
  if (quantized.code == kE4M3) return body(Codes<Row, 8, false>());
  if (quantized.zeros()) return body(Codes<Row, 4, true>());
  body(Codes<Row, 4, false>());
}

// Panels of one expert's columns; elements of the summed dimension are counted from its first.
template <class D>
struct Weights {
  const char* packed;
  int64_t columns;
  int64_t rows;                // that are multiplied with them in all
  const Quantized* quantized;  // or null
  TableScales scales{};
  typename Decoded<D>::Unit* scratch = nullptr;
  int64_t scratch_first = 0;

  bool decodes_ahead() const { return quantized && rows > kFewRows; }

  // What `multiply` needs of elements first..first+count, even numbers, until the next call.
  void prepare(int64_t first, int64_t count) {
    if (!decodes_ahead()) return;
    scratch_first = first;
    with_codes<typename D::Row>(*quantized, [&](auto type) {
      decode<Decoded<D>>(codes<decltype(type)>(first, count), scratch);
    });
  }

  // Products of some rows and elements first..first+count, [rows][64]; added unless `fresh`.
  void multiply(const typename D::Row* const* rows_of_block, int block_rows, int64_t first,
                int64_t count, float* product, bool fresh) const {
    if (quantized && !decodes_ahead())
      return with_codes<typename D::Row>(*quantized, [&](auto type) {
        using C = decltype(type);
        ::multiply<C, kFewRows>(rows_of_block, block_rows, codes<C>(first, count), product, fresh);
      });
    if (quantized)
      return multiply_panel<Decoded<D>>(scratch, round_up(columns, kWidth), rows_of_block,
                                        block_rows, first - scratch_first, count, product, fresh);
    multiply_panel<D>(reinterpret_cast<const typename D::Unit*>(packed), columns, rows_of_block,
                      block_rows, first, count, product, fresh);
  }

 private:
  template <class Type>
  void multiply_panel(const typename Type::Unit* units, int64_t wide,
                      const typename D::Row* const* rows_of_block, int block_rows, int64_t first,
                      int64_t count, float* product, bool fresh) const {
    multiply_block<Type>(rows_of_block, block_rows, rows_at_once<D>(rows),
                         {units + first / Type::kPerUnit * wide, count / Type::kPerUnit, wide},
                         product, fresh);
  }
  template <class C>
  Panel<C> codes(int64_t first, int64_t count) const {
    return {reinterpret_cast<const uint8_t*>(packed) + first / C::kPerUnit * columns,
            count / C::kPerUnit, columns, {scales.table, scales.rows + first, scales.meanings}};
  }
};

// What a thread decodes codes with.
template <class D>
struct Scratch {
  float* table;
  typename Decoded<D>::Unit* units;
};

// One tile: gate | up, or up alone; sums over H.
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
  weights.prepare(0, call.H);
  return weights;
}

// 64 columns of down; sums over atoms.
template <class D>
Weights<D> down_weights(const Plan<D>& plan, const Call& call, const Expert& expert,
                        int64_t column, const Scratch<D>& scratch) {
  Weights<D> weights{expert.down + call.bytes(column * expert.atoms),
                     std::min<int64_t>(kPanelColumns, call.H - column), expert.rows,
                     call.quantized};
  if (!call.quantized) return weights;
  fill_down(*call.quantized, expert.id, expert.first_scale_row, expert.scale_rows, column, call.H,
            scratch.table);
  weights.scales = {scratch.table, plan.table_rows_F.data() + expert.table_rows,
                    &kMeanings[call.quantized->code]};
  weights.scratch = scratch.units;
  return weights;
}

}  // namespace
