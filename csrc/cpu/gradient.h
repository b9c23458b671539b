// Last pass over a row: weights * d(outputs)/d(raw logits) of a chunk, from a finished state and the scratch.
//
// The soft gradient is formed as (exp_s * first - second * other) * scale with `first` or `other` exactly 1,
// so that equal logits give an exact zero.
#pragma once

#include "row.h"

namespace kd {
namespace KD_ISA {

// What a block's entries of the scratch are multiplied by.
struct BlockCoefficients {
  float first = 0, other = 0, scale = 0;    // soft: (exp_s * first - second * other) * scale
  float hard = 0, hard_t1 = 0, spread = 0;  // at temperature 1: exp_s * hard + exp_s_t1 * hard_t1 - spread
};

template <Kind kKind>
class GradientPass {
  static constexpr bool kTeacher = kKind != kNone;

 public:
  GradientPass(Row<kKind>& row, const RowState& state, const RowWeights& weights)
      : row_(row), state_(state), weights_(weights) {
    if (!weights.any_hard()) return;
    lse_t1_ = row.stored != nullptr ? row.stored->lse_t1 : state.student.lse_t1();
    pull_ = weights.label + weights.smooth;
    if (weights.lse_squared != 0) pull_ += 2 * lse_t1_ * weights.lse_squared;
    spread_ = weights.smooth / (double)row.job.vocab;
  }

  // `to`: the row of the gradient, of this chunk's width.
  void write(char* to, DType dtype) {
    int64_t next = 0;
    row_.each_block([&](int64_t start, int n, int64_t b) {
      const bool direct = dtype == kFloat && n % kLanes == 0 && !row_.student.is_mapped();
      float* g = direct ? (float*)to + start : row_.scratch.grad_block();
      combine(coefficients(b), start, padded(n), g);
      if (row_.stored != nullptr) write_stored(start, n, next, g);
      const int label = row_.label_in(start, n);
      if (weights_.label != 0 && label >= 0) g[label] -= (float)weights_.label;
      if (row_.student.is_mapped()) through_map(start, n, g);
      if (!direct) store_floats(g, n, to, dtype, start);
    });
  }

 private:
  BlockCoefficients coefficients(int64_t b) const {
    BlockCoefficients c;
    const SideState &student = state_.student, &teacher = state_.teacher;
    const double block = row_.scratch.student_reference(b), log_share = row_.log_share(block, student);
    const double soft = weights_.soft / row_.temperature;
    if constexpr (kKind == kForwardKL) {
      const double log_share_t = row_.log_share(row_.scratch.teacher_reference(b), teacher);
      const double most = std::max(log_share, log_share_t);
      c.first = (float)std::exp(log_share - most);
      c.other = (float)std::exp(log_share_t - most);
      c.scale = (float)(soft * std::exp(most));
    } else if constexpr (kKind == kReverseKL) {
      const double shift = row_.log_share(row_.scratch.teacher_reference(b), teacher) - log_share;
      c.first = (float)-(shift + divergence_value(state_, kKind));
      c.other = (float)(1 / row_.temperature);
      c.scale = (float)(soft * std::exp(log_share));
    } else if constexpr (kTeacher) {
      c.first = (float)(state_.pair.sum_q_psi * std::exp(log_share));
      c.other = 1;
      c.scale = (float)-soft;
    }
    if (weights_.soft == 0) c.scale = 0;  // whatever the divergence is
    double hard = 0;
    if (row_.stored != nullptr && weights_.soft != 0 && student.sum_exp > 0)
      hard = weights_.soft * row_.stored->rest * std::exp(log_share);
    const double pull = pull_ == 0 ? 0 : pull_ * std::exp(block - lse_t1_);
    if (!row_.tempered_hard) hard += pull;
    c.hard = (float)hard;
    c.hard_t1 = row_.tempered_hard ? (float)pull : 0.0f;
    c.spread = (float)spread_;
    return c;
  }

  void combine(const BlockCoefficients& c, int64_t start, int end, float* g) const {
    const float *exp_s = row_.scratch.student_exp() + start, *second = row_.scratch.second() + start;
    const float* exp_s_t1 = row_.scratch.student_exp_t1() + start;
    const bool hard = c.hard != 0 || c.spread != 0, hard_t1 = c.hard_t1 != 0;
    const bool soft = c.scale != 0;  // where the block has no mass left, `second` may be infinite
    for (int i = 0; i < end; i += kLanes) {
      const Vec e = load(exp_s + i);
      Vec v{};
      if constexpr (kTeacher)
        if (soft) v = (e * c.first - load(second + i) * c.other) * c.scale;
      if (hard) v = v + (e * c.hard - c.spread);
      if (hard_t1) v = v + load(exp_s_t1 + i) * c.hard_t1;
      store(g + i, v);
    }
  }

  void write_stored(int64_t start, int n, int64_t& next, float* g) const {
    const StoredIds& stored = *row_.stored;
    const int64_t begin = row_.job.offset + start;
    stored.each(begin, begin + n, next, [&](int64_t k, int64_t at) {
      const double soft = weights_.soft == 0 ? 0 : weights_.soft * stored.grad[k];
      const double hard = pull_ == 0 ? 0 : pull_ * std::exp(stored.logits[k] - lse_t1_);
      g[at] = (float)(soft + (hard - spread_));
    });
  }

  // d raw: times scale * (1 - (logit / cap)^2).
  void through_map(int64_t start, int n, float* g) const {
    const Source& from = row_.student;
    const float* z = from.block(start, n, row_.scratch.student_block());
    const float per_cap = from.cap != 0 ? 1 / from.cap : 0;
    for (int i = 0; i < padded(n); i += kLanes) {
      const Vec u = load(z + i) * per_cap;
      const Vec slope = from.cap != 0 ? 1.0f - u * u : splat(1.0f);
      store(g + i, load(g + i) * slope * from.scale);
    }
  }

  Row<kKind>& row_;
  const RowState& state_;
  const RowWeights weights_;
  // At temperature 1 the gradient is pull * exp(z - lse_t1) - spread, and the label's weight less at the
  // label.
  double lse_t1_ = 0, pull_ = 0, spread_ = 0;
};

inline void write_zeros(const Matrix& grad, int64_t i, int64_t width) {
  std::memset(grad.row(i), 0, width * bytes_of(grad.dtype));
}

template <Kind kKind>
void write_gradient(Row<kKind>& row, const RowState& state, const RowWeights& weights, const Matrix& grad,
                    int64_t i) {
  if (!weights.any_student()) return write_zeros(grad, i, row.job.width);
  GradientPass<kKind>(row, state, weights).write(grad.row(i), grad.dtype);
}

}  // namespace KD_ISA
}  // namespace kd
