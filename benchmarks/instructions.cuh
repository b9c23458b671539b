// The passes of the kernels over columns, written out for `kVectors` vectors of a lane: what instructions.py
// compiles. Only the code counts; nothing is launched.
#pragma once
#include "cuda/kernel.cuh"

namespace kd {

// What other passes would have found.
struct Given {
  float factor;
  Shares shares;
  Weights weights;
  Coefficients coefficients;
};

template <class Types, int kVectors>
struct Fewer : Types {
  static constexpr int kHeld = kVectors * 2 * kVector;
};

// Gradients are there, at multiples of 16 bytes.
template <class Base>
struct Aligned : Base {
  using Base::Base;
  KD_DEVICE GradRow grad_row(const Matrix& m) const {
    char* at = start_of(m, this->row, this->lead);
    return {at, this->lead, kBFloat16, true};
  }
};

// A call that asks for a divergence of bf16 logits, and nothing else that a kernel would look for at run
// time.
KD_DEVICE Job plain(Job job) {
  job.spec = Spec();
  job.student.dtype = job.teacher.dtype = job.grad.dtype = kBFloat16;
  job.teacher_grad.data = nullptr;
  job.sparse.ids = nullptr;
  return job;
}
KD_DEVICE Plan plain(Plan plan) {
  plan.entry = Entry::kFused;
  plan.flags = PassFlags();
  return plan;
}

template <Kind kKind, class Divergence, class Types, int kVectors>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    held(const __grid_constant__ Job some_job, const __grid_constant__ Plan some_plan, const Given* given,
         void* first, FoundValue* second) {
  const Job job = plain(some_job);
  const Plan plan = kd::plain(some_plan);
  Slice slice(job, plan.geometry);
  Aligned<Row<kKind, Fewer<Types, kVectors>>> row(job, plan, slice);
  Columns<decltype(row)> columns;
  char* const teacher = shared_memory() + plan.geometry.bytes_per_warp;
  ((Found*)first)[thread_index()] =
      fold_columns(row, shared_memory(), teacher, given->factor, columns, [] {});
  sync_block();
  if constexpr (!kHasClosedForm<Divergence>)
    second[thread_index()] = value_of_columns(row, Divergence(job.parameters, false), given->shares, columns);
  sync_block();
  Weights weights = given->weights;
  weights.hard = weights.onehot = 0;
  write_columns(row, weights, -1, true, columns);
}

template <Kind kKind, class Divergence, class Types, bool kStats, int kVectors>
__global__ void __launch_bounds__(kMaxWarps* kWarp)
    streamed(const __grid_constant__ Job some_job, const __grid_constant__ Plan some_plan, const Given* given,
             void* first, FoundValue* second) {
  constexpr int kTile = Types::kTile;
  const Job job = plain(some_job);
  const Plan plan = kd::plain(some_plan);
  Slice slice(job, plan.geometry);
  Aligned<Row<kKind, Types>> row(job, plan, slice);
  const Side student = row.student(), teacher = row.teacher();
  float s[kTile][kVector], t[kTile][kVector];
  int columns[kTile];
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) columns[i] = (step * kTile + i) * kStep + row.lane * kVector;
    load_step<decltype(row)>(Whole{}, student, teacher, 0, columns, s, t);
  };

  LaneState& found = ((LaneState*)first)[thread_index()];
  LaneState state = found;
#pragma unroll
  for (int step = 0; step < kVectors / kTile; ++step) {
    load(step);
    fold_tile<kKind, kStats, kTile>(state, s, t, columns, given->factor, plan.flags);
  }
  found = state;
  sync_block();

  Coefficients c = given->coefficients;
  c.normal.gap = 0;  // as `false` above: of SkewKL's two loops, one for rows that disagree, one is compiled
  const Formula<kKind, Divergence> formula(job.parameters, c.normal);
  if constexpr (!kHasClosedForm<Divergence>) {
    FoundValue value;
#pragma unroll
    for (int step = 0; step < kVectors / kTile; ++step) {
      load(step);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const Terms terms = formula.terms(c.normal, s[i][k], t[i][k]);
          value.phi += terms.phi;
          value.sum_q_psi += terms.q_psi;
        }
      }
    }
    second[thread_index()] = value;
  }
  sync_block();

  const GradRow grad = row.grad_row(job.grad);
#pragma unroll
  for (int step = 0; step < kVectors / kTile; ++step) {
    load(step);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      float g[kVector];
      student_gradient(row, c, formula, StoredIds(), 0, s[i], t[i], g);
      store_whole<Types>(grad, columns[i], g);
    }
  }
}

}  // namespace kd
