// The first pass in a lane's registers, and how the sums of lanes and of states become one.
//
// A lane keeps its own maxima and fp32 sums relative to them, over at most a few hundred columns; across
// lanes, warps and blocks the sums are fp64 (row_state.h), each moved to the common maximum first.
//
// Arithmetic: a pair costs two exponentials here and two when the gradient is written, in all a quarter of a
// multiprocessor's clock of its special-function unit (16 a clock). ForwardKL's instructions, counted for
// sm_90a, take about as much of its issue slots (128 a clock): a polynomial of FMAs in the place of an
// exponential would cost what it frees, and fp32 exponentials that are kept need twice a bf16 pair's shared
// memory beside it. Distances to the maximum are taken before they are scaled to powers of two: logits of 1e4
// keep their digits.
#pragma once

#include <cstddef>

#include "../row_state.h"
#include "coefficients.h"
#include "side.h"

namespace kd {

// Sums over a lane's columns. d = logit - m, e = 2^(d * factor), before the temperature.
struct LaneState {
  float m_s = (float)kNothing, z_s = 0, d_s = 0;  // maximum, sum e, sum e d
  float m_t = (float)kNothing, z_t = 0, d_t = 0;
  float x = 0;               // sum e (d_t - d_s), with the e of the side that the divergence weighs by
  float z1_s = 0, z1_t = 0;  // sum e at temperature 1, where it is another
  float sum_s = 0;           // sum of the logits less a base, for label smoothing
  int at_s = 0, at_t = 0;    // first column of the vector that holds the maximum
};

// What the passes are told of a Spec.
struct Numbers {
  float factor = 0;  // log2(e) / T
  bool hard = false, teacher_hard = false, smooth = false;
  bool tempered = false;  // a hard term has a normaliser of its own
};

KD_DEVICE float highest(const float (&v)[kVector]) {
  float best = v[0];
#pragma unroll
  for (int k = 1; k < kVector; ++k) best = fmaxf(best, v[k]);
  return best;
}

// `sum` of terms relative to maxima that rise, with the decay `by`: what decays to nothing is 0, an
// infinity too, and nothing has no distance.
KD_DEVICE float moved(float sum, float z, float by, float shift) {
  return z > 0 && by > 0 ? by * (sum + z * shift) : 0.0f;
}

KD_DEVICE void note_top(const float (&v)[kVector], int column, float& best, int& at) {
  const float here = highest(v);
  at = here > best ? column : at;
  best = fmaxf(best, here);
}

// The columns of kTile vectors, `columns[i]` their first ones.
template <int kKind, int kTile>
KD_DEVICE void fold_tile(LaneState& r, const float (&s)[kTile][kVector], const float (&t)[kTile][kVector],
                         const int (&columns)[kTile], const Numbers& n) {
  constexpr bool kTeacher = kKind != kNone;
  float best_s = r.m_s, best_t = r.m_t;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    note_top(s[i], columns[i], best_s, r.at_s);
    if (kTeacher) note_top(t[i], columns[i], best_t, r.at_t);
  }
  if (n.tempered) {
    r.z1_s *= fast_exp2((r.m_s - best_s) * kLog2e);
    r.z1_t *= fast_exp2((r.m_t - best_t) * kLog2e);
  }
  const float up_s = best_s - r.m_s, by_s = fast_exp2(-up_s * n.factor);
  const float up_t = best_t - r.m_t, by_t = fast_exp2(-up_t * n.factor);
  if constexpr (needs_x_t(kKind)) r.x = moved(r.x, r.z_t, by_t, up_s - up_t);
  if constexpr (kKind == kReverseKL) r.x = moved(r.x, r.z_s, by_s, up_s - up_t);
  r.d_s = moved(r.d_s, r.z_s, by_s, -up_s);
  r.z_s *= by_s;
  r.m_s = best_s;
  if constexpr (kTeacher) {
    r.d_t = moved(r.d_t, r.z_t, by_t, -up_t);
    r.z_t *= by_t;
    r.m_t = best_t;
  }
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float d_s = s[i][k] - r.m_s, e_s = fast_exp2(d_s * n.factor);
      r.z_s += e_s;
      if (e_s > 0) r.d_s += e_s * d_s;
      if constexpr (kTeacher) {
        const float d_t = t[i][k] - r.m_t, e_t = fast_exp2(d_t * n.factor);
        r.z_t += e_t;
        if (e_t > 0) r.d_t += e_t * d_t;
        if constexpr (needs_x_t(kKind))
          if (e_t > 0) r.x += e_t * (d_t - d_s);
        if constexpr (kKind == kReverseKL)
          if (e_s > 0) r.x += e_s * (d_t - d_s);
      }
    }
  }
  if (!n.tempered) return;
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      r.z1_s += fast_exp2((s[i][k] - r.m_s) * kLog2e);
      if (kTeacher && n.teacher_hard) r.z1_t += fast_exp2((t[i][k] - r.m_t) * kLog2e);
    }
  }
}

// Added column by column and not in the tile: only what is there counts, -inf where it stands for nothing
// not.
KD_DEVICE void add_logits(LaneState& r, const float (&s)[kVector], float base, Present present) {
#pragma unroll
  for (int k = 0; k < kVector; ++k) r.sum_s += present(k) ? s[k] - base : 0.0f;
}

template <class T>
KD_DEVICE T highest_of_warp(T value) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit >>= 1) {
    const T other = from_lane_xor(value, bit);
    value = other > value ? other : value;
  }
  return value;
}

// The warp's sums of `count` numbers a lane, a power of two: lane l's v[0] is, afterwards, that of
// v[l * count / 32]. Each step halves what a lane carries on, so that few numbers cross the warp.
template <int count, int lanes = kWarp>
KD_DEVICE void add_across_warp(double* v) {
  if constexpr (lanes > 1) {
    constexpr int half = count / 2, bit = lanes / 2;
    const bool upper = (thread_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const double keep = upper ? v[i + half] : v[i], give = upper ? v[i] : v[i + half];
      v[i] = keep + from_lane_xor(give, bit);
    }
    if constexpr (half == 0) v[0] += from_lane_xor(v[0], bit);
    add_across_warp<half == 0 ? 1 : half, bit>(v);
  }
}

// RowState's sums, in the order of its columns: those of the first pass, and all.
constexpr int kFoldSums = 8, kSums = 16;
KD_DEVICE int fold_column(int i, int x_column) { return i < 2 ? 2 * i + 1 : i == 2 ? x_column : i + 3; }
KD_DEVICE int sum_column(int i) { return i < 2 ? 2 * i + 1 : i < 11 ? i + 2 : i + 6; }
static_assert(offsetof(RowState, z_s) == 8 && offsetof(RowState, z_t) == 3 * 8 &&
              offsetof(RowState, x_s) == 4 * 8 && offsetof(RowState, e_s) == 6 * 8 &&
              offsetof(RowState, sum_s) == 10 * 8 && offsetof(RowState, label_t) == 12 * 8 &&
              offsetof(RowState, value) == 17 * 8 && offsetof(RowState, slope) == 18 * 8);

// What is no sum of the lanes: the same in all of them.
KD_DEVICE void write_tops(RowState* out, const RowState& r) {
  out->m_s = r.m_s;
  out->m_t = r.m_t;
  out->top_s = r.top_s;
  out->arg_s = r.arg_s;
  out->top_t = r.top_t;
  out->arg_t = r.arg_t;
}

// The warp's state after the first pass, from lanes' parts at common maxima.
template <int kKind>
KD_DEVICE void write_fold(RowState* out, const RowState& r) {
  constexpr bool kReverse = kKind == kReverseKL;
  double sums[kFoldSums] = {r.z_s, r.z_t, kReverse ? r.x_s : r.x_t, r.e_s, r.e_t, r.z1_s, r.z1_t, r.sum_s};
  add_across_warp<kFoldSums>(sums);
  const int lane = thread_index() % kWarp;
  if (lane % 4 == 0) ((double*)out)[fold_column(lane / 4, kReverse ? 4 : 5)] = sums[0];
  if (lane != 1) return;
  write_tops(out, r);
  (kReverse ? out->x_t : out->x_s) = 0;
  out->label_s = r.label_s;
  out->label_t = r.label_t;
  out->value = out->slope = 0;
}

// The warp's state from lanes' parts at common maxima.
KD_DEVICE void write_state(RowState* out, const RowState& r) {
  double sums[kSums] = {r.z_s,  r.z_t,   r.x_s,     r.x_t,     r.e_s,   r.e_t,  r.z1_s,
                        r.z1_t, r.sum_s, r.label_s, r.label_t, r.value, r.slope};
  add_across_warp<kSums>(sums);
  const int lane = thread_index() % kWarp, i = lane / 2;
  if (lane % 2 == 0 && i < 13) ((double*)out)[sum_column(i)] = sums[0];
  if (lane == 1) write_tops(out, r);
}

// The lanes' sums at the warp's maxima, each lane's part of the warp's state. Tops, arguments and labels
// are the caller's.
template <int kKind>
KD_DEVICE RowState across_lanes(const LaneState& lane, const Numbers& n, double temperature) {
  constexpr bool kTeacher = kKind != kNone;
  const double per_temperature = 1 / temperature;
  const float m_s = highest_of_warp(lane.m_s), m_t = kTeacher ? highest_of_warp(lane.m_t) : (float)kNothing;
  const float up_s = m_s - lane.m_s, by_s = fast_exp2(-up_s * n.factor);
  const float up_t = m_t - lane.m_t, by_t = fast_exp2(-up_t * n.factor);
  RowState r = empty_state();
  r.m_s = r.top_s = m_s;
  r.m_t = r.top_t = m_t;
  r.z_s = lane.z_s * by_s;
  r.z_t = lane.z_t * by_t;
  r.e_s = moved(lane.d_s, lane.z_s, by_s, -up_s) * per_temperature;
  r.e_t = moved(lane.d_t, lane.z_t, by_t, -up_t) * per_temperature;
  if (needs_x_t(kKind)) r.x_t = moved(lane.x, lane.z_t, by_t, up_s - up_t) * per_temperature;
  if (kKind == kReverseKL) r.x_s = moved(lane.x, lane.z_s, by_s, up_s - up_t) * per_temperature;
  if (n.tempered) {
    r.z1_s = lane.z1_s * fast_exp2(-up_s * kLog2e);
    r.z1_t = lane.z1_t * fast_exp2(-up_t * kLog2e);
  } else if (temperature == 1) {
    r.z1_s = r.z_s;
    r.z1_t = r.z_t;
  }
  r.sum_s = lane.sum_s;
  return r;
}

// `n` states of different columns into one, by a warp; n is at most a warp's lanes.
KD_DEVICE void combine(const RowState* states, int n, double temperature, RowState* out) {
  const int lane = thread_index() % kWarp;
  RowState r = empty_state();
  if (lane < n) r = states[lane];
  const double top_s = highest_of_warp(r.top_s), top_t = highest_of_warp(r.top_t);
  raise(r, highest_of_warp(r.m_s), highest_of_warp(r.m_t), temperature);
  r.arg_s = -highest_of_warp(r.top_s == top_s ? -r.arg_s : -INFINITY);
  r.arg_t = -highest_of_warp(r.top_t == top_t ? -r.arg_t : -INFINITY);
  r.top_s = top_s;
  r.top_t = top_t;
  sync_warp();  // `out` may be one of them
  write_state(out, r);
  sync_warp();
}

}  // namespace kd
