// First pass over a row: fold its logits into the state, and fill the scratch for the passes that follow.
//
// The reference is the largest logit so far, but nobody looks for it in a pass of its own. A block is folded
// relative to the reference that it finds, and its largest logit noted on the way. If that is higher, what
// was summed counts for nothing, overflow and all: the reference is raised to it and the block folded again.
// Then no exponent is above 0, so a block is folded at most twice. The comparison is one of logits: no
// overflow can hide from it, and a NaN, which it passes over, is in the sums. A row of random logits rises
// ln(blocks) times, so it costs a few per cent; one that rises in every block is folded twice, which is the
// worst. A reference that may be left behind by 10 before it is raised would cost nothing, but digits: exp of
// the most likely token's distance is then no longer exactly 1.
#pragma once

#include "row.h"

namespace kd {
namespace KD_ISA {

template <DType kDType>
double highest(const char* z, int end) {
  constexpr int kStep = kLanes * bytes_of(kDType);
  Vec m0 = splat(-kInf), m1 = m0;
  const int vectors = end / kLanes;
  int i = 0;
  for (; i + 2 <= vectors; i += 2) {
    m0 = vmax(m0, read<kDType>(z + i * kStep));
    m1 = vmax(m1, read<kDType>(z + (i + 1) * kStep));
  }
  if (i < vectors) m0 = vmax(m0, read<kDType>(z + i * kStep));
  return max_lane(vmax(m0, m1));
}

inline double highest(Block z, int end) {
  double most = 0;
  with_dtype(z.dtype, [&]<DType kDType>() { most = highest<kDType>(z.at, end); });
  return most;
}

// `best`: the maximum of the n logits from column `begin` of the vocabulary on.
inline void note_top(SideState& side, Block block, int n, double best, int64_t begin) {
  if (!(best > side.top_logit)) return;
  side.top_logit = best;
  with_dtype(block.dtype, [&]<DType kDType>() {
    float z[kLanes];
    int i = 0, lane = kLanes;
    for (; i < n; i += kLanes) {
      store(z, read<kDType>(block.at + i * bytes_of(kDType)));
      lane = (int)(std::find(z, z + kLanes, (float)best) - z);
      if (lane < kLanes) break;
    }
    side.top_index = (double)(begin + i + lane);
  });
}

// The sum of a block's exponentials, of which the label's is added in fp64. Beside a label that has nearly
// all the mass the others are all that its loss is made of, and in a lane with its 1 they would lose their
// digits.
template <DType kDType>
double sum_apart(const char* z, int end, int label, float reference, const Scale& scale) {
  constexpr int kStep = kLanes * bytes_of(kDType);
  const Vec low = splat(scale.low);
  double total = 0;
  for (int first = 0; first < end; first += kGroup) {
    Vec group{};
    for (int i = first; i < std::min(first + kGroup, end); i += kLanes) {
      Vec e = exp_scaled(vmax(read<kDType>(z + i / kLanes * kStep) - reference, low), scale);
      if (label >= i && label < i + kLanes) {
        float lanes[kLanes];
        store(lanes, e);
        total += lanes[label - i];
        lanes[label - i] = 0;
        e = load(lanes);
      }
      group += e;
    }
    total += sum(group);
  }
  return total;
}

inline double sum_apart(Block block, int end, int label, float reference, const Scale& scale) {
  double total = 0;
  with_dtype(block.dtype,
             [&]<DType kDType>() { total = sum_apart<kDType>(block.at, end, label, reference, scale); });
  return total;
}

// The normaliser at temperature 1, where the temperature is another. Leaves exp(z - reference) in `exps`.
// `label`: its place in the block, -1 where it is not there.
inline void fold_t1(SideState& side, Block block, int end, int label, float* exps) {
  const Scale one;
  const float reference = (float)side.reference;
  Vec total{};
  with_dtype(block.dtype, [&]<DType kDType>() {
    for (int i = 0; i < end; i += kLanes) {
      const Vec z = read<kDType>(block.at + i * bytes_of(kDType));
      const Vec e = exp_scaled(vmax(z - reference, splat(one.low)), one);
      store(exps + i, e);
      total += e;
    }
  });
  side.sum_exp_t1 += label < 0 ? sum(total) : sum_apart(block, end, label, reference, one);
}

inline void fold_logits(SideState& side, Block block, int n) {
  double total = 0;
  with_dtype(block.dtype, [&]<DType kDType>() {
    float z[kLanes];
    for (int i = 0; i < n; i += kLanes) {
      store(z, read<kDType>(block.at + i * bytes_of(kDType)));
      for (int lane = 0; lane < std::min(kLanes, n - i); ++lane) total += z[lane];
    }
  });
  side.sum_logits += total;
}

// What a side's fold adds up of the pair, with x as in row_state.h: nothing, or its exponentials times x.
enum class Cross { kNone, kStudent, kTeacher };

// What is left in the scratch: nothing, the exponentials, or these and beside them the exponentials times x.
enum class Fill { kNothing, kExp, kExpX };

// One side of a block, and the other where the pair counts.
struct SideBlock {
  const char* logits;
  int end;
  // The next block, fetched while this one is computed: else memory would wait for arithmetic. A prefetch
  // past the end of the matrix is harmless.
  const char* ahead;
  float reference;
  Scale scale;
  float *exp, *exp_x;
  const char* other = nullptr;
  float other_reference = 0;
};

// Shift and cross are of logits, before the temperature divides.
struct SideSums {
  double exp = 0, shift = 0, cross = 0;
  double highest = -kInf;  // logit
};

struct FoldSums {
  Vec exp{}, shift{}, cross{};
};

// Adds up one side's exponentials, and what is weighed by them: two dozen instructions a vector, of which the
// processor has several vectors under way. Both sides in one loop would not find enough registers. Not
// inlined, for the same reason. It counts in 64 bits, as the loops of value.h and gradient.h do: of an int
// every address is widened first, a sixth of what AVX2 executes here.
template <Fill kFill, bool kStats, Cross kCross, DType kDType>
__attribute__((noinline)) SideSums fold_side(const SideBlock& block) {
  constexpr int kBytes = bytes_of(kDType);
  const SideBlock c = block;
  const Vec low = splat(c.scale.low);  // e is 0 here, and 0 * low is 0 where 0 * -inf is not
  Vec highest = splat(-kInf);
  FoldSums total;
  const auto fold_vector = [&](int64_t i, FoldSums& sums) {
    const Vec logits = read<kDType>(c.logits + i * kBytes), z = logits - c.reference;
    highest = vmax(highest, logits);
    const Vec above = vmax(z, low), e = exp_scaled(above, c.scale);
    sums.exp += e;
    if constexpr (kStats) sums.shift += e * above;
    if constexpr (kFill != Fill::kNothing) store(c.exp + i, e);
    if constexpr (kCross == Cross::kNone) return;
    const Vec other = read<kDType>(c.other + i * kBytes) - c.other_reference;
    const Vec x = select(e > 0.0f, kCross == Cross::kTeacher ? z - other : other - z, Vec{});
    sums.cross += e * x;
    if constexpr (kFill == Fill::kExpX) store(c.exp_x + i, e * x);
  };
  for (int64_t first = 0; first < c.end; first += kGroup) {
    FoldSums group;
    const int64_t end = std::min<int64_t>(first + kGroup, c.end);
    int64_t i = first;
    for (; i + 2 * kLanes <= end; i += 2 * kLanes) {  // at least a cache line, of one prefetch
      __builtin_prefetch(c.ahead + i * kBytes);
      fold_vector(i, group);
      fold_vector(i + kLanes, group);
    }
    if (i < end) fold_vector(i, group);
    total.exp += group.exp;
    total.shift += group.shift;
    total.cross += group.cross;
  }
  SideSums out{.exp = sum(total.exp), .highest = max_lane(highest)};
  if constexpr (kStats) out.shift = sum(total.shift);
  if constexpr (kCross != Cross::kNone) out.cross = sum(total.cross);
  return out;
}

// The block with -inf for the stored ids: a copy, since it may be the caller's own memory.
template <Kind kKind>
Block without_stored(Row<kKind>& row, Block s, int64_t start, int n, int64_t& next) {
  float* copy = nullptr;
  const int64_t begin = row.job.offset + start;
  row.stored->each(begin, begin + n, next, [&](int64_t, int64_t at) {
    if (copy == nullptr) copy = row.student.floats(start, n, row.scratch.student_block());
    copy[at] = -kInf;
  });
  return copy == nullptr ? s : Block{(const char*)copy, kFloat};
}

// The first pass over a row, a block at a time.
template <bool kFill, bool kStats, Kind kKind>
class FoldPass {
  static constexpr bool kTeacher = kKind != kNone;
  static constexpr Fill kExp = kFill ? Fill::kExp : Fill::kNothing;

 public:
  FoldPass(Row<kKind>& row, RowState& state)
      : row_(row),
        r_(state),
        label_apart_(!row.spec.tempered && (row.spec.asks(kLabel) || row.spec.asks(kTeacherLabel))) {}

  void run() {
    row_.each_block([&](int64_t start, int n, int64_t b) {
      load(start, n);
      if (r_.student.reference == kNoReference || (kTeacher && r_.teacher.reference == kNoReference))
        raise_to(highest(s_, padded(n)), kTeacher ? highest(t_, padded(n)) : kNoReference);
      fold_block(start, padded(n));
      if (student_.highest > r_.student.reference || teacher_.highest > r_.teacher.reference) {
        raise_to(student_.highest, teacher_.highest);
        fold_block(start, padded(n));
      }
      if (label_ >= 0 && label_apart_) set_label_apart(padded(n));
      add();
      row_.scratch.references(b) = {r_.student.reference, r_.teacher.reference};
      if constexpr (kStats) {
        note_top(r_.student, s_, n, student_.highest, row_.job.offset + start);
        if (kTeacher) note_top(r_.teacher, t_, n, teacher_.highest, row_.job.offset + start);
      }
      if (row_.tempered_hard)
        fold_t1(r_.student, s_, padded(n), row_.spec.asks(kLabel) ? label_ : -1,
                row_.scratch.student_exp_t1() + start);
    });
    if (row_.spec.tempered) return;
    r_.student.sum_exp_t1 = r_.student.sum_exp;
    r_.teacher.sum_exp_t1 = r_.teacher.sum_exp;
  }

 private:
  // Both sides of a block, and what is made of single logits.
  void load(int64_t start, int n) {
    Scratch& scratch = row_.scratch;
    s_ = row_.student.block(start, n, scratch.student_block());
    label_ = row_.label_in(start, n);
    if (label_ >= 0) {
      const int64_t label = row_.label - row_.job.offset;
      r_.student.label_logit = row_.student.logit(label);
      if (kTeacher) r_.teacher.label_logit = row_.teacher.logit(label);
    }
    if (row_.spec.asks(kSmooth)) fold_logits(r_.student, s_, n);
    if (row_.stored != nullptr) s_ = without_stored(row_, s_, start, n, next_stored_);
    if constexpr (kTeacher) t_ = row_.teacher.block(start, n, scratch.teacher_block());
    if (!kTeacher || s_.dtype == t_.dtype) return;
    // The loops read one type.
    if (s_.dtype != kFloat) s_ = {(const char*)row_.student.floats(start, n, scratch.student_block())};
    if (t_.dtype != kFloat) t_ = {(const char*)row_.teacher.floats(start, n, scratch.teacher_block())};
  }

  void raise_to(double student, double teacher) {
    raise(r_, std::max(r_.student.reference, student), std::max(r_.teacher.reference, teacher),
          row_.temperature);
  }

  void fold_block(int64_t start, int end) {
    Scratch& scratch = row_.scratch;
    SideBlock s{s_.at,
                end,
                row_.student.at(start + kBlock),
                (float)r_.student.reference,
                row_.per_temperature,
                scratch.student_exp() + start,
                scratch.second() + start};
    if constexpr (!kTeacher) {
      student_ = fold_side<kExp, Cross::kNone>(s);
    } else {
      SideBlock t{t_.at,
                  end,
                  row_.teacher.at(start + kBlock),
                  (float)r_.teacher.reference,
                  row_.per_temperature,
                  scratch.second() + start,
                  nullptr};
      s.other = t.logits, s.other_reference = t.reference;
      t.other = s.logits, t.other_reference = s.reference;
      if constexpr (kKind == kReverseKL) {
        teacher_ = fold_side<Fill::kNothing, Cross::kNone>(t);
        student_ = fold_side<kFill ? Fill::kExpX : Fill::kNothing, Cross::kStudent>(s);
      } else {
        student_ = fold_side<kExp, Cross::kNone>(s);
        teacher_ = fold_side<kExp, needs_cross_t(kKind) ? Cross::kTeacher : Cross::kNone>(t);
      }
    }
  }

  template <Fill kLeft, Cross kCross>
  SideSums fold_side(const SideBlock& block) const {
    SideSums sums;
    with_dtype(s_.dtype,
               [&]<DType kDType>() { sums = KD_ISA::fold_side<kLeft, kStats, kCross, kDType>(block); });
    return sums;
  }

  // On both sides, so that models that agree have the same sums.
  void set_label_apart(int end) {
    const Scale& scale = row_.per_temperature;
    student_.exp = sum_apart(s_, end, label_, (float)r_.student.reference, scale);
    if (kTeacher) teacher_.exp = sum_apart(t_, end, label_, (float)r_.teacher.reference, scale);
  }

  void add() {
    r_.student.sum_exp += student_.exp;
    r_.teacher.sum_exp += teacher_.exp;
    r_.student.sum_exp_shift += student_.shift / row_.temperature;
    r_.teacher.sum_exp_shift += teacher_.shift / row_.temperature;
    r_.pair.cross_s += student_.cross / row_.temperature;
    r_.pair.cross_t += teacher_.cross / row_.temperature;
  }

  Row<kKind>& row_;
  RowState& r_;
  bool label_apart_;  // in the sums at T, which are those at temperature 1
  int64_t next_stored_ = 0;
  // Of the block at hand.
  int label_ = -1;
  Block s_, t_;
  SideSums student_, teacher_;
};

template <bool kFill, bool kStats, Kind kKind>
void fold(Row<kKind>& row, RowState& r) {
  FoldPass<kFill, kStats, kKind>(row, r).run();
}

// The same, with statistics only where they are asked for.
template <bool kFill, Kind kKind>
void fold(Row<kKind>& row, RowState& r) {
  if (row.spec.sums_shifts())
    fold<kFill, true>(row, r);
  else
    fold<kFill, false>(row, r);
}

}  // namespace KD_ISA
}  // namespace kd
