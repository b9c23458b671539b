// The entry points but for fused_sparse (sparse.h): which passes each of them makes over its rows.
#pragma once

#include <vector>

#include "fold.h"
#include "gradient.h"
#include "value.h"

namespace kd {
namespace KD_ISA {

// A range of rows on one thread, and the memory that they share. Subnormals are flushed meanwhile:
// exponentials below 1e-38 do not count, and each would cost a hundred cycles.
class RowRange {
 public:
  explicit RowRange(const Job& job) : job(job), scratch(job.width), stored_logits_(job.sparse.slots) {
#if defined(__SSE2__)
    before_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before_ | 0x8040);
#endif
    own_.asked = job.spec.asks(kTeacherLabel) ? 1 << kLabel : 0;
  }
  ~RowRange() {
#if defined(__SSE2__)
    __builtin_ia32_ldmxcsr(before_);
#endif
  }

  int64_t label(int64_t i) const { return job.labels == nullptr ? -1 : job.labels[i]; }
  RowState& state(int64_t i) const { return *(RowState*)(job.state + i * kStateColumns); }
  double* results(int64_t i) const { return job.results + i * kResults; }

  template <Kind kKind>
  Row<kKind> row(int64_t i) {
    const Spec& s = job.spec;
    Source teacher;
    if (kKind != kNone) teacher = source(job.teacher, i, s.teacher_scale, s.teacher_softcap);
    const Source student = source(job.student, i, s.student_scale, s.student_softcap);
    return {job, s, job.temperature_of(i, s), student, teacher, scratch, label(i)};
  }

  // The teacher's own cross entropy (co-distillation): its row as a student at temperature 1.
  Row<kNone> teacher_row(int64_t i) {
    const Source teacher = source(job.teacher, i, job.spec.teacher_scale, job.spec.teacher_softcap);
    return {job, own_, 1, teacher, Source{}, scratch, label(i)};
  }
  static RowWeights teacher_weights(const RowWeights& weights) { return {.label = weights.teacher_label}; }

  // The row's sparse target, or one without ids.
  StoredIds stored(int64_t i) {
    const SparseJob& s = job.sparse;
    if (s.ids == nullptr) return {};
    StoredIds stored{s.ids + i * s.slots, s.slots, stored_logits_.data()};
    if (s.rest == nullptr) return stored;
    stored.grad = (const float*)s.stored_grad.row(i);
    stored.rest = s.rest[i];
    stored.at_1 = s.at_1[i];
    if (s.softmax != nullptr) stored.softmax = s.softmax[i];
    return stored;
  }

  const Job& job;
  Scratch scratch;

 private:
  std::vector<double> stored_logits_;
  Spec own_;
  unsigned before_ = 0;
};

// Solves row i: its results, and its weighted gradient into `grad` where there is one.
template <class Divergence, Kind kKind>
void solve(Row<kKind>& row, const RowWeights& weights, const Matrix& grad, int64_t i, double* results) {
  RowState r;
  const bool second = !kHasClosedForm<Divergence> && row.spec.asks(kSoft);
  if (second || grad.data)
    fold<true>(row, r);
  else
    fold<false>(row, r);
  if constexpr (!kHasClosedForm<Divergence>)
    if (second) value<Divergence>(row, r);
  finish(r, row.spec, kKind != kNone, row.job.vocab, results);
  if (grad.data) write_gradient(row, r, weights, grad, i);
}

// The state to fold a row with once more that has the state `r`: none of its blocks raises these references.
inline RowState unfolded(const RowState& r) {
  RowState begun;
  begun.student.reference = r.student.reference;
  begun.teacher.reference = r.teacher.reference;
  return begun;
}

// Row i's gradient, where its state `r` is known.
template <class Divergence, Kind kKind>
void write_known(Row<kKind>& row, const RowState& r, const RowWeights& weights, const Matrix& grad,
                 int64_t i) {
  if (!weights.any_student()) return write_zeros(grad, i, row.job.width);
  row.known = true;
  RowState folded = unfolded(r);
  FoldPass<true, false, kKind> fold(row, folded);
  GradientPass<kKind> write(row, r, weights, grad.row(i), grad.dtype);
  if constexpr (!kHasClosedForm<Divergence>) {
    if (weights.soft != 0) {
      RowState valued = r;
      ValuePass<Divergence, kKind> value(row, valued);
      return row.walk(fold, value, write);
    }
  }
  row.walk(fold, write);
}

inline void fused(const Job& job, int64_t begin, int64_t end) {
  RowRange range(job);
  for (int64_t i = begin; i < end; ++i) {
    if (!job.is_live(i)) {
      if (job.grad.data) write_zeros(job.grad, i, job.width);
      if (job.teacher_grad.data) write_zeros(job.teacher_grad, i, job.width);
      continue;
    }
    const RowWeights weights = job.weights_of(i);
    with_kind(job.spec.kind, job.teacher.data != nullptr, [&]<Kind kKind, class Divergence>() {
      auto row = range.row<kKind>(i);
      solve<Divergence>(row, weights, job.grad, i, range.results(i));
    });
    if (!job.spec.asks(kTeacherLabel)) continue;
    auto teacher = range.teacher_row(i);
    RowState own;
    fold<true, false>(teacher, own);
    range.results(i)[kTeacherLabel] = own.student.at_1().above(own.student.label_logit);
    if (job.teacher_grad.data)
      write_gradient(teacher, own, RowRange::teacher_weights(weights), job.teacher_grad, i);
  }
}

inline void accumulate(const Job& job, int64_t begin, int64_t end) {
  RowRange range(job);
  for (int64_t i = begin; i < end; ++i) {
    if (!job.is_live(i)) continue;
    RowState& r = range.state(i);
    with_kind(job.spec.kind, job.teacher.data != nullptr, [&]<Kind kKind, class Divergence>() {
      auto row = range.row<kKind>(i);
      const StoredIds stored = range.stored(i);
      if (stored.ids) row.leave_out(stored);
      fold<false>(row, r);
    });
    if (!job.spec.asks(kTeacherLabel) || !job.spec.tempered) continue;
    RowState own;
    auto teacher = range.teacher_row(i);
    fold<false, false>(teacher, own);
    if (own.student.sum_exp > 0)
      r.teacher.sum_exp_t1 += own.student.sum_exp * std::exp(own.student.reference - r.teacher.reference);
  }
}

inline void accumulate_value(const Job& job, int64_t begin, int64_t end) {
  RowRange range(job);
  for (int64_t i = begin; i < end; ++i) {
    with_kind(job.spec.kind, true, [&]<Kind kKind, class Divergence>() {
      if constexpr (!kHasClosedForm<Divergence>) {
        auto row = range.row<kKind>(i);
        row.known = true;
        RowState &r = range.state(i), folded = unfolded(r);
        FoldPass<true, false, kKind> fold(row, folded);
        ValuePass<Divergence, kKind> value(row, r);
        row.walk(fold, value);
        value.end();
      }
    });
  }
}

inline void gradient(const Job& job, int64_t begin, int64_t end) {
  RowRange range(job);
  for (int64_t i = begin; i < end; ++i) {
    const RowWeights weights = job.is_live(i) ? job.weights_of(i) : RowWeights{};
    const RowState& r = range.state(i);
    with_kind(job.spec.kind, job.teacher.data != nullptr, [&]<Kind kKind, class Divergence>() {
      if (!job.grad.data) return;
      auto row = range.row<kKind>(i);
      const StoredIds stored = range.stored(i);
      if (stored.ids && weights.any_student()) row.leave_out(stored);
      write_known<Divergence>(row, r, weights, job.grad, i);
    });
    if (!job.teacher_grad.data) continue;
    auto teacher = range.teacher_row(i);
    RowState own;
    own.student.reference = r.teacher.reference;
    own.student.sum_exp = own.student.sum_exp_t1 = r.teacher.sum_exp_t1;
    write_known<ClosedForm>(teacher, own, RowRange::teacher_weights(weights), job.teacher_grad, i);
  }
}

}  // namespace KD_ISA
}  // namespace kd
