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
  bool stats = false;
};

// The same for all rows.
struct Plan {
  Entry entry = Entry::kFused;
  Geometry geometry;
  PassFlags flags;
  int rows = 0;

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
    if (kTeacher || sparse.ids == nullptr) return {};
    return {sparse.ids + row * sparse.slots, sparse.slots, offset(), first(), end()};
  }
  KD_DEVICE double temperature() const { return job.temperature_of(row, job.spec); }
  KD_DEVICE RowWeights weights() const { return job.weights == nullptr ? RowWeights{} : job.weights_of(row); }
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

  // Calls f(a step's first column, the columns' end) for all steps of the slice. The first pass over a
  // resident slice waits for its chunks, the last one fetches the next row's.
  template <class F>
  KD_DEVICE void each_step(bool first, bool last, int step, F&& f) {
    if (!slice.resident()) {
      const int steps = (end() - slice.begin() + step - 1) / step;
      for (int i = 0; i < steps; ++i) f(slice.begin() + (reversed ? steps - 1 - i : i) * step, end());
      reversed = !reversed;
      return;
    }
    for (int i = 0; i < slice.chunks(); ++i) {
      if (first) slice.await(i, turn);
      const int begin = slice.begin() + i * slice.chunk_columns();
      const int limit = begin + slice.chunk_columns(), end = limit < this->end() ? limit : this->end();
      for (int start = begin; start < end; start += step) f(start, end);
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
  int parity = 0;         // of the exchanges' two buffers
  bool reversed = false;  // the next pass over what is not resident goes backwards
};

// Both sides' logits of kTile vectors of a step, a vector at each of `columns`; the row ends at `end`.
template <class Row, int kTile>
KD_DEVICE void load_step(const Side& student, const Side& teacher, int start, int end,
                         const int (&columns)[kTile], float (&s)[kTile][kVector],
                         float (&t)[kTile][kVector]) {
  using Types = typename Row::Types;
  // A step that is all the row's and lies in shared memory as it is: what the hot loops ask.
  const bool resident = start >= student.lead && start + kTile * kStep <= end && student.resident >= 0 &&
                        (!Row::kTeacher || teacher.resident >= 0) && !Types::kMapped;
  if (resident) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      load_resident<Types>(student, columns[i], s[i]);
      if (Row::kTeacher) load_resident<Types>(teacher, columns[i], t[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      load<Types>(student, columns[i], end - columns[i], s[i]);
      if (Row::kTeacher) load<Types>(teacher, columns[i], end - columns[i], t[i]);
    }
  }
}

}  // namespace kd
