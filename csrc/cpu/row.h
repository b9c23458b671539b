// One row of both sides on the CPU: what the passes over it share.
//
// Reading order: row.h, fold.h (first pass), value.h (second, for some divergences), gradient.h (last),
// entry_points.h (which passes an entry point makes), sparse.h. Compiled once per instruction set
// (rows_*.cpp).
//
// Contract: a row is worked on by one thread, block by block (kBlock entries, in L1), so results do not
// depend on the number of threads. A gradient may alias the logits that it belongs to: a block is written
// only after the last read of it.
//
// Traffic: each logit comes from memory once. The fold leaves exp(s - m) and exp(t - m) in scratch (two rows
// of fp32, which stay in L2), and the gradient is made of them without another exponential. A second pass
// goes over the scratch while it is still in cache. Where the row's state is known already, all passes are
// made over a block before the next, and the scratch is a block's, in L1.
//
// Numerics: the maximum is subtracted before anything is divided by the temperature, which costs nothing
// (exp_scaled, vec_host.h). A block's exponentials are relative to the running maximum at that block; what
// they are multiplied by, exp(m_block - lse), is computed in fp64, once per block.
#pragma once

#include <algorithm>
#include <cmath>

#include "../divergence.h"
#include "../row_state.h"
#include "row_loops.h"
#include "source.h"

namespace kd {
namespace KD_ISA {

// A group is summed by itself before it is added: few small terms are then added to a lane that holds the
// row's largest, and what is left of 1 beside a token with p = 0.999 keeps its digits.
constexpr int kGroup = 16 * kLanes;

constexpr int kAhead = 512;  // entries that passes over the scratch fetch ahead: its rows fill L2

// A sparse target's ids in one row. The fold leaves them out. The soft gradient at them comes from the K +
// 1 outcomes (docs/design.md, "Sparse targets"; sparse.h). At every other id it is `rest` times the id's
// softmax among those others.
struct StoredIds {
  const int64_t* ids = nullptr;  // ascending, -1 anywhere in between: none
  int64_t count = 0;
  double* logits = nullptr;     // of the ids in this chunk, mapped; see leave_out()
  const float* grad = nullptr;  // of the soft output
  double rest = 0;              // the same for the rest as a whole
  Normaliser at_1;              // the row's at temperature 1, stored ids included
  Softmax softmax;              // the same at T; where an entropy is asked for

  // Calls f(k, column) for each id in columns [begin, end) of the vocabulary; `next` walks along the row.
  template <class F>
  void each(int64_t begin, int64_t end, int64_t& next, F&& f) const {
    for (; next < count && ids[next] < end; ++next)
      if (ids[next] >= begin) f(next, ids[next] - begin);
  }
};

template <Kind kKind>
struct Row {
  static constexpr bool kTeacher = kKind != kNone;

  Row(const Job& job, const Spec& spec, double temperature, Source student, Source teacher, Scratch& scratch,
      int64_t label)
      : job(job),
        spec(spec),
        student(student),
        teacher(teacher),
        scratch(scratch),
        label(label),
        temperature(temperature),
        per_temperature(1 / temperature),
        tempered_hard(spec.tempered && spec.asks_hard()) {}

  // Takes `ids` out of the row. Their logits are read now, before a gradient can overwrite them.
  void leave_out(const StoredIds& ids) {
    stored = &ids;
    for (int64_t k = 0; k < ids.count; ++k) {
      const int64_t at = ids.ids[k] - job.offset;
      ids.logits[k] = ids.ids[k] >= 0 && at >= 0 && at < job.width ? student.logit(at) : -kInf;
    }
  }

  // Makes the passes over one block of the chunk after the other: block(first column, columns, number of the
  // block).
  template <class... Passes>
  void walk(Passes&... passes) const {
    for (int64_t start = 0, b = 0; start < job.width; start += kBlock, ++b)
      (passes.block(start, (int)std::min<int64_t>(kBlock, job.width - start), b), ...);
  }

  // The label's place in the n columns from `start`, -1 where it is not there.
  int label_in(int64_t start, int n) const {
    const int64_t at = label - job.offset - start;
    return at >= 0 && at < n ? (int)at : -1;
  }

  // log(exp((block - reference) / T) / sum_exp): exp of it turns a block's exponentials, relative to `block`,
  // into probabilities.
  double log_share(double block, const SideState& side) const {
    return (block - side.reference) / temperature - std::log(side.sum_exp);
  }

  const Job& job;
  const Spec& spec;
  Source student, teacher;
  Scratch& scratch;
  int64_t label;  // in the vocabulary, -1: none
  double temperature;
  Scale per_temperature;
  bool tempered_hard;  // the student's outputs at temperature 1 have sums of their own
  const StoredIds* stored = nullptr;
  // Whether its state is known before the first pass: that then leaves no more than the exponentials, and the
  // scratch holds the block at hand instead of the row.
  bool known = false;

  // What the scratch has of the block that begins at column `start`.
  float* student_exp(int64_t start) const { return scratch.student_exp() + (known ? 0 : start); }
  float* second(int64_t start) const { return scratch.second() + (known ? 0 : start); }
  float* student_exp_t1(int64_t start) const { return scratch.student_exp_t1() + (known ? 0 : start); }
};

}  // namespace KD_ISA
}  // namespace kd
