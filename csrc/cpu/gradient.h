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

// A block of the scratch, and where its gradient goes.
struct GradientBlock {
  const float *exp_s, *second, *exp_s_t1;
  int end;
  char* to;
};

// Which coefficients are not 0, and of the soft ones, which is 1.
enum class Soft { kNone, kWholeFirst, kWholeOther };
enum class Hard { kNone, kAtT, kAtTAnd1 };

template <Soft kSoft, Hard kHard, DType kDType>
__attribute__((noinline)) void combine(const GradientBlock& block, const BlockCoefficients& coefficients) {
  const GradientBlock b = block;
  const BlockCoefficients c = coefficients;
  const auto combine_vector = [&](int64_t i) {
    const Vec e = load(b.exp_s + i);
    Vec v{};
    if constexpr (kSoft == Soft::kWholeFirst) v = (e - load(b.second + i) * c.other) * c.scale;
    if constexpr (kSoft == Soft::kWholeOther) v = (e * c.first - load(b.second + i)) * c.scale;
    if constexpr (kHard != Hard::kNone) v += e * c.hard - c.spread;
    if constexpr (kHard == Hard::kAtTAnd1) v += load(b.exp_s_t1 + i) * c.hard_t1;
    write<kDType>(b.to + i * bytes_of(kDType), v);
  };
  int64_t i = 0;
  for (; i + 2 * kLanes <= b.end; i += 2 * kLanes) {
    __builtin_prefetch(b.exp_s + i + kAhead);
    if constexpr (kSoft != Soft::kNone) __builtin_prefetch(b.second + i + kAhead);
    combine_vector(i);
    combine_vector(i + kLanes);
  }
  if (i < b.end) combine_vector(i);
}

template <DType kDType>
void combine(const GradientBlock& block, const BlockCoefficients& c) {
  const auto with_hard = [&]<Soft kSoft>() {
    if (c.hard_t1 != 0) return combine<kSoft, Hard::kAtTAnd1, kDType>(block, c);
    if (c.hard != 0 || c.spread != 0) return combine<kSoft, Hard::kAtT, kDType>(block, c);
    combine<kSoft, Hard::kNone, kDType>(block, c);
  };
  // Where the block has no mass left, `second` may be infinite.
  if (c.scale == 0) return with_hard.template operator()<Soft::kNone>();
  if (c.first == 1) return with_hard.template operator()<Soft::kWholeFirst>();
  with_hard.template operator()<Soft::kWholeOther>();
}

template <Kind kKind>
class GradientPass {
  static constexpr bool kTeacher = kKind != kNone;

 public:
  // `to`: the row of the gradient, of this chunk's width.
  GradientPass(Row<kKind>& row, const RowState& state, const RowWeights& weights, char* to, DType dtype)
      : row_(row), state_(state), weights_(weights), to_(to), dtype_(dtype) {
    softmax_ = row.stored != nullptr ? row.stored->softmax : state.student.softmax();
    if (!weights.any_hard()) return;
    at_1_ = row.stored != nullptr ? row.stored->at_1 : state.student.at_1();
    pull_ = weights.label + weights.smooth;
    if (weights.lse_squared != 0) pull_ += 2 * at_1_.lse() * weights.lse_squared;
    spread_ = weights.smooth / (double)row.job.vocab;
  }

  void block(int64_t start, int n, int64_t b) {
    const int label = weights_.label != 0 ? row_.label_in(start, n) : -1;
    const bool whole = n % kLanes == 0 && !row_.student.is_mapped();
    // What is still to be changed is changed in fp32, and logits that may lie there are read before they
    // are overwritten.
    const bool direct =
        whole && weights_.entropy == 0 && (dtype_ == kFloat || (label < 0 && row_.stored == nullptr));
    float* g = direct ? (float*)(to_ + start * bytes_of(dtype_)) : row_.scratch.grad_block();
    const double label_logit = label >= 0 ? row_.student.logit(label + start) : 0;
    refresh(b);
    const GradientBlock block{row_.student_exp(start), row_.second(start), row_.student_exp_t1(start),
                              padded(n), (char*)g};
    with_dtype(direct ? dtype_ : kFloat, [&]<DType kDType>() { combine<kDType>(block, coefficients_); });
    if (weights_.entropy != 0) add_entropy(start, n, g);
    if (label >= 0) g[label] = (float)at_label(start, label, label_logit);
    if (row_.stored != nullptr) write_stored(start, n, g);
    if (row_.student.is_mapped()) through_map(start, n, g);
    if (!direct) store_floats(g, n, to_, dtype_, start);
  }

 private:
  // Most blocks have the same references as the one before, and so the same coefficients.
  void refresh(int64_t b) {
    if (b > 0 && references_ == row_.scratch.references(b)) return;
    references_ = row_.scratch.references(b);
    coefficients_ = coefficients();
  }

  BlockCoefficients coefficients() const {
    BlockCoefficients c;
    const SideState &student = state_.student, &teacher = state_.teacher;
    const double log_share = row_.log_share(references_.student, student);
    const double soft = weights_.soft / row_.temperature;
    if constexpr (kKind == kForwardKL) {
      const double log_share_t = row_.log_share(references_.teacher, teacher);
      const double most = std::max(log_share, log_share_t);
      c.first = (float)std::exp(log_share - most);
      c.other = (float)std::exp(log_share_t - most);
      c.scale = (float)(soft * std::exp(most));
    } else if constexpr (kKind == kReverseKL) {
      const double shift = row_.log_share(references_.teacher, teacher) - log_share;
      c.first = (float)(-(shift + divergence_value(state_, kKind)) * row_.temperature);
      c.other = 1;
      c.scale = (float)(soft / row_.temperature * std::exp(log_share));
    } else if constexpr (kTeacher) {
      c.first = (float)(state_.pair.sum_q_psi * std::exp(log_share));
      c.other = 1;
      c.scale = (float)-soft;
    }
    if (weights_.soft == 0) c.scale = 0;  // whatever the divergence is
    double hard = 0;
    if (row_.stored != nullptr && weights_.soft != 0 && student.sum_exp > 0)
      hard = weights_.soft * row_.stored->rest * std::exp(log_share);
    const double pull = pull_ == 0 ? 0 : pull_ * std::exp(-at_1_.above(references_.student));
    if (!row_.tempered_hard) hard += pull;
    c.hard = (float)hard;
    c.hard_t1 = row_.tempered_hard ? (float)pull : 0.0f;
    c.spread = (float)spread_;
    return c;
  }

  // weight * q (mean_shift - (z - reference) / T) / T, of the block's exponentials, which are relative to its
  // own reference.
  void add_entropy(int64_t start, int n, float* g) const {
    const float *z = row_.student.floats(start, n, row_.scratch.student_block()),
                *exp_s = row_.student_exp(start);
    const double moved = (references_.student - softmax_.reference) / row_.temperature;
    const double share = weights_.entropy / row_.temperature * std::exp(moved - softmax_.log_sum_exp);
    const float mean = (float)(share * (softmax_.mean_shift - moved)),
                slope = (float)(share / row_.temperature);
    const float reference = (float)references_.student;
    const Vec low = splat(row_.per_temperature.low);  // e is 0 here, and 0 * low is 0 where 0 * -inf is not
    for (int i = 0; i < padded(n); i += kLanes) {
      const Vec shift = vmax(load(z + i) - reference, low);
      store(g + i, load(g + i) + load(exp_s + i) * (mean - shift * slope));
    }
  }

  // The same of one logit.
  double entropy_at(double z) const {
    if (weights_.entropy == 0) return 0;
    const double shift = (z - softmax_.reference) / row_.temperature;
    return weights_.entropy / row_.temperature *
           moment(std::exp(shift - softmax_.log_sum_exp), softmax_.mean_shift - shift);
  }

  // The gradient at the label, as one sum: what is left of weight * (1 - q) where q is nearly 1 keeps its
  // digits.
  double at_label(int64_t start, int at, double z) const {
    const BlockCoefficients& c = coefficients_;
    const double e = row_.student_exp(start)[at];
    double soft = 0;
    if (c.scale != 0) soft = (e * c.first - (double)row_.second(start)[at] * c.other) * c.scale;
    if (row_.stored != nullptr && weights_.soft != 0 && state_.student.sum_exp > 0)
      soft += e * weights_.soft * row_.stored->rest *
              std::exp(row_.log_share(references_.student, state_.student));
    return soft + hard_at(z) - weights_.label + entropy_at(z);
  }

  // What the outputs at temperature 1 pull a logit by, but for the label's own weight.
  double hard_at(double z) const { return (pull_ == 0 ? 0 : pull_ * std::exp(-at_1_.above(z))) - spread_; }

  void write_stored(int64_t start, int n, float* g) {
    const StoredIds& stored = *row_.stored;
    const int64_t begin = row_.job.offset + start;
    stored.each(begin, begin + n, next_stored_, [&](int64_t k, int64_t at) {
      const double soft = weights_.soft == 0 ? 0 : weights_.soft * stored.grad[k], z = stored.logits[k];
      const double own = begin + at == row_.label ? weights_.label : 0;
      g[at] = (float)(soft + (hard_at(z) - own) + entropy_at(z));
    });
  }

  // d raw: times scale * (1 - (logit / cap)^2).
  void through_map(int64_t start, int n, float* g) const {
    const Source& from = row_.student;
    const float* z = from.floats(start, n, row_.scratch.student_block());
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
  char* const to_;
  const DType dtype_;
  int64_t next_stored_ = 0;
  // At temperature 1 the gradient is pull * exp(z - lse) - spread, and the label's weight less at the label.
  Normaliser at_1_;
  double pull_ = 0, spread_ = 0;
  References references_;
  BlockCoefficients coefficients_;
  Softmax softmax_;  // of the row, stored ids included
};

inline void write_zeros(const Matrix& grad, int64_t i, int64_t width) {
  std::memset(grad.row(i), 0, width * bytes_of(grad.dtype));
}

template <Kind kKind>
void write_gradient(Row<kKind>& row, const RowState& state, const RowWeights& weights, const Matrix& grad,
                    int64_t i) {
  if (!weights.any_student()) return write_zeros(grad, i, row.job.width);
  GradientPass<kKind> pass(row, state, weights, grad.row(i), grad.dtype);
  row.walk(pass);
}

}  // namespace KD_ISA
}  // namespace kd
