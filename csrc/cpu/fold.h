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

// How the two sides of a block are folded: a student without a teacher, each side by itself, or with the sum
// of one side's exponentials times x, x as in row_state.h.
enum class Pairing { kAlone, kApart, kByStudent, kByTeacher };

constexpr Pairing pairing_of(Kind kind) {
  if (kind == kNone) return Pairing::kAlone;
  if (kind == kReverseKL) return Pairing::kByStudent;
  return needs_cross_t(kind) ? Pairing::kByTeacher : Pairing::kApart;
}

// One side of a block.
struct SideBlock {
  const char* logits = nullptr;
  // The next block, fetched while this one is computed: else memory would wait for arithmetic. A prefetch
  // past the end of the matrix is harmless.
  const char* ahead = nullptr;
  float reference = 0;
  float* left = nullptr;  // where the scratch is filled
};

struct PairBlock {
  SideBlock student, teacher;
  int end;
  Scale scale;
};

// Shift and cross are of logits, before the temperature divides.
struct SideSums {
  double exp = 0, shift = 0;
  double highest = -kInf;  // logit
};

struct BlockSums {
  SideSums student, teacher;
  double cross = 0;

  bool finite() const { return std::isfinite(student.exp + teacher.exp + cross); }
};

// One side in the loop. `kBounded`: see fold_pair.
template <bool kStats, bool kBounded, DType kDType>
class SideLoop {
 public:
  struct Term {
    Vec z, e;
  };

  SideLoop(const SideBlock& block, const Scale& scale)
      : block_(block), scale_(scale), low_(splat(scale.low)), highest_(splat(-kInf)) {}

  Term fold(int64_t i) {
    __builtin_prefetch(block_.ahead + i * kBytes, 0, 2);
    const Vec logits = read<kDType>(block_.logits + i * kBytes), z = logits - block_.reference;
    highest_ = vmax(highest_, logits);
    const Vec above = kBounded ? vmax(z, low_) : z, e = exp_scaled(above, scale_);
    group_exp_ += e;
    if constexpr (kStats) group_shift_ += e * above;
    return {z, e};
  }
  void leave(int64_t i, Vec v) const { store(block_.left + i, v); }
  void end_group() {
    exp_ += group_exp_;
    shift_ += group_shift_;
    group_exp_ = group_shift_ = Vec{};
  }
  SideSums sums() const { return {sum(exp_), kStats ? sum(shift_) : 0, max_lane(highest_)}; }

 private:
  static constexpr int kBytes = bytes_of(kDType);
  const SideBlock block_;
  const Scale scale_;
  const Vec low_;  // e is 0 here, and 0 * low is 0 where 0 * -inf is not
  Vec highest_, exp_{}, shift_{}, group_exp_{}, group_shift_{};
};

// Adds up both sides' exponentials, and what is weighted by them, in one loop: what is read and converted of
// a logit serves both. Not inlined: on its own the loop has enough registers. It counts in 64 bits, as the
// loops of value.h and gradient.h do: of an int every address is widened first, a sixth of what AVX2 executes
// here.
//
// `kBounded` holds for all logits: exponents are kept from falling below scale.low, and x counts for nothing
// where e is 0. Without it a logit of -inf, or far below any that matters, can leave NaN or inf in the sums,
// never a wrong finite number. The caller looks.
template <bool kFill, bool kStats, bool kBounded, Pairing kPairing, DType kDType>
__attribute__((noinline)) BlockSums fold_pair(const PairBlock& block) {
  SideLoop<kStats, kBounded, kDType> student(block.student, block.scale), teacher(block.teacher, block.scale);
  Vec cross{};
  for (int64_t first = 0; first < block.end; first += kGroup) {
    Vec group_cross{};
    const int64_t end = std::min<int64_t>(first + kGroup, block.end);
    for (int64_t i = first; i < end; i += kLanes) {
      const auto s = student.fold(i);
      if constexpr (kFill) student.leave(i, s.e);
      if constexpr (kPairing == Pairing::kAlone) continue;
      const auto t = teacher.fold(i);
      constexpr bool kByStudent = kPairing == Pairing::kByStudent;
      Vec left = t.e;
      if constexpr (kPairing != Pairing::kApart) {
        const Vec e = kByStudent ? s.e : t.e, apart = t.z - s.z;
        const Vec weighted = e * (kBounded ? select(e > 0.0f, apart, Vec{}) : apart);
        group_cross += weighted;
        if constexpr (kByStudent) left = weighted;
      }
      if constexpr (kFill) teacher.leave(i, left);
    }
    student.end_group();
    teacher.end_group();
    cross += group_cross;
  }
  return {student.sums(), teacher.sums(), sum(cross)};
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

 public:
  FoldPass(Row<kKind>& row, RowState& state)
      : row_(row),
        r_(state),
        // Stored ids are -inf; and statistics have one loop, to compile half as many.
        bounded_(kStats || !Scale::kTakesLower || row.stored != nullptr),
        label_apart_(!row.spec.tempered && (row.spec.asks(kLabel) || row.spec.asks(kTeacherLabel))) {}

  void block(int64_t start, int n, int64_t b) {
    load(start, n);
    if (r_.student.reference == kNoReference || (kTeacher && r_.teacher.reference == kNoReference))
      raise_to(highest(s_, padded(n)), kTeacher ? highest(t_, padded(n)) : kNoReference);
    fold_block(start, padded(n));
    if (sums_.student.highest > r_.student.reference || sums_.teacher.highest > r_.teacher.reference) {
      raise_to(sums_.student.highest, sums_.teacher.highest);
      fold_block(start, padded(n));
    }
    if (!bounded_ && !sums_.finite()) {
      bounded_ = true;  // a row that has such logits mostly has more of them
      fold_block(start, padded(n));
    }
    if (label_ >= 0 && label_apart_) set_label_apart(padded(n));
    add();
    row_.scratch.references(b) = {r_.student.reference, r_.teacher.reference};
    if constexpr (kStats) {
      note_top(r_.student, s_, n, sums_.student.highest, row_.job.offset + start);
      if (kTeacher) note_top(r_.teacher, t_, n, sums_.teacher.highest, row_.job.offset + start);
    }
    if (row_.tempered_hard)
      fold_t1(r_.student, s_, padded(n), row_.spec.asks(kLabel) ? label_ : -1, row_.student_exp_t1(start));
  }

  void end() {
    if (row_.spec.tempered) return;
    r_.student.sum_exp_t1 = r_.student.sum_exp;
    r_.teacher.sum_exp_t1 = r_.teacher.sum_exp;
  }

 private:
  // Both sides of a block, and what is made of single logits.
  void load(int64_t start, int n) {
    Scratch& scratch = row_.scratch;
    s_ = row_.student.block(start, n, scratch.student_block());
    label_ = row_.known ? -1 : row_.label_in(start, n);
    if (label_ >= 0) {
      const int64_t label = row_.label - row_.job.offset;
      r_.student.label_logit = row_.student.logit(label);
      if (kTeacher) r_.teacher.label_logit = row_.teacher.logit(label);
    }
    if (row_.spec.asks(kSmooth) && !row_.known) fold_logits(r_.student, s_, n);
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
    PairBlock block{.end = end, .scale = row_.per_temperature};
    block.student = {s_.at, row_.student.at(start + kBlock), (float)r_.student.reference,
                     row_.student_exp(start)};
    if (kTeacher)
      block.teacher = {t_.at, row_.teacher.at(start + kBlock), (float)r_.teacher.reference,
                       row_.second(start)};
    with_dtype(s_.dtype, [&]<DType kDType>() {
      sums_ = bounded_ ? fold_pair<kFill, kStats, true, pairing_of(kKind), kDType>(block)
                       : fold_pair<kFill, false, !Scale::kTakesLower, pairing_of(kKind), kDType>(block);
    });
  }

  // On both sides, so that models that agree have the same sums.
  void set_label_apart(int end) {
    const Scale& scale = row_.per_temperature;
    sums_.student.exp = sum_apart(s_, end, label_, (float)r_.student.reference, scale);
    if (kTeacher) sums_.teacher.exp = sum_apart(t_, end, label_, (float)r_.teacher.reference, scale);
  }

  void add() {
    r_.student.sum_exp += sums_.student.exp;
    r_.teacher.sum_exp += sums_.teacher.exp;
    r_.student.sum_exp_shift += sums_.student.shift / row_.temperature;
    r_.teacher.sum_exp_shift += sums_.teacher.shift / row_.temperature;
    double& cross = kKind == kReverseKL ? r_.pair.cross_s : r_.pair.cross_t;
    cross += sums_.cross / row_.temperature;
  }

  Row<kKind>& row_;
  RowState& r_;
  bool bounded_;
  bool label_apart_;  // in the sums at T, which are those at temperature 1
  int64_t next_stored_ = 0;
  // Of the block at hand.
  int label_ = -1;
  Block s_, t_;
  BlockSums sums_;
};

template <bool kFill, bool kStats, Kind kKind>
void fold(Row<kKind>& row, RowState& r) {
  FoldPass<kFill, kStats, kKind> pass(row, r);
  row.walk(pass);
  pass.end();
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
