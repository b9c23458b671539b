// The row loops of the CPU backend, compiled once per instruction set (rows_*.cpp).
//
// Contract: a row is worked on by one thread, block by block (kBlock entries, in L1), so results do
// not depend on the number of threads. The gradient may alias the logits that it belongs to: a block
// is written only after the last read of it.
//
// Traffic: each logit comes from memory once. The fold reads a block, finds its maximum, and keeps
// exp(s - m), exp(t - m) in scratch (two rows of fp32, which stay in L2); the emit turns them into
// the gradient without another exponential. Divergences without a closed form pass over the blocks
// in between, while the row is still in cache.
//
// Numerics: the maximum is subtracted before anything is divided by the temperature, which costs nothing
// (vec.h's exp_scaled). A block's exponentials are relative to the running maximum at that block; its
// coefficients exp(m_block - lse) are computed in fp64, once per block. The gradient is formed as
// (e * alpha - a * beta) * gamma with alpha or beta exactly 1, so p == q gives an exact zero.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "../divergence.h"
#include "../row_state.h"
#include "row_loops.h"
#include "source.h"

namespace kd {
namespace KD_ISA {

// A group is summed by itself: few small terms are then added to a lane that holds the row's largest, and
// what is left of 1 beside a token with p = 0.999 keeps its digits.
constexpr int kGroup = 16 * kLanes;
constexpr int kAhead = 512;  // entries that the second pass fetches ahead: its four rows fill L2

// A sparse target's ids in one row. The fold leaves them out; the emit writes their gradient as it was
// solved, and `rest` times the softmax of all others.
struct Kept {
  const int64_t* ids = nullptr;  // ascending, -1 anywhere in between: none
  int64_t count = 0;
  double* logits = nullptr;     // of the ids in this chunk, mapped; see skip()
  const float* grad = nullptr;  // of the soft term, before the row's weight
  double rest = 0, lse1 = 0;    // the same for the rest as a whole; the row's normaliser at temperature 1
};

// One row of both sides, and the passes over it.
template <int kKind>
class Row {
  static constexpr bool kTeacher = kKind != kNone;
  static constexpr bool kClosed = kKind == kForwardKL || kKind == kReverseKL || kKind == kNone;

 public:
  Row(const Job& job, const Spec& spec, Source s, Source t, Scratch& scratch, int64_t label)
      : job_(job),
        spec_(spec),
        s_(s),
        t_(t),
        scratch_(scratch),
        label_(label),
        temper_(1 / spec.temperature),
        tempered_hard_(label >= 0 && spec.hard_weight != 0 && spec.temperature != 1) {}

  // Take `kept` out of the row; its logits are read now, before a gradient can overwrite them.
  void skip(const Kept& kept) {
    kept_ = &kept;
    for (int64_t k = 0; k < kept.count; ++k) {
      const int64_t at = kept.ids[k] - job_.offset;
      kept.logits[k] = kept.ids[k] >= 0 && at >= 0 && at < job_.width ? s_.at(at) : -kInf;
    }
  }

  // First pass: fold the chunk into `r`. kKeep fills the scratch for the passes that follow.
  template <bool kKeep>
  void fold(RowState& r) {
    int64_t next = 0;
    for (int64_t start = 0, b = 0; start < job_.width; start += kBlock, ++b) {
      const int n = (int)std::min<int64_t>(kBlock, job_.width - start);
      const float* s = s_.block(start, n, scratch_.s_block());
      const float* t = kTeacher ? t_.block(start, n, scratch_.t_block()) : nullptr;
      if (label_ >= 0 && spec_.hard_weight != 0) label_sums(r, s, start, n);
      if (kept_ != nullptr) s = without_kept(s, start, n, next);
      raise_maxima(r, s, t, start, n);
      scratch_.m_s[b] = r.m_s;
      scratch_.m_t[b] = r.m_t;
      const Ahead ahead{s_.ahead(start + kBlock), kTeacher ? t_.ahead(start + kBlock) : nullptr};
      sums<kKeep>(r, s, t, start, padded(n), ahead);
      if (tempered_hard_) tempered_sums(r, s, start, padded(n));
    }
    if (spec_.temperature == 1) r.z1_s = r.z_s;
  }

  // Second pass, for divergences without a closed form: value, slope, and a = q_psi.
  template <class Divergence>
  void value(RowState& r) {
    const Divergence divergence(spec_, kKind == kSkewKL && disagree(r, std::log(r.z_t) - std::log(r.z_s)));
    // Relative to the maximum first, to log Z second: lse itself would lose the digits of a shift.
    const float m_s = (float)r.m_s, m_t = (float)r.m_t, per_temperature = temper_.scale;
    const float log_z_s = (float)std::log(r.z_s), log_z_t = (float)std::log(r.z_t);
    const float gap = log_z_s - log_z_t;
    r.value += 0 * (r.z_s + r.z_t);  // NaN logits stay visible whatever the formula does with them
    for (int64_t start = 0, b = 0; start < job_.width; start += kBlock, ++b) {
      const int n = (int)std::min<int64_t>(kBlock, job_.width - start), end = padded(n);
      const float *s = nullptr, *t = nullptr;
      if constexpr (!Divergence::kFromProbabilities) {
        s = s_.block(start, n, scratch_.s_block());
        t = t_.block(start, n, scratch_.t_block());
      }
      const float c_s = (float)std::exp(log_share(scratch_.m_s[b], r.m_s, r.z_s));
      const float c_t = (float)std::exp(log_share(scratch_.m_t[b], r.m_t, r.z_t));
      float *e = scratch_.e() + start, *a = scratch_.a() + start;
      Vec phi{}, slope{};
      for (int first = 0; first < end; first += kGroup) {
        Vec group_phi{}, group_slope{};
        for (int i = first; i < std::min(first + kGroup, end); i += kLanes) {
          __builtin_prefetch(e + i + kAhead);
          __builtin_prefetch(a + i + kAhead);
          const Vec p = rounded_product(load(a + i), c_t), q = rounded_product(load(e + i), c_s);
          Vec sv{}, tv{};
          if constexpr (!Divergence::kFromProbabilities) {
            __builtin_prefetch(s + i + kAhead);
            __builtin_prefetch(t + i + kAhead);
            sv = load(s + i) - m_s;
            tv = load(t + i) - m_t;
          }
          const Terms terms = divergence(p, q, (tv - sv) * per_temperature + gap,
                                         tv * per_temperature - log_z_t, sv * per_temperature - log_z_s);
          group_phi += terms.phi;
          group_slope += terms.q_psi;
          store(a + i, terms.q_psi);
        }
        phi += group_phi;
        slope += group_slope;
      }
      r.value += sum(phi);
      r.slope += sum(slope);
    }
    if (r.value != r.value) r.slope = r.value;  // in the gradient too
  }

  // Last pass: weight * d(loss)/d(raw logits) of the chunk, from finished state and the scratch.
  void emit(const RowState& r, double weight, const Matrix& grad, int64_t i) {
    if (weight == 0) return zero(grad, i);
    const double hard = label_ >= 0 ? weight * spec_.hard_weight : 0;
    const double lse1 = hard == 0 ? 0 : kept_ != nullptr ? kept_->lse1 : r.lse1_s();
    const double pull = hard * (1 + 2 * spec_.z_loss * lse1);
    const bool through_map = s_.cap != 0 || s_.scale != 1;
    int64_t next = 0;
    for (int64_t start = 0, b = 0; start < job_.width; start += kBlock, ++b) {
      const int n = (int)std::min<int64_t>(kBlock, job_.width - start);
      const bool direct = grad.dtype == kFloat && n % kLanes == 0 && !through_map;
      float* g = direct ? (float*)grad.row(i) + start : scratch_.g_block();
      const Coefficients c = coefficients(r, b, weight, hard, pull, lse1);
      combine(c, start, padded(n), g);
      if (kept_ != nullptr) emit_kept(c, weight, pull, lse1, start, n, next, g);
      const int64_t at = label_ - job_.offset - start;
      if (hard != 0 && at >= 0 && at < n) g[at] -= (float)(hard * (1 - spec_.label_smoothing));
      if (through_map) backward_map(start, n, g);
      if (!direct) store_floats(g, n, grad.row(i), grad.dtype, start);
    }
  }

  void zero(const Matrix& grad, int64_t i) const {
    std::memset(grad.row(i), 0, job_.width * (grad.dtype == kFloat ? 4 : 2));
  }

 private:
  struct Coefficients {
    float alpha = 0, beta = 0, gamma = 0;   // soft: (e alpha - a beta) gamma
    float eta = 0, eta1 = 0, constant = 0;  // hard: e eta + e1 eta1 + constant
  };

  // The next block, fetched while this one is computed: else memory would wait for arithmetic. A
  // prefetch past the end of the matrix is harmless.
  struct Ahead {
    const char *s, *t;
  };

  // log(exp((m_block - m) / T) / z): a block's exponentials, relative to m_block, times exp of it are q.
  double log_share(double m_block, double m, double z) const {
    return (m_block - m) / spec_.temperature - std::log(z);
  }

  void raise_maxima(RowState& r, const float* s, const float* t, int64_t start, int n) {
    const double best_s = block_max(s, padded(n));
    const double best_t = kTeacher ? block_max(t, padded(n)) : kNothing;
    raise(r, std::max(r.m_s, best_s), std::max(r.m_t, best_t), spec_.temperature);
    if (best_s > r.top_s) {
      r.top_s = best_s;
      r.arg_s = (double)(job_.offset + start + first_at(s, n, best_s));
    }
    if (kTeacher && best_t > r.top_t) {
      r.top_t = best_t;
      r.arg_t = (double)(job_.offset + start + first_at(t, n, best_t));
    }
  }

  // Calls f(k, place in the block) for each kept id in [start, start + n); `next` walks along the row.
  template <class F>
  void each_kept(int64_t start, int n, int64_t& next, F&& f) const {
    const int64_t begin = job_.offset + start, end = begin + n;
    for (; next < kept_->count && kept_->ids[next] < end; ++next)
      if (kept_->ids[next] >= begin) f(next, kept_->ids[next] - begin);
  }

  // The block with -inf for what is kept: a copy, since it may be the caller's own memory.
  const float* without_kept(const float* s, int64_t start, int n, int64_t& next) {
    float* copy = nullptr;
    each_kept(start, n, next, [&](int64_t, int64_t at) {
      if (copy == nullptr) {
        copy = scratch_.s_block();
        if (s != copy) std::memcpy(copy, s, padded(n) * sizeof(float));
      }
      copy[at] = -kInf;
    });
    return copy == nullptr ? s : copy;
  }

  void emit_kept(const Coefficients& c, double weight, double pull, double lse1, int64_t start, int n,
                 int64_t& next, float* g) const {
    each_kept(start, n, next, [&](int64_t k, int64_t at) {
      const double hard = pull == 0 ? 0 : pull * std::exp(kept_->logits[k] - lse1) + c.constant;
      g[at] = (float)(weight * kept_->grad[k] + hard);
    });
  }

  static double block_max(const float* x, int end) {
    Vec m0 = splat(-kInf), m1 = m0, m2 = m0, m3 = m0;
    int i = 0;
    for (; i + 4 * kLanes <= end; i += 4 * kLanes) {
      m0 = vmax(m0, load(x + i));
      m1 = vmax(m1, load(x + i + kLanes));
      m2 = vmax(m2, load(x + i + 2 * kLanes));
      m3 = vmax(m3, load(x + i + 3 * kLanes));
    }
    for (; i < end; i += kLanes) m0 = vmax(m0, load(x + i));
    return max_lane(vmax(vmax(m0, m1), vmax(m2, m3)));
  }

  static int first_at(const float* x, int n, double value) {
    return (int)(std::find(x, x + n, (float)value) - x);
  }

  template <bool kKeep>
  void sums(RowState& r, const float* s, const float* t, int64_t start, int end, Ahead ahead) {
    const int step_s = kLanes * s_.bytes(), step_t = kLanes * t_.bytes();
    const float m_s = (float)r.m_s, m_t = (float)r.m_t;
    float *keep_e = scratch_.e() + start, *keep_a = scratch_.a() + start;
    const Scale temper = temper_;
    const Vec least = splat(temper.least);  // there e is 0, and 0 * least is 0 where 0 * -inf is not
    Vec z_s{}, z_t{}, x_s{}, x_t{}, h_s{}, h_t{};
    for (int first = 0; first < end; first += kGroup) {
      Vec group_s{}, group_t{};
      for (int i = first; i < std::min(first + kGroup, end); i += kLanes) {
        __builtin_prefetch(ahead.s);
        ahead.s += step_s;
        if constexpr (kTeacher) {
          __builtin_prefetch(ahead.t);
          ahead.t += step_t;
        }
        const Vec sv = load(s + i) - m_s;
        const Vec e = exp_scaled(sv, temper);
        group_s += e;
        h_s += e * vmax(sv, least);
        if (kKeep) store(keep_e + i, e);
        if constexpr (kTeacher) {
          const Vec tv = load(t + i) - m_t;
          const Vec et = exp_scaled(tv, temper);
          const Vec x = tv - sv;
          group_t += et;
          h_t += et * vmax(tv, least);
          if constexpr (needs_x_t(kKind)) x_t = select(et > 0.0f, x_t + et * x, x_t);
          if constexpr (kKind == kReverseKL) {
            const Vec ex = select(e > 0.0f, e * x, Vec{});
            x_s += ex;
            if (kKeep) store(keep_a + i, ex);
          } else {
            if (kKeep) store(keep_a + i, et);
          }
        }
      }
      z_s += group_s;
      z_t += group_t;
    }
    r.z_s += sum(z_s);
    r.z_t += sum(z_t);
    r.e_s += sum(h_s) / spec_.temperature;
    r.e_t += sum(h_t) / spec_.temperature;
    r.x_s += sum(x_s) / spec_.temperature;
    r.x_t += sum(x_t) / spec_.temperature;
  }

  // The student's second normaliser, at temperature 1.
  void tempered_sums(RowState& r, const float* s, int64_t start, int end) {
    const float m = (float)r.m_s;
    float* keep = scratch_.e1() + start;
    Vec z{};
    for (int i = 0; i < end; i += kLanes) {
      const Vec e = vexp(load(s + i) - m);
      store(keep + i, e);
      z += e;
    }
    r.z1_s += sum(z);
  }

  void label_sums(RowState& r, const float* s, int64_t start, int n) {
    const int64_t at = label_ - job_.offset - start;
    if (at >= 0 && at < n) r.label_s = s[at];
    if (spec_.label_smoothing == 0) return;
    double total = 0;
    for (int i = 0; i < n; ++i) total += s[i];
    r.sum_s += total;
  }

  Coefficients coefficients(const RowState& r, int64_t b, double weight, double hard, double pull,
                            double lse1) const {
    Coefficients c;
    const double log_s = log_share(scratch_.m_s[b], r.m_s, r.z_s), c_s = std::exp(log_s);
    const double soft = weight * spec_.soft_weight / spec_.temperature;
    if constexpr (kKind == kForwardKL) {
      const double log_t = log_share(scratch_.m_t[b], r.m_t, r.z_t), most = std::max(log_s, log_t);
      c.alpha = (float)std::exp(log_s - most);
      c.beta = (float)std::exp(log_t - most);
      c.gamma = (float)(soft * std::exp(most));
    } else if constexpr (kKind == kReverseKL) {
      const double shift = log_share(scratch_.m_t[b], r.m_t, r.z_t) - log_s;
      c.alpha = (float)-(shift + divergence_value(r, kKind));
      c.beta = (float)(1 / spec_.temperature);
      c.gamma = (float)(soft * c_s);
    } else if constexpr (kTeacher) {
      c.alpha = (float)(r.slope * c_s);
      c.beta = 1;
      c.gamma = (float)-soft;
    }
    double eta = kept_ != nullptr && r.z_s > 0 ? weight * kept_->rest * c_s : 0;
    if (hard != 0 && !tempered_hard_) eta += pull * std::exp(scratch_.m_s[b] - lse1);
    c.eta = (float)eta;
    if (hard == 0) return c;
    if (tempered_hard_) c.eta1 = (float)(pull * std::exp(scratch_.m_s[b] - lse1));
    c.constant = (float)(-hard * spec_.label_smoothing / (double)job_.vocab);
    return c;
  }

  void combine(const Coefficients& c, int64_t start, int end, float* g) {
    const float *e = scratch_.e() + start, *a = scratch_.a() + start, *e1 = scratch_.e1() + start;
    const bool hard = c.eta != 0 || c.constant != 0;
    const bool soft = c.gamma != 0;  // where the block has no mass left, a may be infinite
    for (int i = 0; i < end; i += kLanes) {
      const Vec ev = load(e + i);
      Vec v{};
      if constexpr (kTeacher)
        if (soft) v = (ev * c.alpha - load(a + i) * c.beta) * c.gamma;
      if (hard) v = v + (ev * c.eta + c.constant);
      if (tempered_hard_) v = v + load(e1 + i) * c.eta1;
      store(g + i, v);
    }
  }

  // d raw: times scale * (1 - (y / cap)^2).
  void backward_map(int64_t start, int n, float* g) {
    const float* y = s_.block(start, n, scratch_.s_block());
    const float per_cap = s_.cap != 0 ? 1 / s_.cap : 0;
    for (int i = 0; i < padded(n); i += kLanes) {
      const Vec u = load(y + i) * per_cap;
      const Vec slope = s_.cap != 0 ? 1.0f - u * u : splat(1.0f);
      store(g + i, load(g + i) * slope * s_.scale);
    }
  }

  const Job& job_;
  const Spec& spec_;
  Source s_, t_;
  Scratch& scratch_;
  int64_t label_;
  Scale temper_;  // by 1 / temperature
  bool tempered_hard_;
  const Kept* kept_ = nullptr;
};

// Everything that a range of rows shares. Subnormals are flushed meanwhile: exponentials below
// 1e-38 do not count, and each would cost a hundred cycles.
class Range {
 public:
  Range(const Job& job) : job(job), scratch(job.width), kept_logits_(job.sparse.slots) {
#if defined(__SSE2__)
    before_ = __builtin_ia32_stmxcsr();
    __builtin_ia32_ldmxcsr(before_ | 0x8040);
#endif
  }
  ~Range() {
#if defined(__SSE2__)
    __builtin_ia32_ldmxcsr(before_);
#endif
  }

  int64_t label(int64_t i) const { return job.labels == nullptr ? -1 : job.labels[i]; }
  bool masked(int64_t i) const { return job.labels != nullptr && job.labels[i] < 0; }
  RowState& state(int64_t i) const { return *(RowState*)(job.state + i * kStateColumns); }

  template <int kKind>
  Row<kKind> row(int64_t i) {
    const Spec& s = job.spec;
    Source teacher;
    if (kKind != kNone) teacher = source(job.teacher, i, s.teacher_scale, s.teacher_softcap);
    const Source student = source(job.student, i, s.student_scale, s.student_softcap);
    return {job, s, student, teacher, scratch, label(i)};
  }

  // The teacher's own cross entropy (co-distillation): its row as a student without a teacher.
  static Spec teacher_spec(const Spec& s) {
    Spec own{};
    own.temperature = 1;
    own.hard_weight = s.teacher_hard_weight;
    return own;
  }
  Row<kNone> teacher_row(int64_t i, const Spec& own) {
    const Spec& s = job.spec;
    return {job,      own,     source(job.teacher, i, s.teacher_scale, s.teacher_softcap),
            Source{}, scratch, label(i)};
  }

  // The row's sparse target, or one without ids.
  Kept kept(int64_t i) {
    const SparseJob& s = job.sparse;
    if (s.ids == nullptr) return {};
    Kept kept{s.ids + i * s.slots, s.slots, kept_logits_.data()};
    if (s.rest == nullptr) return kept;
    kept.grad = (const float*)s.kept_grad.row(i);
    kept.rest = s.rest[i];
    kept.lse1 = s.lse1[i];
    return kept;
  }

  const Job& job;
  Scratch scratch;

 private:
  std::vector<double> kept_logits_;
  unsigned before_ = 0;
};

// Both passes over a whole row (three where the divergence needs it): results, and the gradient to
// `job.grad` unless that is absent.
template <class Divergence, int kKind>
RowState solve(Row<kKind>& row, const Job& job, const Spec& spec, int64_t i) {
  RowState r = empty_state();
  constexpr bool kSecond = !std::is_void_v<Divergence>;
  if (kSecond || job.grad.data)
    row.template fold<true>(r);
  else
    row.template fold<false>(r);
  if constexpr (kSecond) row.template value<Divergence>(r);
  finish(r, spec, kKind != kNone, job.labels != nullptr, job.vocab, job.results + i * 6);
  if (job.grad.data) row.emit(r, job.weights[i], job.grad, i);
  return r;
}

inline void fused(const Job& job, int64_t begin, int64_t end) {
  Range range(job);
  const Spec own = Range::teacher_spec(job.spec);
  for (int64_t i = begin; i < end; ++i) {
    with_kind(job.spec, job.teacher.data != nullptr, [&]<int kKind, class Divergence>() {
      auto row = range.template row<kKind>(i);
      if (range.masked(i)) {
        if (job.grad.data) row.zero(job.grad, i);
        if (job.teacher_grad.data) row.zero(job.teacher_grad, i);
        return;
      }
      solve<Divergence>(row, job, job.spec, i);
      if (job.spec.teacher_hard_weight == 0) return;
      auto teacher = range.teacher_row(i, own);
      RowState t = empty_state();
      teacher.template fold<true>(t);
      job.results[i * 6 + 5] = (t.m_s - t.label_s) + std::log(t.z_s);
      if (job.teacher_grad.data) teacher.emit(t, job.weights[i], job.teacher_grad, i);
    });
  }
}

inline void accumulate(const Job& job, int64_t begin, int64_t end) {
  Range range(job);
  const Spec own = Range::teacher_spec(job.spec);
  for (int64_t i = begin; i < end; ++i) {
    if (range.masked(i)) continue;
    RowState& r = range.state(i);
    with_kind(job.spec, job.teacher.data != nullptr, [&]<int kKind, class Divergence>() {
      auto row = range.template row<kKind>(i);
      const Kept kept = range.kept(i);
      if (kept.ids) row.skip(kept);
      row.template fold<false>(r);
    });
    if (job.spec.teacher_hard_weight == 0) continue;
    RowState t = empty_state();
    range.teacher_row(i, own).template fold<false>(t);
    if (t.z_s > 0) r.z1_t += t.z_s * std::exp(t.m_s - r.m_t);
    const int64_t at = range.label(i) - job.offset;
    if (at >= 0 && at < job.width) r.label_t = t.label_s;
  }
}

inline void accumulate_value(const Job& job, int64_t begin, int64_t end) {
  Range range(job);
  for (int64_t i = begin; i < end; ++i) {
    with_kind(job.spec, true, [&]<int kKind, class Divergence>() {
      if constexpr (!std::is_void_v<Divergence>) {
        auto row = range.template row<kKind>(i);
        RowState chunk = empty_state();
        row.template fold<true>(chunk);
        row.template value<Divergence>(range.state(i));
      }
    });
  }
}

inline void gradient(const Job& job, int64_t begin, int64_t end) {
  Range range(job);
  const Spec own = Range::teacher_spec(job.spec);
  for (int64_t i = begin; i < end; ++i) {
    const double weight = range.masked(i) ? 0 : job.weights[i];
    const RowState& r = range.state(i);
    with_kind(job.spec, job.teacher.data != nullptr, [&]<int kKind, class Divergence>() {
      if (!job.grad.data) return;
      auto row = range.template row<kKind>(i);
      if (weight == 0) return row.zero(job.grad, i);
      const Kept kept = range.kept(i);
      if (kept.ids) row.skip(kept);
      RowState chunk = empty_state();
      row.template fold<true>(chunk);
      if constexpr (!std::is_void_v<Divergence>) {
        RowState again = r;
        row.template value<Divergence>(again);
      }
      row.emit(r, weight, job.grad, i);
    });
    if (!job.teacher_grad.data) continue;
    auto teacher = range.teacher_row(i, own);
    RowState chunk = empty_state(), t = empty_state();
    teacher.template fold<true>(chunk);
    t.m_s = r.m_t;
    t.z_s = t.z1_s = r.z1_t;
    teacher.emit(t, weight, job.teacher_grad, i);
  }
}

}  // namespace KD_ISA
}  // namespace kd
