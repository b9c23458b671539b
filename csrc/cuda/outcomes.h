// A sparse target inside the one-read kernel: K + 1 outcomes, solved between the passes over the row.
//
// The fold leaves the kept ids out of the row's state and puts their logits here, in every block of the
// cluster. When the state is the whole row's, one warp of each block solves the outcomes, a dense row a few
// vectors long, with the functions of any row; all blocks come to the same bits. Then the row is emitted
// from the chip. What is solved, and why, is in kdkernels/backends/outcomes.py.
#pragma once

#include "formula.h"
#include "lanes.h"

namespace kd {

constexpr int kConditional = 2;  // kdkernels/targets/sparse_target.py's TAILS, counted from 1

// Per block, after SharedMemory; the logits twice, since another block may be a row ahead.
struct OutcomeMemory {
  int64_t slots;
  float* base;  // 3 * (slots + 1) floats

  KD_HD static int64_t bytes(int64_t slots) {
    return (3 * (slots + 1) * (int64_t)sizeof(float) + 127) / 128 * 128;
  }
  KD_DEVICE float* logits(int turn) const { return base + (turn & 1) * (slots + 1); }
  KD_DEVICE float* grad() const { return base + 2 * (slots + 1); }
};

// What the emit needs of it, and the row's results so far.
struct Solved {
  double lse1;  // the student's normaliser at temperature 1, kept ids included
  double rest;  // the gradient for the tail as a whole
  double results[6];
};

template <class F>
KD_DEVICE double highest_of(int64_t n, F&& value) {
  double best = kNothing;
  for (int64_t i = thread_index() % kWarp; i < n; i += kWarp) best = value(i) > best ? value(i) : best;
  return highest_of_warp(best);
}

// The first of the highest.
KD_DEVICE int first_highest(const float* v, int64_t n) {
  const double best = highest_of(n, [&](int64_t i) { return (double)v[i]; });
  int at = INT32_MAX;
  for (int64_t i = thread_index() % kWarp; i < n; i += kWarp) at = v[i] == best && i < at ? (int)i : at;
  at = lowest_of_warp(at);
  return at < n ? at : 0;
}

// log(e^lse + sum e^logits), by a warp.
KD_DEVICE double log_add(double lse, const float* logits, int64_t n) {
  const double kept = highest_of(n, [&](int64_t i) { return (double)logits[i]; }),
               peak = kept > lse ? kept : lse;
  double total = thread_index() % kWarp == 0 ? exp(lse - peak) : 0;
  for (int64_t i = thread_index() % kWarp; i < n; i += kWarp) total += exp(logits[i] - peak);
#pragma unroll
  for (int bit = kWarp / 2; bit; bit >>= 1) total += from_lane_xor(total, bit);
  return peak + log(total);
}

// The dense problem of `n` columns by a warp: the state, and where asked the gradient times `scale`.
template <int kKind, class Divergence>
KD_DEVICE void solve_row(const float* s, const float* t, int n, const Spec& spec, double scale,
                         RowState* state, float* grad) {
  const int lane = thread_index() % kWarp;
  Numbers numbers;
  numbers.factor = (float)(kLog2eExact / spec.temperature);
  LaneState sums;
  for (int start = 0; start < n; start += kStep) {
    float a[1][kVector], b[1][kVector];
    const int column[1] = {start + lane * kVector};
    load_from<Anything>((const char*)(s + column[0]), false, kFloat, {0, n - column[0]}, a[0]);
    load_from<Anything>((const char*)(t + column[0]), false, kFloat, {0, n - column[0]}, b[0]);
    fold_tile<kKind, 1>(sums, a, b, column, numbers);
  }
  write_fold<kKind>(state, across_lanes<kKind>(sums, numbers, spec.temperature));
  sync_warp();
  Normal normal = coefficients(*state, logs_of(*state), spec, kKind, scale, false, 0, 0, 1).normal;
  const Formula<kKind, Divergence> formula(spec, normal, numbers.factor);
  if constexpr (!std::is_void_v<Divergence>) {
    double value = 0, slope = 0;
    for (int k = lane; k < n; k += kWarp) {
      const Terms terms = formula.terms(normal, s[k], t[k]);
      value += terms.phi;
      slope += terms.q_psi;
    }
#pragma unroll
    for (int bit = kWarp / 2; bit; bit >>= 1) {
      value += from_lane_xor(value, bit);
      slope += from_lane_xor(slope, bit);
    }
    value += 0 * (state->z_s + state->z_t);  // NaN stays visible whatever the formula does with it
    normal.slope = (float)(value == value ? slope : value);
    sync_warp();
    if (lane == 0) state->value = value;
  }
  for (int k = lane; grad != nullptr && k < n; k += kWarp) grad[k] = formula.gradient(normal, s[k], t[k]);
  sync_warp();
}

// The outcomes of row `row`, by one warp; `r` is the row's state without the kept ids, `scratch` another.
KD_DEVICE void solve_outcomes(const Job& job, int row, const RowState& r, const OutcomeMemory& memory,
                              int turn, RowState* scratch, Solved* solved) {
  const SparseJob& sparse = job.sparse;
  const Spec& spec = job.spec;
  const int64_t slots = sparse.slots, *ids = sparse.ids + row * slots;
  const float* teacher = (const float*)sparse.teacher.row(row);
  const int lane = thread_index() % kWarp;
  float* u = memory.logits(turn);
  const double lse = r.z_s == 0 ? -INFINITY : r.lse_s(spec.temperature);
  const double rest = (int)spec.tail == kConditional ? (double)teacher[slots] : lse;
  const double lse1 = spec.hard_weight == 0 ? 0 : log_add(r.z1_s == 0 ? -INFINITY : r.lse1_s(), u, slots);
  bool agrees = false;
  if (slots > 0) {
    const int mine = first_highest(u, slots);
    const double best = u[mine];
    const bool ahead = best > r.m_s || (best == r.m_s && ids[mine] < (int64_t)r.arg_s);
    agrees =
        ids[0] >= 0 && first_highest(teacher, slots) == mine && ((int)spec.tail == kConditional || ahead);
  }
  // Only differences count: what is near 0 keeps its digits in fp32.
  const double kept = highest_of(slots, [&](int64_t i) { return u[i] / spec.temperature; });
  const double peak = rest > kept ? rest : kept;
  sync_warp();
  for (int64_t k = lane; k < slots; k += kWarp) u[k] = (float)(u[k] / spec.temperature - peak);
  if (lane == 0) u[slots] = (float)(rest - peak);
  sync_warp();
  with_kind(sparse.outcome_spec, true, [&]<int kKind, class Divergence>() {
    solve_row<kKind, Divergence>(u, teacher, (int)slots + 1, sparse.outcome_spec, sparse.scale[row], scratch,
                                 job.grad.data == nullptr ? nullptr : memory.grad());
  });
  if (lane == 0) {
    for (double& result : solved->results) result = 0;
    finish(*scratch, sparse.outcome_spec, true, false, slots + 1, solved->results);
    solved->results[0] = sparse.scale[row] * solved->results[0] + sparse.constant[row];
    solved->results[4] = agrees;
    if (job.labels != nullptr && spec.hard_weight != 0)
      solved->results[1] = hard_term(r, lse1, lse1 - r.label_s, spec, job.vocab);
    solved->lse1 = lse1;
    solved->rest = job.grad.data == nullptr ? 0 : memory.grad()[slots];
  }
  sync_warp();
}

}  // namespace kd
