// Rows with a sparse target: each logit is read once, as with a dense one.
//
// A row is folded without its stored ids. The K + 1 outcomes, a row of their own a few vectors long, are
// solved by the same code as a dense row. Then the row's gradient is written, while its exponentials are in
// cache. What is solved, and why, is in kdkernels/backends/outcomes.py.
#pragma once

#include "columns.h"
#include "entry_points.h"

namespace kd {
namespace KD_ISA {

// One row of K + 1 outcomes as a dense problem, and the memory for it.
class OutcomeRow {
 public:
  explicit OutcomeRow(const Job& job)
      : slots_(job.sparse.slots), student_(padded(slots_ + 1)), grad_(student_.size()), scratch_(slots_ + 1) {
    problem_.spec = job.sparse.outcome_spec;
    problem_.parameters = job.parameters;
    problem_.student = {(char*)student_.data(), kFloat, 0};
    if (job.grad.data) problem_.grad = {(char*)grad_.data(), kFloat, 0};
  }

  // `logits`: the stored ids', still to be divided by `inner`; `rest`: the normaliser at `inner` of all other
  // ids, an outcome if `has_rest`; `teacher`: the K + 1 log-masses. They are compared at temperature `outer`.
  // results() are theirs, not scaled; grad() is for the undivided logits and is multiplied by `scale`.
  void solve(const double* logits, const Normaliser& rest, bool has_rest, const char* teacher, double inner,
             double outer, double scale) {
    double peak = rest.reference;
    for (int64_t k = 0; k < slots_; ++k) peak = std::max(peak, logits[k]);
    const double rest_mass = (rest.reference - peak) / inner + rest.log_sum_exp;
    double most = std::max(rest_mass, kNoReference);
    for (int64_t k = 0; k < slots_; ++k) most = std::max(most, (logits[k] - peak) / inner);
    for (int64_t k = 0; k < slots_; ++k) student_[k] = (float)((logits[k] - peak) / inner - most);
    student_[slots_] = (float)(rest_mass - most);
    grad_[slots_] = 0;
    problem_.width = problem_.vocab = slots_ + has_rest;
    problem_.teacher = {(char*)teacher, kFloat, 0};
    std::fill(results_, results_ + kResults, 0.0);
    with_kind(problem_.spec.kind, true, [&]<Kind kKind, class Divergence>() {
      Row<kKind> row(problem_, problem_.spec, outer, source(problem_.student, 0, 1, 0),
                     source(problem_.teacher, 0, 1, 0), scratch_, -1);
      KD_ISA::solve<Divergence>(row, {.soft = scale / inner}, problem_.grad, 0, results_);
    });
  }

  const double* results() const { return results_; }
  const float* grad() const { return grad_.data(); }  // [slots + 1], the rest's last

 private:
  int64_t slots_;
  std::vector<float> student_, grad_;
  Scratch scratch_;
  Job problem_;
  double results_[kResults] = {};
};

// The normaliser at temperature 1 of a row that is `logits` and what `rest` was folded from.
inline Normaliser at_1_with(const SideState& rest, const double* logits, int64_t count) {
  double peak = rest.reference;
  for (int64_t k = 0; k < count; ++k) peak = std::max(peak, logits[k]);
  double total = rest.sum_exp_t1 * std::exp(rest.reference - peak);
  for (int64_t k = 0; k < count; ++k) total += std::exp(logits[k] - peak);
  return {peak, std::log(total)};
}

// Whether the student's top-1 token (of the stored ones under "conditional") is the teacher's.
inline bool agrees(const StoredIds& stored, const float* teacher, const SideState& rest, Tail tail) {
  if (stored.count == 0 || stored.ids[0] < 0) return false;
  const int64_t mine = std::max_element(stored.logits, stored.logits + stored.count) - stored.logits;
  if (std::max_element(teacher, teacher + stored.count) - teacher != mine) return false;
  const double best = stored.logits[mine];
  return tail == kConditional || best > rest.top_logit ||
         (best == rest.top_logit && stored.ids[mine] < (int64_t)rest.top_index);
}

inline void fused_sparse(const Job& job, int64_t begin, int64_t end) {
  RowRange range(job);
  OutcomeRow outcomes(job);
  const Spec& spec = job.spec;
  for (int64_t i = begin; i < end; ++i) {
    if (!job.is_live(i)) {
      if (job.grad.data) write_zeros(job.grad, i, job.width);
      continue;
    }
    auto row = range.row<kNone>(i);
    StoredIds stored = range.stored(i);
    row.leave_out(stored);
    RowState r;
    if (job.grad.data)
      fold<true>(row, r);
    else
      fold<false>(row, r);
    const SideState& student = r.student;  // of all ids that are not stored
    const float* teacher = (const float*)job.sparse.teacher.row(i);
    const Normaliser rest = {student.reference, spec.tail == kConditional ? (double)teacher[stored.count]
                                                                          : std::log(student.sum_exp)};
    const double scale = job.sparse.scale[i];
    const bool has_rest = !job.sparse.rest_is_none(i, student.sum_exp);
    outcomes.solve(stored.logits, rest, has_rest, (const char*)teacher, row.temperature,
                   job.temperature_of(i, job.sparse.outcome_spec), scale);
    stored.grad = outcomes.grad();
    stored.rest = outcomes.grad()[stored.count];

    double* results = range.results(i);
    if (spec.asks(kSoft)) results[kSoft] = scale * outcomes.results()[kSoft] + job.sparse.constant[i];
    if (spec.asks_hard()) {
      stored.at_1 = at_1_with(student, stored.logits, stored.count);
      hard_results(student, stored.at_1, spec, job.vocab, results);
    }
    if (spec.stats) {
      results[kStudentEntropy] = outcomes.results()[kStudentEntropy];
      results[kTeacherEntropy] = outcomes.results()[kTeacherEntropy];
      results[kAgreement] = agrees(stored, teacher, student, spec.tail);
    }
    if (job.grad.data) write_gradient(row, r, job.weights_of(i), job.grad, i);
  }
}

constexpr RowLoops kRowLoops = {fused,        accumulate,     accumulate_value, gradient,
                                fused_sparse, column_squares, gather_columns};

}  // namespace KD_ISA
}  // namespace kd
