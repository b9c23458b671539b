// First pass: a row's logits into its state.
//
// A lane keeps a running maximum of each side and fp32 sums relative to them, over at most a few hundred
// columns. Across lanes, warps and blocks the sums are fp64 (exchange.cuh).
//
// Arithmetic: a pair of logits costs two exponentials here and two when the gradient is written. A
// multiprocessor's special-function unit makes 16 a clock, so the four take a quarter of a clock. ForwardKL's
// instructions, counted for sm_90a, take about as much of its 128 issue slots a clock. So a polynomial of
// FMAs in the place of an exponential would cost what it frees. held.cuh keeps the exponentials where it can.
//
// Numerics: distances to the maximum are taken before they are scaled to powers of two. Logits of 1e4 keep
// their digits.
#pragma once

#include "parts.cuh"

namespace kd {

// A lane's columns of one side. e = 2^(d * factor), d = logit - reference, before the temperature.
struct LaneSide {
  float reference = (float)kNoReference;
  float sum_exp = 0, sum_exp_shift = 0, sum_exp_t1 = 0;  // sum e, sum e d, sum e at temperature 1
  int top_at = 0;                                        // first column of the vector that holds the maximum
};

struct LaneState {
  LaneSide student, teacher;
  float cross = 0;       // sum e (d_t - d_s), with the e of the side that the divergence weights by
  float sum_logits = 0;  // sum of the student's logits less a base, for label smoothing
};

KD_DEVICE float highest(const float (&v)[kVector]) {
  float best = v[0];
#pragma unroll
  for (int k = 1; k < kVector; ++k) best = fmaxf(best, v[k]);
  return best;
}

// Moves a side's sums to the maximum of it and a tile, `columns[i]` the tile's vectors' first ones.
// kStats: with what statistics and entropies are made of, sum_exp_shift and the top's column.
template <bool kStats, int kTile>
KD_DEVICE LaneRise raise(LaneSide& side, const float (&z)[kTile][kVector], const int (&columns)[kTile],
                         float factor, bool t1) {
  float best = side.reference;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    const float here = highest(z[i]);
    if (kStats) side.top_at = here > best ? columns[i] : side.top_at;
    best = fmaxf(best, here);
  }
  const float up = best - side.reference, decay = fast_exp2(-up * factor);
  if (t1) side.sum_exp_t1 *= fast_exp2(-up * kLog2e);
  if (kStats) side.sum_exp_shift = moved(side.sum_exp_shift, side.sum_exp, decay, -up);
  side.sum_exp *= decay;
  side.reference = best;
  return {up, decay};
}

// Adds a logit at distance d; returns e.
template <bool kStats>
KD_DEVICE float add(LaneSide& side, float d, float factor) {
  const float e = fast_exp2(d * factor);
  side.sum_exp += e;
  if (kStats)
    if (e > 0) side.sum_exp_shift += e * d;
  return e;
}

template <int kTile>
KD_DEVICE void add_t1(LaneSide& side, const float (&z)[kTile][kVector]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) side.sum_exp_t1 += fast_exp2((z[i][k] - side.reference) * kLog2e);
  }
}

template <Kind kKind, bool kStats, int kTile>
KD_DEVICE void fold_tile(LaneState& r, const float (&s)[kTile][kVector], const float (&t)[kTile][kVector],
                         const int (&columns)[kTile], float factor, const PassFlags& flags) {
  constexpr bool kTeacher = kKind != kNone, kReverse = kKind == kReverseKL;
  const float sum_exp = kReverse ? r.student.sum_exp : r.teacher.sum_exp;  // which the cross sum moves by
  const LaneRise rise_s = raise<kStats>(r.student, s, columns, factor, flags.hard_t1);
  if constexpr (kTeacher) {
    const LaneRise rise_t = raise<kStats>(r.teacher, t, columns, factor, flags.teacher_t1);
    if constexpr (kReverse || needs_cross_t(kKind))
      r.cross = moved(r.cross, sum_exp, kReverse ? rise_s.decay : rise_t.decay, rise_s.up - rise_t.up);
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float d_s = s[i][k] - r.student.reference, e_s = add<kStats>(r.student, d_s, factor);
      if constexpr (kTeacher) {
        const float d_t = t[i][k] - r.teacher.reference, e_t = add<kStats>(r.teacher, d_t, factor);
        const float weight = kReverse ? e_s : e_t;
        if constexpr (kReverse || needs_cross_t(kKind))
          if (weight > 0) r.cross += weight * (d_t - d_s);
      }
    }
  }
  if (flags.hard_t1) add_t1(r.student, s);
  if (kTeacher && flags.teacher_t1) add_t1(r.teacher, t);
}

// Sum only columns inside the row. What is outside is -inf and must not enter.
KD_DEVICE void add_logits(float& sum, const float (&s)[kVector], float base, Present present) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) sum += present(k) ? s[k] - base : 0.0f;
}

// A lane's part of its warp's state, at the warp's reference. The caller adds the label's logit and the top's
// column.
struct WarpSide {
  SideState state;
  LaneRise rise;
};
KD_DEVICE WarpSide across_lanes(const LaneSide& lane, float factor, double temperature, bool t1) {
  WarpSide found;
  SideState& side = found.state;
  const float reference = highest_of_warp(lane.reference), up = reference - lane.reference;
  const float decay = fast_exp2(-up * factor);
  side.reference = reference;
  side.sum_exp = lane.sum_exp * decay;
  side.sum_exp_shift = moved(lane.sum_exp_shift, lane.sum_exp, decay, -up) * (1 / temperature);
  side.sum_exp_t1 = t1 ? lane.sum_exp_t1 * fast_exp2(-up * kLog2e) : temperature == 1 ? side.sum_exp : 0.0;
  found.rise = {up, decay};
  return found;
}

template <Kind kKind>
KD_DEVICE RowState across_lanes(const LaneState& lane, float factor, double temperature,
                                const PassFlags& flags) {
  RowState r;
  const WarpSide student = across_lanes(lane.student, factor, temperature, flags.hard_t1);
  r.student = student.state;
  r.student.sum_logits = lane.sum_logits;
  if constexpr (kKind == kNone) return r;
  const WarpSide teacher = across_lanes(lane.teacher, factor, temperature, flags.teacher_t1);
  r.teacher = teacher.state;
  const float shift = student.rise.up - teacher.rise.up;
  if constexpr (needs_cross_t(kKind))
    r.pair.cross_t = moved(lane.cross, lane.teacher.sum_exp, teacher.rise.decay, shift) * (1 / temperature);
  if constexpr (kKind == kReverseKL)
    r.pair.cross_s = moved(lane.cross, lane.student.sum_exp, student.rise.decay, shift) * (1 / temperature);
  return r;
}

// What label smoothing's sum of the logits is relative to, so that it keeps its digits where all of them are
// far from 0: the label's logit, to which the loss compares them, or another of this chunk.
template <class Row>
KD_DEVICE float sum_base(const Row& row) {
  const Job& job = row.job;
  const int64_t at = job.labels == nullptr ? 0 : job.labels[row.row] - job.offset;
  const int64_t inside = at < 0 ? 0 : at < job.width ? at : job.width - 1;
  Side memory = row.student();
  memory.resident = -1;
  const float found = logit<typename Row::Types>(memory, (int)inside + row.lead);
  return found - found == 0 ? found : 0;
}

// The index in the vocabulary of the first of the warp's columns that holds its maximum `top`; the chunk's
// offset where none does (NaN). `lane`: what this lane folded of the side.
template <class Row>
KD_DEVICE double top_column(const Row& row, const Side& side, const StoredIds& ids, const LaneSide& lane,
                            double top) {
  const int vector = lowest_of_warp(lane.reference == (float)top ? lane.top_at : INT32_MAX);
  const int column = vector + row.lane;
  const bool is_top = row.lane < kVector && column >= row.first() && column < row.end() &&
                      logit<typename Row::Types>(side, column) == (float)top &&
                      !(!Row::kTeacher && ids.contains(column));
  const unsigned found = lanes_where(is_top);
  return (double)(found ? row.offset() + vector + lowest_bit(found) : row.job.offset);
}

KD_DEVICE void leave_out(const StoredIds& ids, int start, float (&s)[kVector]) {
  if (!ids.any()) return;
  ids.each(start, [&](int64_t, int place, bool mine) {
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (mine && k == place) s[k] = -kInf;
  });
}

// The lanes' sums as this warp's part. Of the sum with two sides' logits the temperature is left out.
template <class Row>
KD_DEVICE void publish_part(Row& row, const LaneState& lane, float factor) {
  const RowState r = across_lanes<Row::kKind>(lane, factor, 1.0, row.flags());
  const Parts part = added(Parts{{r.student.sum_exp, r.teacher.sum_exp, r.pair.cross_s + r.pair.cross_t},
                                 (float)r.student.reference,
                                 (float)r.teacher.reference});
  if (row.lane == 0) row.shared.warp_parts[row.warp] = part;
}

// The lanes' sums as this warp's state.
template <class Row>
KD_DEVICE void publish(Row& row, const LaneState& lane, const StoredIds& ids, float factor, float base) {
  if constexpr (Row::Types::kLean) return publish_part(row, lane, factor);
  const PassFlags flags = row.flags();
  RowState r = across_lanes<Row::kKind>(lane, factor, row.temperature(), flags);
  const int columns = row.end() - row.first();
  if (row.lane == 0 && columns > 0) r.student.sum_logits += (double)base * columns;
  if (flags.stats) {
    r.student.top_logit = r.student.reference;
    r.student.top_index = top_column(row, row.student(), ids, lane.student, r.student.top_logit);
  }
  if (Row::kTeacher && flags.stats) {
    r.teacher.top_logit = r.teacher.reference;
    r.teacher.top_index = top_column(row, row.teacher(), ids, lane.teacher, r.teacher.top_logit);
  }
  const int at = row.label();
  if (at >= row.first() && at < row.end()) {
    if (flags.label) r.student.label_logit = logit<typename Row::Types>(row.student(), at);
    if (Row::kTeacher && flags.teacher_label)
      r.teacher.label_logit = logit<typename Row::Types>(row.teacher(), at);
  }
  write_fold<Row::kKind>(&row.shared.warps[row.warp], r);
}

template <class Row>
KD_DEVICE float label_logit(const Row& row) {
  if (!row.plan.flags.label || row.label() < 0) return 0;
  Side memory = row.student();
  memory.resident = -1;
  return logit<typename Row::Types>(memory, row.label());
}

// What the passes after the exchange need of the row.
template <class Row>
KD_DEVICE void read_early(Row& row) {
  row.early_weights = row.weights();
  row.label_logit = label_logit(row);
}

// The state of this warp's columns, into the block's memory.
template <class Row>
KD_DEVICE void fold(Row& row, const StoredIds& ids) {
  constexpr int kTile = Row::Types::kTile;
  LaneState r;
  const Side student = row.student(), teacher = row.teacher();
  const PassFlags flags = row.flags();
  const float factor = log2e_over(row.temperature()), base = flags.smooth ? sum_base(row) : 0;
  if (Row::Types::kLean && row.warp == 0) read_early(row);
  row.template each_step<kTile * kStep>(true, false, [&](auto step, int start, int end) {
    float s[kTile][kVector], t[kTile][kVector];
    int columns[kTile];
#pragma unroll
    for (int i = 0; i < kTile; ++i) columns[i] = start + i * kStep + row.lane * kVector;
    load_step<Row>(step, student, teacher, end, columns, s, t);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      if (flags.smooth) add_logits(r.sum_logits, s[i], base, {row.lead - columns[i], end - columns[i]});
      if constexpr (!Row::kTeacher) leave_out(ids, start + i * kStep, s[i]);
    }
    if (flags.shifts)
      fold_tile<Row::kKind, true>(r, s, t, columns, factor, flags);
    else
      fold_tile<Row::kKind, false>(r, s, t, columns, factor, flags);
  });
  publish(row, r, ids, factor, base);
}

}  // namespace kd
