// Packs experts: rows of a checkpoint's matrices become panels.
//
// For the legend and the layout of an expert see experts.cpp.

#pragma once

#include <vector>

#include "plan.h"

namespace {

template <class Number>
using Unsigned = std::conditional_t<
    sizeof(Number) == 1, uint8_t,
    std::conditional_t<sizeof(Number) == 2, uint16_t, uint32_t>>;

// The rows atoms[0..count) of a matrix: the atoms of one expert. Strides are in elements.
template <class D>
struct Source {
  int sides;  // before down: 2 with a gate, else 1; 0 if down stands alone
  using Element = Unsigned<typename D::Element>;
  const Element* rows;
  int64_t row_stride, column_stride;
  const int64_t* atoms;
  int64_t count, H;

  int64_t padded() const { return round_up(count, 2); }
};

template <class D>
using Bits = Unsigned<typename D::Unit>;

// Joins elements into a unit, the first in the lowest bits.
template <class D>
Bits<D> join(const typename Source<D>::Element* low, const typename Source<D>::Element* high) {
  if constexpr (D::kPerUnit == 1)
    return *low;
  else
    return *low | static_cast<Bits<D>>(*high) << (8 * sizeof(Bits<D>) / D::kPerUnit);
}

constexpr int kSquare = 16;

// Turns elements of 16 lines (null for zeros) into units of 16 columns of a panel.
template <class D>
void pack_square(const typename Source<D>::Element* const* lines, int64_t steps, Bits<D>* to,
                 int64_t stride, int64_t columns) {
  alignas(64) Bits<D> square[kSquare][kSquare] = {};
  for (int64_t i = 0; i < columns; ++i) {
    if (!lines[i]) continue;
    if constexpr (sizeof *lines[i] * D::kPerUnit == sizeof(Bits<D>)) {
      std::memcpy(square[i], lines[i], steps * sizeof(Bits<D>));
    } else {
      for (int64_t step = 0; step < steps; ++step) {
        const auto* low = lines[i] + step * D::kPerUnit;
        square[i][step] = join<D>(low, low + 1);
      }
    }
  }
  if (sizeof(Bits<D>) == sizeof(float) && columns == kSquare && steps == kSquare) {
    for (int row = 0; row < kSquare; row += kWidth)
      for (int step = 0; step < kSquare; step += kWidth)
        transpose([&](int i) { return Vec::loadu(&square[row + i][step]); },
                  to + step * stride + row, stride);
    return;
  }
  for (int64_t step = 0; step < steps; ++step, to += stride)
    for (int64_t i = 0; i < columns; ++i) to[i] = square[i][step];
}

// Packs one side of a tile: gate, up, or the only one.
template <class D>
void pack_tile(const Source<D>& source, Bits<D>* gate_up, int64_t tile, int side) {
  const int64_t half = std::min<int64_t>(kTileAtoms, source.padded() - tile * kTileAtoms);
  const int64_t steps = source.H / D::kPerUnit;
  const int64_t width = source.sides * half;
  Bits<D>* panel = gate_up + tile * source.sides * kTileAtoms * steps + side * half;
  for (int64_t column = 0; column < half; column += kSquare) {
    const int64_t columns = std::min<int64_t>(kSquare, half - column);
    for (int64_t step = 0; step < steps; step += kSquare) {
      const typename Source<D>::Element* lines[kSquare];
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

// Packs a block of transposed down_proj from contiguous rows.
template <class D>
void pack_rows(const Source<D>& source, Bits<D>* panel, int64_t first, int64_t columns) {
  using Element = typename Source<D>::Element;
  const Element none[kPanelColumns] = {};
  const auto row = [&](int64_t atom) {
    return atom < source.count ? source.rows + source.atoms[atom] * source.row_stride + first
                               : none;
  };
  for (int64_t atom = 0; atom < source.padded(); atom += D::kPerUnit, panel += columns) {
    const Element *low = row(atom), *high = D::kPerUnit == 1 ? low : row(atom + 1);
    for (int64_t column = 0; column < columns; ++column)
      panel[column] = join<D>(low + column, high + column);
  }
}

// Packs the same from columns: gathers the kept atoms of 16 columns into `kept`, then transposes.
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
      const typename Source<D>::Element* lines[kSquare];
      for (int64_t i = 0; i < wide; ++i)
        lines[i] = kept + i * source.padded() + step * D::kPerUnit;
      pack_square<D>(lines, std::min<int64_t>(kSquare, steps - step),
                     panel + step * columns + column, columns, wide);
    }
  }
}

// Packs 64 columns of transposed down_proj.
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
  // Parallel regions must not allocate: an exception could not leave them.
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

}  // namespace
