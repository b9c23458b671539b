// How the states of lanes, warps and blocks become the row's.
//
// Lanes add their fp32 parts in fp64 across the warp; warps through their block's shared memory; the blocks
// of a cluster by writing their state into every block. Sums are moved to the common reference first. The
// same states give the same bits: nothing is added atomically.
#pragma once

#include "row.cuh"

namespace kd {

template <class T>
KD_DEVICE T highest_of_warp(T value) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit >>= 1) {
    const T other = from_lane_xor(value, bit);
    value = other > value ? other : value;
  }
  return value;
}

// As integers of the same order, which the warp's own minimum takes at once. None is NaN.
KD_DEVICE float highest_of_warp(float value) {
  const auto ordered = [](int bits) { return bits ^ ((bits >> 31) & INT32_MAX); };
  return __builtin_bit_cast(float, ordered(~lowest_of_warp(~ordered(__builtin_bit_cast(int, value)))));
}

KD_DEVICE double sum_of_warp(double value) {
#pragma unroll
  for (int bit = kWarp / 2; bit; bit >>= 1) value += from_lane_xor(value, bit);
  return value;
}

// Adds each of a lane's `count` (a power of two) numbers over the warp. Afterwards lane l's v[0] is the sum
// of v[l * count / 32], so 32 / count neighbours hold the same one. Each step halves what a lane carries on,
// so that few numbers cross the warp.
template <int count, int lanes = kWarp, class T>
KD_DEVICE void add_across_warp(T* v) {
  if constexpr (lanes > 1) {
    constexpr int half = count / 2, bit = lanes / 2;
    const bool upper = (thread_index() & bit) != 0;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T mine = upper ? v[i + half] : v[i], theirs = upper ? v[i] : v[i + half];
      v[i] = mine + from_lane_xor(theirs, bit);
    }
    if constexpr (half == 0) v[0] += from_lane_xor(v[0], bit);
    add_across_warp<half == 0 ? 1 : half, bit>(v);
  }
}

// The sums in a state, by number: a loop adds all of them, and each is then written by the lane that has it.
constexpr int kSideSums = 5, kPairSums = 4;
template <class Side>
KD_DEVICE auto& sum_in(Side& side, int i) {
  return i == 0   ? side.sum_exp
         : i == 1 ? side.sum_exp_shift
         : i == 2 ? side.sum_exp_t1
         : i == 3 ? side.sum_logits
                  : side.label_logit;
}
template <class Pair>
KD_DEVICE auto& sum_in_pair(Pair& pair, int i) {
  return i == 0 ? pair.cross_s : i == 1 ? pair.cross_t : i == 2 ? pair.value : pair.sum_q_psi;
}

// What is no sum. It is the same in all lanes.
KD_DEVICE void write_maxima(SideState& out, const SideState& side) {
  out.reference = side.reference;
  out.top_logit = side.top_logit;
  out.top_index = side.top_index;
}

// The warp's state, from the lanes' parts at common references.
KD_DEVICE void write_state(RowState* out, const RowState& r) {
  double sums[16] = {};
#pragma unroll
  for (int i = 0; i < kSideSums; ++i) {
    sums[i] = sum_in(r.student, i);
    sums[kSideSums + i] = sum_in(r.teacher, i);
  }
#pragma unroll
  for (int i = 0; i < kPairSums; ++i) sums[2 * kSideSums + i] = sum_in_pair(r.pair, i);
  add_across_warp<16>(sums);
  const int lane = thread_index() % kWarp, i = lane / 2;
  if (lane % 2 == 0) {
    if (i < kSideSums)
      sum_in(out->student, i) = sums[0];
    else if (i < 2 * kSideSums)
      sum_in(out->teacher, i - kSideSums) = sums[0];
    else if (i < 2 * kSideSums + kPairSums)
      sum_in_pair(out->pair, i - 2 * kSideSums) = sums[0];
  }
  if (lane == 1) {
    write_maxima(out->student, r.student);
    write_maxima(out->teacher, r.teacher);
  }
}

// The same after the first pass. Half of the sums are then 0, or known to every lane, and need not be added.
template <Kind kKind>
KD_DEVICE void write_fold(RowState* out, const RowState& r) {
  constexpr int kCross = kKind == kReverseKL ? 0 : 1;
  double sums[8];
#pragma unroll
  for (int i = 0; i < 4; ++i) sums[i] = sum_in(r.student, i);
#pragma unroll
  for (int i = 0; i < 3; ++i) sums[4 + i] = sum_in(r.teacher, i);
  sums[7] = sum_in_pair(r.pair, kCross);
  add_across_warp<8>(sums);
  const int lane = thread_index() % kWarp, i = lane / 4;
  if (lane % 4 == 0) {
    if (i < 4)
      sum_in(out->student, i) = sums[0];
    else if (i < 7)
      sum_in(out->teacher, i - 4) = sums[0];
    else
      sum_in_pair(out->pair, kCross) = sums[0];
  }
  if (lane != 1) return;
  write_maxima(out->student, r.student);
  write_maxima(out->teacher, r.teacher);
  sum_in_pair(out->pair, 1 - kCross) = 0;
  out->student.label_logit = r.student.label_logit;
  out->teacher.label_logit = r.teacher.label_logit;
  out->teacher.sum_logits = 0;
  out->pair.value = out->pair.sum_q_psi = 0;
}

// The warp's top, and the first column that holds it.
KD_DEVICE void share_top(SideState& side) {
  const double top = highest_of_warp(side.top_logit);
  side.top_index = -highest_of_warp(side.top_logit == top ? -side.top_index : -INFINITY);
  side.top_logit = top;
}

// `n` states of different columns into one, by a warp; n is at most a warp's lanes.
KD_DEVICE void combine(const RowState* states, int n, double temperature, bool stats, RowState* out) {
  const int lane = thread_index() % kWarp;
  RowState r;
  if (lane < n) r = states[lane];
  raise(r, highest_of_warp(r.student.reference), highest_of_warp(r.teacher.reference), temperature);
  if (stats) {
    share_top(r.student);
    share_top(r.teacher);
  }
  sync_warp();  // `out` may be one of them
  write_state(out, r);
  sync_warp();
}

KD_DEVICE void copy_state(RowState* to, const RowState* from) {
  const int lane = thread_index() % kWarp;
  if (lane < kStateColumns) ((double*)to)[lane] = ((const double*)from)[lane];
}

// All warps' states into one, in every block; with `onto_memory` also the state in memory.
template <class Row>
KD_DEVICE void exchange_states(Row& row, RowState* out, bool onto_memory) {
  RowState* const parts = row.shared.parts[row.parity];
  const int blocks = row.plan.geometry.cluster, rank = cluster_rank(), warps = row.plan.geometry.warps;
  const double temperature = row.temperature();
  const bool stats = row.plan.flags.stats, sparse = row.plan.entry == Entry::kFusedSparse;
  sync_block();
  if (row.warp == 0) {
    combine(row.shared.warps, warps, temperature, stats, &parts[rank]);
    for (int to = 0; to < blocks; ++to)
      if (to != rank) copy_state(in_block(&parts[rank], to), &parts[rank]);
    if (onto_memory) copy_state(&parts[blocks], row.memory_state());
    sync_warp();
  }
  if (blocks > 1) sync_cluster(row.warp == 0 || sparse);  // all warps share a sparse target's logits
  if (row.warp == 0) combine(parts, blocks + onto_memory, temperature, stats, out);
  // Nobody writes here again before all have passed the next exchange's barrier.
  row.parity ^= 1;
}

}  // namespace kd
