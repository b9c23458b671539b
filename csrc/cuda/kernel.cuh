// The CUDA kernel: persistent clusters of blocks, each taking one row after another. Where the registers of a
// cluster hold a row, held.cuh is the kernel instead.
//
// Reading order: this file (the algorithm), fold.cuh (first pass), value.cuh (second, for divergences without
// a closed form), gradient.cuh (last), exchange.cuh (how warps' states become the row's), parts.cuh (the same
// in the common case), row_io.cuh (how columns are read and written; which case is common), staging.cuh (how
// a row comes onto the chip), sparse.cuh (a sparse target). They share row.cuh (what a warp knows of its
// row), coefficients.cuh and formula.cuh (p, q and the divergence of a pair); platform.cuh is all that is not
// plain C++. geometry.h says how a row is laid over blocks, launch.cu which kernel is launched.
//
// Contract: results and gradients of the entry points of kdkernels/backends/protocol.py. A gradient may alias
// its logits (gradient.cuh).
//
// Traffic: what is resident on the chip is read from memory once, and the gradient written once, as
// torch.add(s, t, out=g) does. What is not is read again by each pass, each going against the one before it,
// so that it begins with what L2 still holds.
//
// Numerics: equal logits give equal p and q, bit for bit, and products that must cancel are rounded one by
// one: their gradient is exactly 0. The same inputs give the same bits: nothing is added atomically.
#pragma once

#include "held.cuh"
#include "value.cuh"

namespace kd {

using Kernel = void (*)(Job, Plan);

// The state of a row whose earlier passes are done, from memory.
template <class Row>
KD_DEVICE void load_state(Row& row) {
  sync_block();  // the last row's is done with
  if (row.warp == 0) copy_state(&row.shared.state, row.memory_state());
}

// From the row's state, for all warps of the block.
template <class Row>
KD_DEVICE void share_coefficients(Row& row) {
  if (row.warp == 0) {
    sync_warp();
    const Job& job = row.job;
    const SparseJob& sparse = job.sparse;
    const RowState& r = row.shared.state;
    const Solved& solved = row.shared.solved;
    const Logs logs = logs_of(r);
    const bool here = !Row::Types::kLean && row.plan.entry == Entry::kFusedSparse;
    Normaliser at_1 = {r.student.reference, logs.sum_exp_t1_s};
    double rest = 0;
    if (here || (!Row::Types::kLean && sparse.at_1 != nullptr))
      at_1 = here ? solved.at_1 : sparse.at_1[row.row];
    if (here || (!Row::Types::kLean && sparse.rest != nullptr))
      rest = here ? solved.rest : sparse.rest[row.row];
    const Coefficients c =
        coefficients(r, logs, Row::kKind, row.temperature(),
                     Row::Types::kLean ? row.early_weights : row.weights(), at_1, rest, job.vocab);
    if (row.lane == 0) row.shared.coefficients = c;
    if (!Row::Types::kLean && row.lane == 0) {
      Softmax softmax = {r.student.reference, logs.sum_exp_s, r.student.sum_exp_shift / r.student.sum_exp};
      if (sparse.softmax != nullptr) softmax = sparse.softmax[row.row];
      row.shared.entropy = entropy_pull(row.weights().entropy, softmax, row.temperature());
    }
  }
  sync_block();
}

// By the thread whose warp has the fewest columns of the row, if any.
template <class Row>
KD_DEVICE void write_results(Row& row) {
  const bool last = cluster_rank() == row.plan.geometry.cluster - 1 && thread_index() == block_threads() - 1;
  if (!row.plan.whole_rows() || !last) return;
  double* results = row.job.results + (int64_t)row.row * kResults;
  if (row.plan.entry == Entry::kFused)
    finish(row.shared.state, row.job.spec, Row::kTeacher, row.job.vocab, results);
  else
    for (int i = 0; i < kResults; ++i) results[i] = row.shared.solved.results[i];
}

// Which passes a row takes.
template <class Divergence, class Row>
KD_DEVICE void compute(Row& row) {
  const Plan& plan = row.plan;
  const bool has_value = !kHasClosedForm<Divergence> && plan.takes_value();
  const bool onto_memory = plan.entry == Entry::kAccumulate;
  const bool sparse = !Row::kTeacher && !Row::Types::kLean && plan.entry == Entry::kFusedSparse;
  if (plan.folds()) {
    const StoredIds ids = row.stored();
    fold(row, ids);
    if (sparse) share_stored(row, ids);
    if (!plan.writes_gradient(row.job) && !has_value) row.fetch_next();
    if constexpr (Row::Types::kLean)
      exchange_parts(row, &row.shared.state, onto_memory);
    else
      exchange_states(row, &row.shared.state, onto_memory);
    if (sparse && row.warp == 0) solve_outcomes(row);
    if (onto_memory && row.warp == 0 && cluster_rank() == 0)
      copy_state(row.memory_state(), &row.shared.state);
  } else {
    if (Row::Types::kLean && row.warp == 0) read_early(row);
    load_state(row);
  }
  share_coefficients(row);
  if constexpr (!kHasClosedForm<Divergence>) {
    if (has_value) {
      value<Divergence>(row);
      share_coefficients(row);
    }
  }
  write_results(row);
  if (plan.writes_gradient(row.job)) write_gradient<Divergence>(row);
}

// The rows of a cluster, one after another.
template <class Divergence, class Row>
KD_DEVICE void rows(Row& row) {
  const Job& job = row.job;
  const Plan& plan = row.plan;
  Slice& slice = row.slice;
  const int cluster = plan.geometry.cluster;
  const int first = block_index() / cluster, step = plan.clusters;
  int next = next_computed(job, plan, first, step);
  for (int i = 0; next < plan.rows && i < slice.chunks(); ++i) slice.fetch(i, next, lead_of(job, next));
  if (cluster > 1) sync_cluster(false);  // all blocks have begun: their memory can be written to
  int turn = 0;
  for (int index = first; index < plan.rows; index += step) {
    row.begin(index);
    if (index != next) {
      if (plan.writes_gradient(job)) write_zeros(row);
      continue;
    }
    next = next_computed(job, plan, index + step, step);
    row.set_next(next, turn++);
    compute<Divergence>(row);
  }
  if (cluster > 1) sync_cluster(false);  // a block's memory must outlive what others still write there
}

template <Kind kKind, class Divergence, class Types>
KD_KERNEL(kMaxWarps* kWarp)
rows_kernel(const KD_GRID_CONSTANT Job job, const KD_GRID_CONSTANT Plan plan) {
  Slice slice(job, plan.geometry);
  Row<kKind, Types> row(job, plan, slice);
  if constexpr (Types::kHeld > 0)
    held_rows<Divergence>(row);
  else
    rows<Divergence>(row);
}

}  // namespace kd
