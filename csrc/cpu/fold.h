// First pass over a row: fold its logits into the state, and fill the scratch for the passes that follow.
#pragma once

#include "row.h"

namespace kd {
namespace KD_ISA {

inline double block_max(const float* x, int end) {
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

// `best`: the maximum of the n logits from column `begin` of the vocabulary on.
inline void note_top(SideState& side, const float* z, int n, double best, int64_t begin) {
  if (!(best > side.top_logit)) return;
  side.top_logit = best;
  side.top_index = (double)(begin + (std::find(z, z + n, (float)best) - z));
}

// The normaliser at temperature 1, where the temperature is another. Leaves exp(z - reference) in `exps`.
inline void fold_t1(SideState& side, const float* z, int end, float* exps) {
  const float reference = (float)side.reference;
  Vec total{};
  for (int i = 0; i < end; i += kLanes) {
    const Vec e = vexp(load(z + i) - reference);
    store(exps + i, e);
    total += e;
  }
  side.sum_exp_t1 += sum(total);
}

inline void fold_logits(SideState& side, const float* z, int n) {
  double total = 0;
  for (int i = 0; i < n; ++i) total += z[i];
  side.sum_logits += total;
}

// The next block, fetched while this one is computed: else memory would wait for arithmetic. A prefetch past
// the end of the matrix is harmless.
struct Ahead {
  const char *student, *teacher;
};

// Adds a block's exponentials, and what is weighed by them, to the state. kFill: leaves exp_s in the scratch,
// and beside it exp_s x for ReverseKL, exp_t for the others.
template <bool kFill, bool kStats, Kind kKind>
void fold_exps(Row<kKind>& row, RowState& r, const float* s, const float* t, int64_t start, int end,
               Ahead ahead) {
  constexpr bool kTeacher = kKind != kNone;
  const int step_s = kLanes * row.student.bytes(), step_t = kLanes * row.teacher.bytes();
  const float reference_s = (float)r.student.reference, reference_t = (float)r.teacher.reference;
  float *fill = row.scratch.student_exp() + start, *fill_second = row.scratch.second() + start;
  const Scale scale = row.per_temperature;
  const Vec least = splat(scale.least);  // there e is 0, and 0 * least is 0 where 0 * -inf is not
  Vec sum_s{}, sum_t{}, shift_s{}, shift_t{}, cross_s{}, cross_t{};
  for (int first = 0; first < end; first += kGroup) {
    Vec group_s{}, group_t{};
    for (int i = first; i < std::min(first + kGroup, end); i += kLanes) {
      __builtin_prefetch(ahead.student);
      ahead.student += step_s;
      if constexpr (kTeacher) {
        __builtin_prefetch(ahead.teacher);
        ahead.teacher += step_t;
      }
      const Vec z_s = load(s + i) - reference_s;
      const Vec exp_s = exp_scaled(z_s, scale);
      group_s += exp_s;
      if constexpr (kStats) shift_s += exp_s * vmax(z_s, least);
      if constexpr (kFill) store(fill + i, exp_s);
      if constexpr (kTeacher) {
        const Vec z_t = load(t + i) - reference_t;
        const Vec exp_t = exp_scaled(z_t, scale);
        const Vec x = z_t - z_s;
        group_t += exp_t;
        if constexpr (kStats) shift_t += exp_t * vmax(z_t, least);
        if constexpr (needs_cross_t(kKind)) cross_t = select(exp_t > 0.0f, cross_t + exp_t * x, cross_t);
        if constexpr (kKind == kReverseKL) {
          const Vec exp_x = select(exp_s > 0.0f, exp_s * x, Vec{});
          cross_s += exp_x;
          if constexpr (kFill) store(fill_second + i, exp_x);
        } else {
          if constexpr (kFill) store(fill_second + i, exp_t);
        }
      }
    }
    sum_s += group_s;
    sum_t += group_t;
  }
  r.student.sum_exp += sum(sum_s);
  r.teacher.sum_exp += sum(sum_t);
  if constexpr (kStats) {
    r.student.sum_exp_shift += sum(shift_s) / row.temperature;
    r.teacher.sum_exp_shift += sum(shift_t) / row.temperature;
  }
  if constexpr (kKind == kReverseKL) r.pair.cross_s += sum(cross_s) / row.temperature;
  if constexpr (needs_cross_t(kKind)) r.pair.cross_t += sum(cross_t) / row.temperature;
}

// The block with -inf for the stored ids: a copy, since it may be the caller's own memory.
template <Kind kKind>
const float* without_stored(Row<kKind>& row, const float* s, int64_t start, int n, int64_t& next) {
  float* copy = nullptr;
  const int64_t begin = row.job.offset + start;
  row.stored->each(begin, begin + n, next, [&](int64_t, int64_t at) {
    if (copy == nullptr) {
      copy = row.scratch.student_block();
      if (s != copy) std::memcpy(copy, s, padded(n) * sizeof(float));
    }
    copy[at] = -kInf;
  });
  return copy == nullptr ? s : copy;
}

template <bool kFill, bool kStats, Kind kKind>
void fold(Row<kKind>& row, RowState& r) {
  constexpr bool kTeacher = kKind != kNone;
  const Spec& spec = row.spec;
  int64_t next = 0;
  row.each_block([&](int64_t start, int n, int64_t b) {
    const float* s = row.student.block(start, n, row.scratch.student_block());
    const float* t = kTeacher ? row.teacher.block(start, n, row.scratch.teacher_block()) : nullptr;
    const int label = row.label_in(start, n), end = padded(n);
    if (label >= 0) {
      r.student.label_logit = s[label];
      if (kTeacher) r.teacher.label_logit = t[label];
    }
    if (spec.asks(kSmooth)) fold_logits(r.student, s, n);
    if (row.stored != nullptr) s = without_stored(row, s, start, n, next);

    const double best_s = block_max(s, end), best_t = kTeacher ? block_max(t, end) : kNoReference;
    raise(r, std::max(r.student.reference, best_s), std::max(r.teacher.reference, best_t), row.temperature);
    if constexpr (kStats) {
      note_top(r.student, s, n, best_s, row.job.offset + start);
      if (kTeacher) note_top(r.teacher, t, n, best_t, row.job.offset + start);
    }
    row.scratch.student_reference(b) = r.student.reference;
    row.scratch.teacher_reference(b) = r.teacher.reference;
    const Ahead ahead{row.student.ahead(start + kBlock),
                      kTeacher ? row.teacher.ahead(start + kBlock) : nullptr};
    fold_exps<kFill, kStats>(row, r, s, t, start, end, ahead);
    if (row.tempered_hard) fold_t1(r.student, s, end, row.scratch.student_exp_t1() + start);
  });
  if (spec.tempered) return;
  r.student.sum_exp_t1 = r.student.sum_exp;
  r.teacher.sum_exp_t1 = r.teacher.sum_exp;
}

// The same, with statistics only where they are asked for.
template <bool kFill, Kind kKind>
void fold(Row<kKind>& row, RowState& r) {
  if (row.spec.stats)
    fold<kFill, true>(row, r);
  else
    fold<kFill, false>(row, r);
}

}  // namespace KD_ISA
}  // namespace kd
