// What a warp knows of the row that it works on, and how it goes over its own columns.
#pragma once

#include "launch.h"
#include "staging.cuh"
#include "stored_ids.cuh"

namespace kd {

// What the passes have to compute, read off the spec once a call.
struct PassFlags {
  bool soft = false, label = false, smooth = false, teacher_label = false;
  bool hard = false;        // one of the student's outputs at temperature 1
  bool hard_t1 = false;     // hard, and a temperature differs from 1: sum_exp_t1 is summed too
  bool teacher_t1 = false;  // the same for teacher_label
  bool shifts = false;      // the state has sum_exp_shift, which entropies are made of
  bool stats = false;
};

// The same for all rows.
struct Plan {
  Entry entry = Entry::kFused;
  Geometry geometry;
  PassFlags flags;
  int rows = 0;
  int clusters = 0;  // that share the rows

  KD_HD bool whole_rows() const { return entry == Entry::kFused || entry == Entry::kFusedSparse; }
  KD_HD bool folds() const { return whole_rows() || entry == Entry::kAccumulate; }
  // Whether a divergence without a closed form has its second pass.
  KD_HD bool takes_value() const {
    return entry == Entry::kAccumulateValue || (entry == Entry::kFused && flags.soft);
  }
  KD_HD bool writes_gradient(const Job& job) const {
    const bool wanted = job.grad.data != nullptr || job.teacher_grad.data != nullptr;
    return (whole_rows() || entry == Entry::kGradient) && wanted;
  }
};

// A step that is all the row's and lies in shared memory; any other one.
struct Whole {};
struct Part {};

template <Kind kRowKind, class RowTypes>
struct Row {
  static constexpr Kind kKind = kRowKind;
  static constexpr bool kTeacher = kKind != kNone;
  using Types = RowTypes;

  KD_DEVICE Row(const Job& job, const Plan& plan, Slice& slice)
      : job(job),
        plan(plan),
        slice(slice),
        shared(*(SharedMemory*)shared_memory()),
        lane(thread_index() % kWarp),
        warp(thread_index() / kWarp) {}

  KD_DEVICE void begin(int index) {
    row = index;
    lead = lead_of(job, index);
    reversed = false;
  }
  // `index` (plan.rows: none) is fetched as this row is done with. `count`: how many were computed before.
  KD_DEVICE void set_next(int index, int count) {
    next = index;
    next_lead = index < plan.rows ? lead_of(job, index) : 0;
    turn = count;
  }

  // Each pass makes what follows anew: between passes the registers are for the states.
  KD_DEVICE Side student() const {
    return side(job.student, slice.student(), job.spec.student_scale, job.spec.student_softcap);
  }
  KD_DEVICE Side teacher() const {
    return side(job.teacher, slice.teacher(), job.spec.teacher_scale, job.spec.teacher_softcap);
  }
  KD_DEVICE Side side(const Matrix& m, int resident, double scale, double cap) const {
    if (!kTeacher && &m == &job.teacher) return {};
    const char* at = start_of(m, row, lead);
    return {at, lead, resident, slice.begin(), m.dtype, is_aligned(at), {(float)scale, (float)cap}};
  }
  KD_DEVICE GradRow grad_row(const Matrix& m) const {
    if (m.data == nullptr) return {};
    char* at = start_of(m, row, lead);
    return {at, lead, m.dtype, is_aligned(at)};
  }
  KD_DEVICE StoredIds stored() const {
    const SparseJob& sparse = job.sparse;
    if (kTeacher || Types::kLean || sparse.ids == nullptr) return {};
    return {sparse.ids + row * sparse.slots, sparse.slots, offset(), first(), end()};
  }
  KD_DEVICE double temperature() const { return job.temperature_of(row, job.spec); }
  KD_DEVICE RowWeights weights() const {
    if (job.weights == nullptr) return {};
    if (!Types::kLean) return job.weights_of(row);
    RowWeights found;
    found.soft = job.weight(row, kSoft);
    found.label = job.weight(row, kLabel);
    found.lse_squared = job.weight(row, kLseSquared);
    return found;
  }
  // What a kernel for the common case is not launched for is known to be absent.
  KD_DEVICE PassFlags flags() const {
    PassFlags found = plan.flags;
    if (Types::kLean)
      found.smooth = found.teacher_label = found.hard_t1 = found.teacher_t1 = found.shifts = found.stats =
          false;
    return found;
  }
  KD_DEVICE RowState* memory_state() const { return (RowState*)(job.state + (int64_t)row * kStateColumns); }

  // The warp's places that are the row's, and what place 0 is in the vocabulary.
  KD_DEVICE int first() const { return slice.begin() > lead ? slice.begin() : lead; }
  KD_DEVICE int end() const { return slice.end(lead); }
  KD_DEVICE int64_t offset() const { return job.offset - lead; }
  // The label's place, or one that no warp has.
  KD_DEVICE int label() const {
    const int64_t at = job.labels == nullptr ? -1 : job.labels[row] - job.offset;
    return at >= 0 && at < job.width ? (int)at + lead : -1;
  }

  // Calls f(what is known of a step, its first column, the columns' end) for all steps of the slice. The
  // first pass over a resident slice waits for its chunks, the last one fetches the next row's.
  template <int step, class F>
  KD_DEVICE void each_step(bool first, bool last, F&& f) {
    if (!slice.resident()) {
      const int steps = (end() - slice.begin() + step - 1) / step;
      for (int i = 0; i < steps; ++i) f(Part{}, slice.begin() + (reversed ? steps - 1 - i : i) * step, end());
      reversed = !reversed;
      return;
    }
    const bool whole = Types::kLean && (!kTeacher || slice.teacher() >= 0);
    for (int i = 0; i < slice.chunks(); ++i) {
      if (first) slice.await(i, turn);
      const int begin = slice.begin() + i * slice.chunk_columns();
      const int limit = begin + slice.chunk_columns(), end = limit < this->end() ? limit : this->end();
      for (int start = begin; start < end; start += step) {
        if constexpr (Types::kLean) {  // the hot loop, in which no column is asked for
          if (whole && start >= lead)
            for (; start + step <= end; start += step) f(Whole{}, start, end);
        }
        if (start < end) f(Part{}, start, end);
      }
      if (last && next < plan.rows) slice.fetch(i, next, next_lead);
    }
  }
  KD_DEVICE void fetch_next() {
    for (int i = 0; next < plan.rows && i < slice.chunks(); ++i) slice.fetch(i, next, next_lead);
  }

  const Job& job;
  const Plan& plan;
  Slice& slice;
  SharedMemory& shared;
  int lane, warp;
  int row = 0, lead = 0, next = 0, next_lead = 0, turn = 0;
  int parity = 0;            // of the exchanges' two buffers
  RowWeights early_weights;  // in the common case, what the passes after the exchange need of this row,
  float label_logit = 0;     // read before it: nobody waits for memory there
  bool reversed = false;     // the next pass over what is not resident goes backwards
};

// Whether a row is computed, or only given zeros.
KD_DEVICE bool is_computed(const Job& job, const Plan& plan, int row) {
  if (!job.is_live(row)) return false;
  if (plan.entry != Entry::kGradient) return true;
  const RowWeights weights = job.weights_of(row);
  return weights.any_student() || weights.teacher_label != 0;
}

KD_DEVICE int next_computed(const Job& job, const Plan& plan, int row, int step) {
  while (row < plan.rows && !is_computed(job, plan, row)) row += step;
  return row < plan.rows ? row : plan.rows;
}

// Both sides' logits of kTile vectors of a step, a vector at each of `columns`; the row ends at `end`.
template <class Row, int kTile>
KD_DEVICE void load_step(Whole, const Side& student, const Side& teacher, int, const int (&columns)[kTile],
                         float (&s)[kTile][kVector], float (&t)[kTile][kVector]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    load_resident<typename Row::Types>(student, columns[i], s[i]);
    if (Row::kTeacher) load_resident<typename Row::Types>(teacher, columns[i], t[i]);
  }
}
template <class Row, int kTile>
KD_DEVICE void load_step(Part, const Side& student, const Side& teacher, int end, const int (&columns)[kTile],
                         float (&s)[kTile][kVector], float (&t)[kTile][kVector]) {
#pragma unroll
  for (int i = 0; i < kTile; ++i) {
    load<typename Row::Types>(student, columns[i], end - columns[i], s[i]);
    if (Row::kTeacher) load<typename Row::Types>(teacher, columns[i], end - columns[i], t[i]);
  }
}

}  // namespace kd
