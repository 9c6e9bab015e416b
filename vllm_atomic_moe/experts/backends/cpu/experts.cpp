// Fused experts of any width over packed tiles: routing, the two GEMMs, and the packing.
//
// A plain C interface, loaded by ctypes: without torch's headers it compiles in seconds. Results
// are the same for any number of threads, since every sum is made by one of them, in one order.
//
// Legend: T tokens, K experts per token, N = T·K routed rows, E experts, H hidden size, R runs per
// expert, F atoms of an expert, padded to an even number.
//
// An expert is (for units, panels and halves see panels.h)
//   ⌈F/32⌉ panels that sum over H: gate of 32 atoms | up of the same atoms, then
//   ⌈H/64⌉ panels that sum over F: 64 columns of the output,
// the last of each as narrow as what is left.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <vector>

#include "panels.h"

namespace {

constexpr int kTileAtoms = 32;
constexpr int kSegmentAtoms = 2048;  // of a down panel: 256 KiB, which stay in L2
constexpr int64_t kScratchBytes = 64ll << 20;
constexpr int64_t kTokenRange = 512;  // sums of so many tokens: 128 KiB of a thread's stack

// ---- what one call has to do --------------------------------------------------------------------

struct Call {
  const void* x_TH;
  const void* packed;
  const int64_t* offsets_E1;
  const int32_t* runs_ER2;
  const float* weights_TK;
  const int64_t* ids_TK;
  void* out_TH;
  int64_t T, K, E, R, H;
};

struct Expert {
  int64_t begin, end;  // routed rows, sorted by token
  int64_t atoms;       // F
  int64_t first_segment, last_segment;
  const Unit *gate_up, *down;
};

struct Tile {
  int64_t expert, index;
  uint32_t used;  // atoms of the tile that are in a run
};

struct Segment {
  int64_t first, count;  // atoms, both even
};

struct Plan {
  std::vector<Expert> experts;
  std::vector<Tile> tiles;
  std::vector<Segment> segments;
  std::vector<int64_t> tokens_N;
  std::vector<float> weights_N;
  std::vector<const Unit*> rows_N;
  std::vector<Unit> gathered_NH, hidden_NF;
  int64_t hidden_stride = 0;  // in elements
  // Only for building it.
  std::vector<int64_t> bounds_E1;
  std::vector<uint32_t> used;
};

// Tiles that the expert's runs touch, and the stretches of atoms that they cover; what of a run lies
// outside the expert is left out.
void plan_runs(Plan& plan, const Call& call, int64_t id, int64_t expert) {
  const int64_t offset = call.offsets_E1[id], atoms = call.offsets_E1[id + 1] - offset;
  plan.used.assign(ceil_div(atoms, kTileAtoms), 0);
  for (int64_t run = 0; run < call.R; ++run) {
    const int32_t* run_2 = call.runs_ER2 + (id * call.R + run) * 2;
    const int64_t first = run_2[0] - offset, last = std::min(atoms, first + run_2[1]);
    for (int64_t at = std::max<int64_t>(0, first); at < last;) {
      const int64_t tile = at / kTileAtoms, end = std::min(last, (tile + 1) * kTileAtoms);
      plan.used[tile] |= static_cast<uint32_t>(((1ull << (end - at)) - 1) << at % kTileAtoms);
      at = end;
    }
  }
  const size_t first_segment = plan.segments.size();
  for (size_t tile = 0; tile < plan.used.size(); ++tile) {
    const uint32_t used = plan.used[tile];
    if (!used) continue;
    plan.tiles.push_back({expert, static_cast<int64_t>(tile), used});
    const int64_t first = tile * kTileAtoms + __builtin_ctz(used) / 2 * 2;
    const int64_t last = (tile + 1) * kTileAtoms - __builtin_clz(used) / 2 * 2;
    Segment* before = plan.segments.size() > first_segment ? &plan.segments.back() : nullptr;
    if (before && before->first + before->count == first && last - before->first <= kSegmentAtoms)
      before->count = last - before->first;
    else
      plan.segments.push_back({first, last - first});
  }
}

// Sorts the routed rows of tokens begin..end by expert and finds the work of every expert.
template <class D>
void plan_tokens(Plan& plan, const Call& call, int64_t begin, int64_t end) {
  auto& bounds = plan.bounds_E1;
  bounds.assign(call.E + 1, 0);
  const auto valid = [&](int64_t id) { return id >= 0 && id < call.E; };
  for (int64_t n = begin * call.K; n < end * call.K; ++n)
    if (valid(call.ids_TK[n])) ++bounds[call.ids_TK[n] + 1];
  for (int64_t id = 0; id < call.E; ++id) bounds[id + 1] += bounds[id];
  plan.experts.clear(), plan.tiles.clear(), plan.segments.clear();
  int64_t padded = 0;
  for (int64_t id = 0; id < call.E; ++id) {
    const int64_t atoms = round_up(call.offsets_E1[id + 1] - call.offsets_E1[id], 2);
    const auto* units = static_cast<const Unit*>(call.packed) + 3 * padded * call.H / D::kPerUnit;
    padded += atoms;
    if (bounds[id] == bounds[id + 1]) continue;
    const int64_t segments = plan.segments.size();
    plan_runs(plan, call, id, plan.experts.size());
    plan.experts.push_back({bounds[id], bounds[id + 1], atoms, segments,
                            int64_t(plan.segments.size()), units,
                            units + 2 * atoms * call.H / D::kPerUnit});
  }
  plan.tokens_N.resize(bounds[call.E]);
  plan.weights_N.resize(bounds[call.E]);
  plan.rows_N.resize(bounds[call.E]);
  for (int64_t n = begin * call.K; n < end * call.K; ++n) {
    if (!valid(call.ids_TK[n])) continue;
    const int64_t row = bounds[call.ids_TK[n]]++, token = n / call.K;
    plan.tokens_N[row] = token;
    plan.weights_N[row] = call.weights_TK[n];
    plan.rows_N[row] = static_cast<const Unit*>(call.x_TH) + token * call.H / D::kPerUnit;
  }
}

// AMX reads rows at equal distances. Run by all threads.
template <class D>
void gather_rows(Plan& plan, const Call& call) {
  const int64_t units = call.H / D::kPerUnit;
#pragma omp for schedule(static)
  for (int64_t row = 0; row < int64_t(plan.rows_N.size()); ++row) {
    Unit* to = plan.gathered_NH.data() + row * units;
    std::memcpy(to, plan.rows_N[row], sizeof(Unit) * units);
    plan.rows_N[row] = to;
  }
}

// ---- the two GEMMs ------------------------------------------------------------------------------

__m512 exponential(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  rest = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), rest);
  __m512 sum = _mm512_set1_ps(1.f / 5040);
  for (float factor : {1.f / 720, 1.f / 120, 1.f / 24, 1.f / 6, 0.5f, 1.f, 1.f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, n);
}

__m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1), most = _mm512_set1_ps(100);
  // e^100 is infinite and e^-100 too small to change 1, which far larger exponents would miss.
  const __m512 minus_x = _mm512_sub_ps(_mm512_setzero_ps(), x);
  const __m512 clamped =
      _mm512_max_ps(_mm512_sub_ps(_mm512_setzero_ps(), most), _mm512_min_ps(most, minus_x));
  return _mm512_div_ps(x, _mm512_add_ps(one, exponential(clamped)));
}

// h = SiLU(gate x) ⊙ (up x) of one tile for all rows of its expert; zero for atoms in no run.
template <class D>
void gate_up_tile(Plan& plan, const Call& call, const Tile& tile) {
  const Expert& expert = plan.experts[tile.expert];
  const int half = std::min<int64_t>(kTileAtoms, expert.atoms - tile.index * kTileAtoms);
  const int64_t steps = call.H / D::kPerUnit;
  const Panel panel{expert.gate_up + tile.index * kPanelColumns * steps, steps, half};
  auto* hidden =
      reinterpret_cast<typename D::Element*>(plan.hidden_NF.data()) + tile.index * kTileAtoms;
  const int at_once = rows_at_once<D>(expert.end - expert.begin);
  alignas(64) float product[kAmxRows * kPanelColumns];
  for_row_blocks(expert.begin, expert.end, at_once, [&](int64_t first, int count) {
    multiply<D>(&plan.rows_N[first], count, at_once, panel, product);
    for (int r = 0; r < count; ++r)
      for (int j = 0; j < kTileAtoms; j += 16) {
        const float* gate = product + r * kPanelColumns + j;
        const __m512 h = _mm512_maskz_mul_ps(tile.used >> j & 0xffff, silu(_mm512_loadu_ps(gate)),
                                             _mm512_loadu_ps(gate + kTileAtoms));
        D::store(hidden + (first + r) * plan.hidden_stride + j, h, 0xffff);
      }
  });
}

// 64 columns of the output of tokens begin..end: experts in ascending order, whoever computes them.
template <class D>
void down_block(const Plan& plan, const Call& call, int64_t begin, int64_t end, int64_t block) {
  const int64_t column = block * kPanelColumns;
  const int half = std::min<int64_t>(kPanelColumns, call.H - column) / 2;
  alignas(64) float sums[kTokenRange * kPanelColumns];
  std::fill_n(sums, (end - begin) * kPanelColumns, 0.f);
  alignas(64) float product[kAmxRows * kPanelColumns];
  for (const Expert& expert : plan.experts) {
    const auto rows = plan.tokens_N.begin();
    const int64_t from = std::lower_bound(rows + expert.begin, rows + expert.end, begin) - rows;
    const int64_t to = std::lower_bound(rows + from, rows + expert.end, end) - rows;
    const int at_once = rows_at_once<D>(expert.end - expert.begin);
    for (int64_t index = expert.first_segment; index < expert.last_segment; ++index) {
      const Segment& segment = plan.segments[index];
      const int64_t skipped = segment.first / D::kPerUnit;
      const Panel panel{expert.down + (column * expert.atoms / D::kPerUnit) + skipped * 2 * half,
                        segment.count / D::kPerUnit, half};
      for_row_blocks(from, to, at_once, [&](int64_t first, int count) {
        const Unit* hidden[kAmxRows];
        for (int r = 0; r < count; ++r)
          hidden[r] =
              plan.hidden_NF.data() + (first + r) * plan.hidden_stride / D::kPerUnit + skipped;
        multiply<D>(hidden, count, at_once, panel, product);
        for (int r = 0; r < count; ++r) {
          float* sum = sums + (plan.tokens_N[first + r] - begin) * kPanelColumns;
          const __m512 weight = _mm512_set1_ps(plan.weights_N[first + r]);
          for (int j = 0; j < kPanelColumns; j += 16)
            _mm512_storeu_ps(
                sum + j, _mm512_fmadd_ps(weight, _mm512_loadu_ps(product + r * kPanelColumns + j),
                                         _mm512_loadu_ps(sum + j)));
        }
      });
    }
  }
  for (int64_t token = begin; token < end; ++token) {
    auto* out = static_cast<typename D::Element*>(call.out_TH) + token * call.H + column;
    const float* sum = sums + (token - begin) * kPanelColumns;
    for (int j = 0; j < 32; j += 16) {
      D::store(out + j, _mm512_loadu_ps(sum + j), lanes(half - j));
      D::store(out + half + j, _mm512_loadu_ps(sum + 32 + j), lanes(half - j));
    }
  }
}

// Scratch never shrinks, or growing again would clear it every time.
void grow(std::vector<Unit>& scratch, size_t size) {
  if (scratch.size() < size) scratch.resize(size);
}

template <class D>
void fused_experts(const Call& call, int threads) {
  static thread_local Plan plan;  // keeps its memory for the next call
  int64_t widest = 0;
  for (int64_t id = 0; id < call.E; ++id)
    widest = std::max(widest, call.offsets_E1[id + 1] - call.offsets_E1[id]);
  plan.hidden_stride = round_up(widest, kTileAtoms);
  const bool gather = kUsesAmx<D> && call.T > 1;
  const int64_t elements = plan.hidden_stride + (gather ? call.H : 0);
  const int64_t scratch_bytes = call.K * elements * sizeof(typename D::Element);
  const int64_t chunk = std::max<int64_t>(1, kScratchBytes / std::max<int64_t>(1, scratch_bytes));
  const int64_t blocks = ceil_div(call.H, kPanelColumns);
  for (int64_t begin = 0; begin < call.T; begin += chunk) {
    const int64_t end = std::min(call.T, begin + chunk);
    plan_tokens<D>(plan, call, begin, end);
    const size_t routed = plan.rows_N.size();
    grow(plan.hidden_NF, routed * plan.hidden_stride / D::kPerUnit);
    if (gather) grow(plan.gathered_NH, routed * call.H / D::kPerUnit);
    // Long ranges of tokens read a panel seldom, short ones occupy all threads.
    int64_t range = std::min(end - begin, kTokenRange);
    while (range > 64 && blocks * ceil_div(end - begin, range) < 4 * threads) range /= 2;
    const int64_t ranges = ceil_div(end - begin, range);
    Plan& shared = plan;  // the calling thread's
#pragma omp parallel num_threads(threads)
    {
      if (gather) gather_rows<D>(shared, call);
#pragma omp for schedule(dynamic)
      for (int64_t tile = 0; tile < int64_t(shared.tiles.size()); ++tile)
        gate_up_tile<D>(shared, call, shared.tiles[tile]);
// Ranges inside: threads that work on one block share its panels in L3.
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < blocks * ranges; ++task) {
        const int64_t first = begin + task % ranges * range;
        down_block<D>(shared, call, first, std::min(end, first + range), task / ranges);
      }
    }
  }
}

// ---- packing ------------------------------------------------------------------------------------

// Stores the transposed of 16 rows of 16 units: `columns` columns of `steps` steps of a panel.
void store_transposed(__m512i (&v)[16], Unit* to, int64_t stride, int64_t columns, int64_t steps) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(v[i], v[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(v[i], v[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      v[i + 2 * j] = _mm512_unpacklo_epi64(t[i + j], t[i + j + 2]);
      v[i + 2 * j + 1] = _mm512_unpackhi_epi64(t[i + j], t[i + j + 2]);
    }
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 4; ++j) {
      t[i + j] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0x88);
      t[i + j + 4] = _mm512_shuffle_i32x4(v[i + j], v[i + j + 4], 0xdd);
    }
  for (int j = 0; j < 8; ++j) {
    v[j] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0x88);
    v[j + 8] = _mm512_shuffle_i32x4(t[j], t[j + 8], 0xdd);
  }
  for (int64_t step = 0; step < steps; ++step)
    _mm512_mask_storeu_epi32(to + step * stride, lanes(columns), v[step]);
}

// The rows atoms[0..count) of a matrix, the atoms of one expert; strides in elements.
template <class D>
struct Source {
  const typename D::Element* rows;
  int64_t row_stride, column_stride;
  const int64_t* atoms;
  int64_t count, H;

  int64_t padded() const { return round_up(count, 2); }
  // Units that pair elements along H, of one atom; needs column_stride 1.
  __m512i along_columns(int64_t atom, int64_t unit, int64_t units) const {
    if (atom >= count) return _mm512_setzero_si512();
    return _mm512_maskz_loadu_epi32(lanes(units),
                                    rows + atoms[atom] * row_stride + unit * D::kPerUnit);
  }
};

// The gate half (0) or the up half (1) of one tile.
template <class D>
void pack_tile(const Source<D>& source, Unit* gate_up, int64_t tile, int side) {
  const int64_t half = std::min<int64_t>(kTileAtoms, source.padded() - tile * kTileAtoms);
  const int64_t steps = source.H / D::kPerUnit;
  Unit* panel = gate_up + tile * kPanelColumns * steps + side * half;
  for (int64_t column = 0; column < half; column += 16)
    for (int64_t step = 0; step < steps; step += 16) {
      const int64_t units = std::min<int64_t>(16, steps - step);
      __m512i rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = source.along_columns(tile * kTileAtoms + column + i, step, units);
      store_transposed(rows, panel + step * 2 * half + column, 2 * half, half - column, units);
    }
}

// A block of down_proj transposed, from rows that are stored as such, one element after another.
template <class D>
void pack_rows(const Source<D>& source, Unit* panel, int64_t first, int64_t columns) {
  const typename D::Element none[kPanelColumns] = {};
  const auto row = [&](int64_t atom) {
    return atom < source.count ? source.rows + source.atoms[atom] * source.row_stride + first
                               : none;
  };
  for (int64_t atom = 0; atom < source.padded(); atom += D::kPerUnit, panel += columns) {
    if constexpr (D::kPerUnit == 1) {
      std::memcpy(panel, row(atom), columns * sizeof(Unit));
    } else {
      const auto *low = row(atom), *high = row(atom + 1);
      for (int64_t column = 0; column < columns; ++column)
        panel[column] = low[column] | static_cast<Unit>(high[column]) << 16;
    }
  }
}

// The same from columns: what stays of 16 at a time is gathered, then transposed.
template <class D>
void pack_columns(const Source<D>& source, Unit* panel, int64_t first, int64_t columns) {
  const int64_t steps = source.padded() / D::kPerUnit, stride = round_up(steps, 16) * D::kPerUnit;
  std::vector<typename D::Element> kept(16 * stride);
  std::vector<int64_t> offsets(source.count);
  for (int64_t atom = 0; atom < source.count; ++atom)
    offsets[atom] = source.atoms[atom] * source.row_stride;
  for (int64_t column = 0; column < columns; column += 16) {
    for (int64_t i = 0; i < std::min<int64_t>(16, columns - column); ++i) {
      const auto* from = source.rows + (first + column + i) * source.column_stride;
      auto* to = kept.data() + i * stride;
      for (int64_t atom = 0; atom < source.count; ++atom) to[atom] = from[offsets[atom]];
    }
    for (int64_t step = 0; step < steps; step += 16) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i)
        rows[i] = _mm512_loadu_si512(kept.data() + i * stride + step * D::kPerUnit);
      store_transposed(rows, panel + step * columns + column, columns, columns - column,
                       std::min<int64_t>(16, steps - step));
    }
  }
}

// 64 columns of down_proj transposed.
template <class D>
void pack_block(const Source<D>& source, Unit* down, int64_t block) {
  const int64_t first = block * kPanelColumns,
                columns = std::min<int64_t>(kPanelColumns, source.H - first);
  Unit* panel = down + first * source.padded() / D::kPerUnit;
  source.column_stride == 1 ? pack_rows(source, panel, first, columns)
                            : pack_columns(source, panel, first, columns);
}

template <class D>
void pack(const Source<D>& source, Unit* expert, int projection, int threads) {
  Unit* down = expert + 2 * source.padded() * source.H / D::kPerUnit;
  const int64_t parts =
      projection == 2 ? ceil_div(source.H, kPanelColumns) : ceil_div(source.count, kTileAtoms);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t part = 0; part < parts; ++part) {
    if (projection == 2)
      pack_block(source, down, part);
    else
      pack_tile(source, expert, part, projection);
  }
}

}  // namespace

extern "C" {

// Arguments as of `kernels.fused_experts`, all contiguous; H is even. Returns 0, or 1 where memory
// is short.
int atomic_moe_fused_experts(const void* x_TH, const void* packed, const int64_t* offsets_E1,
                             const int32_t* runs_ER2, const float* weights_TK,
                             const int64_t* ids_TK, void* out_TH, int64_t T, int64_t K, int64_t E,
                             int64_t R, int64_t H, int bfloat16, int threads) try {
  const Call call{x_TH, packed, offsets_E1, runs_ER2, weights_TK, ids_TK, out_TH, T, K, E, R, H};
  bfloat16 ? fused_experts<BFloat16>(call, threads) : fused_experts<Float32>(call, threads);
  return 0;
} catch (const std::exception&) {  // of a vector that cannot grow; parallel regions allocate nothing
  return 1;
}

// Packs one projection (0 gate, 1 up, 2 down) of the expert that begins at `expert`; strides in
// elements.
void atomic_moe_pack(void* expert, int projection, const void* rows, int64_t row_stride,
                     int64_t column_stride, const int64_t* atoms, int64_t count, int64_t H,
                     int bfloat16, int threads) {
  auto* units = static_cast<Unit*>(expert);
  if (bfloat16)
    pack(Source<BFloat16>{static_cast<const uint16_t*>(rows), row_stride, column_stride, atoms,
                          count, H},
         units, projection, threads);
  else
    pack(Source<Float32>{static_cast<const float*>(rows), row_stride, column_stride, atoms, count,
                         H},
         units, projection, threads);
}

}  // extern "C"
