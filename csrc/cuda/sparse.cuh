// A sparse target inside the one-read kernel: K + 1 outcomes, solved between the passes over the row.
//
// The fold leaves the stored ids out of the row's state and puts their logits here, in every block of the
// cluster. When the state is the whole row's, one warp of each block solves the outcomes, a dense row a few
// vectors long, with the functions of any row; all blocks come to the same bits. Then the row's gradient is
// written from the chip. What is solved, and why, is in kdkernels/backends/outcomes.py.
#pragma once

#include "fold.cuh"
#include "formula.cuh"

namespace kd {

// Per block, after SharedMemory. The logits are there twice, since another block may be a row ahead.
struct OutcomeMemory {
  int64_t slots;
  float* base;  // 3 * (slots + 1) floats

  KD_HD static int64_t bytes(int64_t slots) {
    return (3 * (slots + 1) * (int64_t)sizeof(float) + 127) / 128 * 128;
  }
  KD_DEVICE float* logits(int turn) const { return base + (turn & 1) * (slots + 1); }
  KD_DEVICE float* grad() const { return base + 2 * (slots + 1); }
};

template <class Row>
KD_DEVICE OutcomeMemory outcome_memory(const Row& row) {
  return {row.job.sparse.slots, (float*)(shared_memory() + row.plan.geometry.outcomes_at)};
}

// The stored logits of this warp's columns into every block; -inf for the slots without an id.
template <class Row>
KD_DEVICE void share_stored(const Row& row, const StoredIds& ids) {
  const SparseJob& sparse = row.job.sparse;
  float* const logits = outcome_memory(row).logits(row.turn);
  const Side from = row.student();
  ids.each_of_slice([&](int64_t slot, int column) {
    const float value = logit<typename Row::Types>(from, column);
    for (int to = 0; to < row.plan.geometry.cluster; ++to) in_block(logits, to)[slot] = value;
  });
  const int64_t* all = sparse.ids + row.row * sparse.slots;
  for (int64_t slot = thread_index(); slot < sparse.slots; slot += block_threads())
    if (all[slot] < 0) logits[slot] = -kInf;
}

template <class F>
KD_DEVICE double highest_of(int64_t n, F&& value) {
  double best = kNoReference;
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

// The normaliser at temperature 1 of a row that is `logits` and what `rest` was folded from, by a warp.
KD_DEVICE Normaliser at_1_with(const SideState& rest, const float* logits, int64_t n) {
  const double stored = highest_of(n, [&](int64_t i) { return (double)logits[i]; });
  const double peak = stored > rest.reference ? stored : rest.reference;
  double total = thread_index() % kWarp == 0 ? rest.sum_exp_t1 * exp(rest.reference - peak) : 0;
  for (int64_t i = thread_index() % kWarp; i < n; i += kWarp) total += exp(logits[i] - peak);
  return {peak, log(sum_of_warp(total))};
}

// The dense problem of `n` columns by a warp: the state, and where asked the gradient times `weight`.
template <Kind kKind, class Divergence>
KD_DEVICE void solve_row(const float* s, const float* t, int n, double temperature, const double* parameters,
                         double weight, RowState* state, float* grad) {
  const int lane = thread_index() % kWarp;
  const PassFlags flags;  // the divergence alone
  const float factor = log2e_over(temperature);
  LaneState sums;
  for (int start = 0; start < n; start += kStep) {
    float a[1][kVector], b[1][kVector];
    const int column[1] = {start + lane * kVector};
    load_from<Anything>((const char*)(s + column[0]), false, kFloat, {0, n - column[0]}, a[0]);
    load_from<Anything>((const char*)(t + column[0]), false, kFloat, {0, n - column[0]}, b[0]);
    fold_tile<kKind, true>(sums, a, b, column, factor, flags);
  }
  write_fold<kKind>(state, across_lanes<kKind>(sums, factor, temperature, flags));
  sync_warp();
  Normal n_row = normal(*state, logs_of(*state), kKind, temperature, weight);
  const Formula<kKind, Divergence> formula(parameters, n_row);
  if constexpr (!kHasClosedForm<Divergence>) {
    double value = 0, q_psi = 0;
    for (int k = lane; k < n; k += kWarp) {
      const Terms terms = formula.terms(n_row, s[k], t[k]);
      value += terms.phi;
      q_psi += terms.q_psi;
    }
    value = sum_of_warp(value);
    q_psi = sum_of_warp(q_psi);
    value += nan_without_softmax(state->student.sum_exp, state->teacher.sum_exp);
    n_row.sum_q_psi = (float)(value == value ? q_psi : value);
    sync_warp();
    if (lane == 0) state->pair.value = value;
  }
  for (int k = lane; grad != nullptr && k < n; k += kWarp) grad[k] = formula.gradient(n_row, s[k], t[k]);
  sync_warp();
}

// Whether the student's top-1 token (of the stored ones under "conditional") is the teacher's, by a warp.
// `logits`: of the stored ids. `rest`: of all others.
KD_DEVICE bool agrees(const int64_t* ids, const float* logits, const float* teacher, int64_t slots,
                      const SideState& rest, Tail tail) {
  if (slots == 0) return false;
  const int mine = first_highest(logits, slots), theirs = first_highest(teacher, slots);
  const double best = logits[mine];
  const bool ahead = best > rest.reference || (best == rest.reference && ids[mine] < (int64_t)rest.top_index);
  return ids[0] >= 0 && theirs == mine && (tail == kConditional || ahead);
}

// The row's outcomes, by one warp. `shared.state` is the row's state without the stored ids.
template <class Row>
KD_DEVICE void solve_outcomes(Row& row) {
  const Job& job = row.job;
  const SparseJob& sparse = job.sparse;
  const Spec& spec = job.spec;
  const OutcomeMemory memory = outcome_memory(row);
  const SideState& student = row.shared.state.student;
  RowState* const scratch = &row.shared.added;
  Solved& solved = row.shared.solved;
  const int64_t slots = sparse.slots, *ids = sparse.ids + row.row * slots;
  const float* teacher = (const float*)sparse.teacher.row(row.row);
  const double inner = row.temperature(), outer = job.temperature_of(row.row, sparse.outcome_spec);
  float* u = memory.logits(row.turn);
  const Normaliser at_1 = spec.asks_hard() ? at_1_with(student, u, slots) : Normaliser{};
  const bool agreement = spec.stats && agrees(ids, u, teacher, slots, student, spec.tail);
  // Only differences count: what is near 0 keeps its digits in fp32.
  const double stored = highest_of(slots, [&](int64_t i) { return (double)u[i]; });
  const double peak = stored > student.reference ? stored : student.reference;
  const double rest = (student.reference - peak) / inner +
                      (spec.tail == kConditional ? (double)teacher[slots] : log(student.sum_exp));
  const double most = rest > (stored - peak) / inner ? rest : (stored - peak) / inner;
  sync_warp();
  for (int64_t k = row.lane; k < slots; k += kWarp) u[k] = (float)((u[k] - peak) / inner - most);
  float* const grad = job.grad.data == nullptr ? nullptr : memory.grad();
  if (row.lane == 0) {
    u[slots] = (float)(rest - most);
    if (grad != nullptr) grad[slots] = 0;
  }
  sync_warp();
  const double scale = sparse.scale[row.row];
  const int n = (int)slots + !sparse.rest_is_none(row.row, student.sum_exp);
  with_kind(sparse.outcome_spec.kind, true, [&]<Kind kKind, class Divergence>() {
    solve_row<kKind, Divergence>(u, teacher, n, outer, job.parameters, scale / inner, scratch, grad);
  });
  if (row.lane == 0) {
    for (double& result : solved.results) result = 0;
    finish(*scratch, sparse.outcome_spec, true, slots + 1, solved.results);
    if (spec.asks(kSoft)) solved.results[kSoft] = scale * solved.results[kSoft] + sparse.constant[row.row];
    if (spec.stats) solved.results[kAgreement] = agreement;
    if (spec.asks_hard()) hard_results(student, at_1, spec, job.vocab, solved.results);
    solved.at_1 = at_1;
    solved.rest = grad == nullptr ? 0 : grad[slots];
  }
  sync_warp();
}

}  // namespace kd
