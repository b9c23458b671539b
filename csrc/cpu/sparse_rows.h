// Rows with a sparse target: each logit is read once, as in rows.h.
//
// A row is folded without its kept ids; the K + 1 outcomes, a row of their own a few vectors long, are
// solved by the same code as a dense row; then the row is emitted, while its exponentials are in cache.
#pragma once

#include "rows.h"

namespace kd {
namespace KD_ISA {

constexpr int kConditional = 2;  // kdkernels/targets/sparse_target.py's TAILS, counted from 1

// One row of K + 1 outcomes as a dense problem, and the memory for it.
class OutcomeRow {
 public:
  explicit OutcomeRow(const Job& job)
      : slots_(job.sparse.slots),
        temperature_(job.spec.temperature),
        student_(padded(slots_ + 1)),
        grad_(student_.size()),
        scratch_(slots_ + 1) {
    small_.width = small_.vocab = slots_ + 1;
    small_.spec = job.sparse.outcome_spec;
    small_.student = {(char*)student_.data(), kFloat, 0};
    if (job.grad.data) small_.grad = {(char*)grad_.data(), kFloat, 0};
    small_.weights = &scale_;
    small_.results = results_;
  }

  // results[0..4) but for scale and constant; the gradient is grad()[k], the rest's last.
  void solve(const double* logits, double rest, const char* teacher, double scale) {
    double peak = std::max(rest, kNothing);
    for (int64_t k = 0; k < slots_; ++k) peak = std::max(peak, logits[k] / temperature_);
    for (int64_t k = 0; k < slots_; ++k) student_[k] = (float)(logits[k] / temperature_ - peak);
    student_[slots_] = (float)(rest - peak);
    small_.teacher = {(char*)teacher, kFloat, 0};
    scale_ = scale;
    std::fill(results_, results_ + 6, 0.0);
    with_kind(small_.spec, true, [&]<int kKind, class Divergence>() {
      Row<kKind> row(small_, small_.spec, source(small_.student, 0, 1, 0), source(small_.teacher, 0, 1, 0),
                     scratch_, -1);
      KD_ISA::solve<Divergence>(row, small_, small_.spec, 0);
    });
  }

  const double* results() const { return results_; }
  const float* grad() const { return grad_.data(); }

 private:
  int64_t slots_;
  double temperature_, scale_ = 1;
  std::vector<float> student_, grad_;
  Scratch scratch_;
  Job small_;
  double results_[6] = {};
};

inline double log_add(double lse, const double* logits, int64_t count) {
  double peak = std::max(lse, kNothing);
  for (int64_t k = 0; k < count; ++k) peak = std::max(peak, logits[k]);
  double total = std::exp(lse - peak);
  for (int64_t k = 0; k < count; ++k) total += std::exp(logits[k] - peak);
  return peak + std::log(total);
}

// Whether the student's top-1 token (of the kept ones under "conditional") is the teacher's.
inline bool agrees(const Kept& kept, const float* teacher, const RowState& r, const Spec& spec) {
  if (kept.ids[0] < 0) return false;
  const int64_t mine = std::max_element(kept.logits, kept.logits + kept.count) - kept.logits;
  if (std::max_element(teacher, teacher + kept.count) - teacher != mine) return false;
  const double best = kept.logits[mine];
  return (int)spec.tail == kConditional || best > r.m_s ||
         (best == r.m_s && kept.ids[mine] < (int64_t)r.arg_s);
}

inline void fused_sparse(const Job& job, int64_t begin, int64_t end) {
  Range range(job);
  OutcomeRow outcomes(job);
  const Spec& spec = job.spec;
  for (int64_t i = begin; i < end; ++i) {
    auto row = range.row<kNone>(i);
    if (range.masked(i)) {
      if (job.grad.data) row.zero(job.grad, i);
      continue;
    }
    Kept kept = range.kept(i);
    row.skip(kept);
    RowState r = empty_state();
    if (job.grad.data)
      row.fold<true>(r);
    else
      row.fold<false>(r);
    const float* teacher = (const float*)job.sparse.teacher.row(i);
    const double lse = r.z_s == 0 ? -(double)kInf : r.lse_s(spec.temperature);
    const double rest = (int)spec.tail == kConditional ? (double)teacher[kept.count] : lse;
    outcomes.solve(kept.logits, rest, (const char*)teacher, job.sparse.scale[i]);
    kept.grad = outcomes.grad();
    kept.rest = outcomes.grad()[kept.count];

    double* results = job.results + i * 6;
    if (job.labels != nullptr && spec.hard_weight != 0) {
      kept.lse1 = log_add(r.lse1_s(), kept.logits, kept.count);
      results[1] = hard_term(r, kept.lse1, kept.lse1 - r.label_s, spec, job.vocab);
    }
    results[0] = job.sparse.scale[i] * outcomes.results()[0] + job.sparse.constant[i];
    results[2] = outcomes.results()[2];
    results[3] = outcomes.results()[3];
    results[4] = agrees(kept, teacher, r, spec);
    if (job.grad.data) row.emit(r, job.weights[i], job.grad, i);
  }
}

constexpr RowLoops kRowLoops = {fused, accumulate, accumulate_value, gradient, fused_sparse};

}  // namespace KD_ISA
}  // namespace kd
