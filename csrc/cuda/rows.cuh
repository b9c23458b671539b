// The kernel: persistent clusters, each taking one row after another.
#pragma once

#include "row.h"

namespace kd {

using Kernel = void (*)(Job, Plan);

// Whether a row is computed, or only given zeros.
KD_DEVICE bool counts(const Job& job, const Plan& plan, int row) {
  if (job.labels != nullptr && job.labels[row] < 0) return false;
  return plan.entry != Entry::kGradient || job.weights[row] != 0;
}

KD_DEVICE int next_that_counts(const Job& job, const Plan& plan, int row, int step) {
  while (row < plan.rows && !counts(job, plan, row)) row += step;
  return row < plan.rows ? row : plan.rows;
}

template <int kKind, class Divergence, class Types>
KD_KERNEL(kMaxWarps* kWarp)
rows_kernel(const KD_GRID_CONSTANT Job job, const KD_GRID_CONSTANT Plan plan) {
  Slice slice(job, plan.geometry);
  Row<kKind, Divergence, Types> worker(job, plan, slice);
  const int cluster = plan.geometry.cluster;
  const int first = block_index() / cluster, step = grid_blocks() / cluster;
  int next = next_that_counts(job, plan, first, step);
  for (int i = 0; next < plan.rows && i < slice.chunks(); ++i) slice.fetch(i, next, lead_of(job, next));
  if (cluster > 1) sync_cluster(false);  // all blocks have begun: their memory can be written to
  int turn = 0;
  for (int row = first; row < plan.rows; row += step) {
    if (row != next) {
      if (plan.emits(job)) worker.skip(row);
      continue;
    }
    next = next_that_counts(job, plan, row + step, step);
    worker.compute(row, next, turn++);
  }
  if (cluster > 1) sync_cluster(false);  // a block's memory must outlive what others still write there
}

}  // namespace kd
