// Last pass: weights * d(outputs)/d(raw logits).
//
// Aliasing: a gradient may be the logits that it belongs to. A warp alone reads and writes its columns, a
// vector's reads before its write, and no later pass reads them again.
#pragma once

#include <type_traits>

#include "formula.cuh"
#include "sparse.cuh"

namespace kd {

KD_DEVICE void subtract_at_label(float onehot, int label, float (&g)[kVector]) {
  if (label < 0 || label >= kVector) return;
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (k == label) g[k] -= onehot;
}

// The gradient for the raw values, from that for the `logits` made of them. No gradient stays 0, whatever the
// logit is.
KD_DEVICE void through_map(const LogitMap& map, const float (&logits)[kVector], float (&g)[kVector]) {
  if (map.identity()) return;
#pragma unroll
  for (int k = 0; k < kVector; ++k) g[k] = g[k] == 0 ? 0.0f : g[k] * map.slope(logits[k]);
}

// The soft gradient of a sparse target: the rest's softmax, and at the stored ids what was solved for them.
template <class Row>
KD_DEVICE void sparse_gradient(const Row& row, const Coefficients& c, const Normal& n, const StoredIds& ids,
                               int start, const float (&s)[kVector], float (&g)[kVector]) {
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    g[k] = c.rest == 0 ? 0.0f : c.rest * fast_exp2((s[k] - n.reference_s) * n.factor - n.log2_sum_exp_s);
  const float* solved = row.plan.entry == Entry::kFusedSparse
                            ? outcome_memory(row).grad()
                            : (const float*)row.job.sparse.stored_grad.row(row.row);
  ids.each(start, [&](int64_t slot, int place, bool mine) {
    const float value = c.soft_weight == 0 ? 0.0f : (float)(c.soft_weight * solved[slot]);
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (mine && k == place) g[k] = value;
  });
}

// Zeros for a row that takes no part.
template <class Row>
KD_DEVICE void write_zeros(const Row& row) {
  const Job& job = row.job;
  const float zeros[kVector] = {};
  const GradRow grad = row.grad_row(job.grad), teacher_grad = row.grad_row(job.teacher_grad);
  for (int column = row.slice.begin() + row.lane * kVector; column < row.end(); column += kStep) {
    if (job.grad.data != nullptr) store<typename Row::Types>(grad, column, row.end() - column, zeros);
    if (!Row::Types::kLean && job.teacher_grad.data != nullptr)
      store<Anything>(teacher_grad, column, row.end() - column, zeros);
  }
}

// Of one vector of the student's logits `s` and the teacher's `t`.
template <class Formula, class Row>
KD_DEVICE void student_gradient(const Row& row, const Coefficients& c, const Formula& formula,
                                const StoredIds& ids, int start, const float (&s)[kVector],
                                const float (&t)[kVector], float (&g)[kVector]) {
  const Normal& n = c.normal;
#pragma unroll
  for (int k = 0; k < kVector; ++k) g[k] = 0;
  if constexpr (Row::kTeacher) {
    if (n.soft != 0) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) g[k] = formula.gradient(n, s[k], t[k]);
    }
  } else if (ids.any_in_row()) {
    sparse_gradient(row, c, n, ids, start, s, g);
  }
  if (row.plan.flags.hard) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) g[k] += Row::Types::kLean ? c.hard(s[k]) : c.hard(s[k]) - c.spread;
    subtract_at_label(c.hard.onehot, row.label() - start - row.lane * kVector, g);
  }
  if constexpr (!Row::Types::kLean) {
    if (row.plan.flags.shifts) {
      const EntropyPull entropy = row.shared.entropy;
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (entropy.slope != 0) g[k] += entropy(s[k]);
    }
  }
}

template <class Divergence, class Row>
KD_DEVICE void write_gradient(Row& row) {
  using Types = typename Row::Types;
  constexpr int kTile = Types::kTile;
  const Job& job = row.job;
  const Coefficients c = row.shared.coefficients;
  if (!c.live) {
    write_zeros(row);
    row.fetch_next();
    return;
  }
  const Side student = row.student(), teacher = row.teacher();
  const GradRow grad = row.grad_row(job.grad), teacher_grad = row.grad_row(job.teacher_grad);
  const Formula<Row::kKind, Divergence> formula(job.parameters, c.normal);
  const StoredIds ids = row.stored();
  row.template each_step<kTile * kStep>(
      row.plan.entry == Entry::kGradient, true, [&](auto step, int start, int end) {
        int columns[kTile];
#pragma unroll
        for (int i = 0; i < kTile; ++i) columns[i] = start + i * kStep + row.lane * kVector;
        float s[kTile][kVector], t[kTile][kVector];
        load_step<Row>(step, student, teacher, end, columns, s, t);
#pragma unroll
        for (int i = 0; i < kTile; ++i) {
          const int count = end - columns[i];
          if (Types::kLean || job.grad.data != nullptr) {
            float g[kVector];
            student_gradient(row, c, formula, ids, start + i * kStep, s[i], t[i], g);
            if constexpr (!Types::kLean) through_map(student.map, s[i], g);
            if (std::is_same_v<decltype(step), Whole> && grad.aligned)
              store_whole<Types>(grad, columns[i], g);
            else
              store<Types>(grad, columns[i], count, g);
          }
          if constexpr (Row::kTeacher && !Types::kLean) {
            if (job.teacher_grad.data != nullptr) {
              float h[kVector];
#pragma unroll
              for (int k = 0; k < kVector; ++k) h[k] = c.teacher_label(t[i][k]);
              subtract_at_label(c.teacher_label.onehot, row.label() - columns[i], h);
              through_map(teacher.map, t[i], h);
              store<Anything>(teacher_grad, columns[i], count, h);
            }
          }
        }
      });
}

}  // namespace kd
