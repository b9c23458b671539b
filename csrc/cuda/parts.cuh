// The exchange of the common case: what a state is made of there is three sums at two references, and fits
// into one store per lane. So blocks hand over less, and a row waits less between its passes.
//
// Numerics: sums are fp64. What they decay by is 2^x of the special-function unit, as within a lane: the part
// that has the row's maximum keeps its sums as they are.
#pragma once

#include "exchange.cuh"

namespace kd {

// How far a reference rises, before the temperature, and what the sums relative to it decay by.
struct LaneRise {
  float up, decay;
};

// A sum of terms e d relative to references that rise. Where all e decay to 0 it is 0, even if it was
// infinite.
template <class T>
KD_DEVICE T moved(T sum, T sum_exp, float decay, float shift) {
  return sum_exp > 0 && decay > 0 ? decay * (sum + sum_exp * shift) : (T)0;
}

KD_DEVICE LaneRise rise_to(float reference, float from, float factor) {
  const float up = reference - from;
  return {up, fast_exp2(-up * factor)};
}

// The warp's, from the lanes' sums at common references.
KD_DEVICE Parts added(const Parts& lane) {
  double sums[4] = {lane.sums[0], lane.sums[1], lane.sums[2]};
  add_across_warp<4>(sums);
  Parts all = lane;
#pragma unroll
  for (int i = 0; i < 3; ++i) all.sums[i] = from_lane(sums[0], i * kWarp / 4);
  return all;
}

// `n` parts of different columns as one, in every lane; each lane takes up to kMost of them, which are
// anything that a Part can be made of. sums: of the student's e, the teacher's, and e x with the e of the
// side `reverse` says, the student's or the teacher's. `factor`: log2(e) / T.
template <bool reverse, class Part = Parts, int kMost = 1, class Source>
KD_DEVICE Part combined(const Source* parts, int n, float factor) {
  Part each[kMost], all;
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const int i = thread_index() % kWarp + j * kWarp;
    if (i < n) each[j] = parts[i];
    all.student = fmaxf(all.student, each[j].student);
    all.teacher = fmaxf(all.teacher, each[j].teacher);
  }
  all.student = highest_of_warp(all.student);
  all.teacher = highest_of_warp(all.teacher);
#pragma unroll
  for (int j = 0; j < kMost; ++j) {
    const Part& r = each[j];
    const LaneRise s = rise_to(all.student, r.student, factor), t = rise_to(all.teacher, r.teacher, factor);
    all.sums[0] += r.sums[0] * s.decay;
    all.sums[1] += r.sums[1] * t.decay;
    all.sums[2] += moved(r.sums[2], r.sums[reverse ? 0 : 1], reverse ? s.decay : t.decay, s.up - t.up);
  }
  return added(all);
}

template <bool reverse>
KD_DEVICE Parts parts_of(const RowState& r, double temperature) {
  return {{r.student.sum_exp, r.teacher.sum_exp, (reverse ? r.pair.cross_s : r.pair.cross_t) * temperature},
          (float)r.student.reference,
          (float)r.teacher.reference};
}

// The parts of all the cluster's warps, which are in their blocks' memory, as one, in every block's first
// warp; with `onto_memory` also what the row's state in memory has.
template <class Row>
KD_DEVICE Parts exchange(Row& row, float factor, bool onto_memory = false) {
  constexpr bool kReverse = Row::kKind == kReverseKL;
  Parts* const parts = row.shared.block_parts[row.parity];
  const int blocks = row.plan.geometry.cluster, rank = cluster_rank(), warps = row.plan.geometry.warps;
  row.parity ^= 1;  // nobody writes here again before all have passed the next exchange's barrier
  sync_block();
  Parts all;
  if (row.warp == 0) {
    all = combined<kReverse>(row.shared.warp_parts, warps, factor);
    if (row.lane == 0) parts[rank] = all;
    if (row.lane == 0 && onto_memory)
      parts[blocks] = parts_of<kReverse>(*row.memory_state(), row.temperature());
    sync_warp();
    const double* mine = (const double*)&parts[rank];
    for (int i = row.lane; i < blocks * kPartWords; i += kWarp)
      if (i / kPartWords != rank)
        ((double*)in_block(&parts[rank], i / kPartWords))[i % kPartWords] = mine[i % kPartWords];
  }
  if (blocks > 1) sync_cluster(row.warp == 0);
  if (row.warp == 0 && (blocks > 1 || onto_memory))
    all = combined<kReverse>(parts, blocks + onto_memory, factor);
  return all;
}

template <bool reverse>
KD_DEVICE void write_state(RowState& r, const Parts& all, float label_logit, double temperature) {
  r.student.reference = all.student;
  r.student.sum_exp = all.sums[0];
  r.student.sum_exp_t1 = temperature == 1 ? all.sums[0] : 0;
  r.student.label_logit += label_logit;
  r.teacher.reference = all.teacher;
  r.teacher.sum_exp = all.sums[1];
  r.teacher.sum_exp_t1 = temperature == 1 ? all.sums[1] : 0;
  (reverse ? r.pair.cross_s : r.pair.cross_t) = all.sums[2] / temperature;
}

// The row's state from its warps' parts, as exchange_states makes it.
template <class Row>
KD_DEVICE void exchange_parts(Row& row, RowState* out, bool onto_memory) {
  const double temperature = row.temperature();
  const Parts all = exchange(row, log2e_over(temperature), onto_memory);
  if (row.warp != 0) return;
  if (row.lane == 0) {
    RowState r;
    if (onto_memory && cluster_rank() == 0) r = *row.memory_state();  // which that block alone renews
    write_state<Row::kKind == kReverseKL>(r, all, row.label_logit, temperature);
    *out = r;
  }
  sync_warp();
}

}  // namespace kd
