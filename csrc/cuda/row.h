// The passes of a cluster over one row.
//
// A warp goes over its own columns: fold (maxima and sums), for divergences without a closed form value
// (the divergence and the sum of q_psi), emit (the gradient). Between them the warps' states become the
// row's: a block's through its shared memory, the cluster's by writing them into every block.
//
// Traffic: what is resident is read from memory once, and the gradient written once, as torch.add(s, t,
// out=g) does. What is not is read again by each pass, each going against the one before it, so that it
// begins with what L2 still holds.
//
// Aliasing: a gradient may be the logits that it belongs to. A warp alone reads and writes its columns,
// a vector's reads before its write, and no pass after emit reads them again.
//
// Numerics: equal logits give equal p and q, bit for bit, and products that must cancel are rounded one
// by one: their gradient is exactly 0. The same inputs give the same bits: nothing is added atomically.
#pragma once

#include <type_traits>

#include "../divergence.h"
#include "formula.h"
#include "kept.h"
#include "lanes.h"
#include "launch.h"
#include "outcomes.h"
#include "staging.h"

namespace kd {

// The same for all rows.
struct Plan {
  Entry entry = Entry::kFused;
  Geometry geometry;
  Numbers numbers;
  int rows = 0;

  KD_HD bool whole_rows() const { return entry == Entry::kFused || entry == Entry::kFusedSparse; }
  KD_HD bool folds() const { return whole_rows() || entry == Entry::kAccumulate; }
  KD_HD bool emits(const Job& job) const {
    const bool wanted = job.grad.data != nullptr || job.teacher_grad.data != nullptr;
    return (whole_rows() || entry == Entry::kGradient) && wanted;
  }
};

template <int kKind, class Divergence, class Types>
class Row {
  static constexpr bool kTeacher = kKind != kNone;
  static constexpr bool kSecond = !std::is_void_v<Divergence>;
  static constexpr int kTile = Types::kTile;

 public:
  KD_DEVICE Row(const Job& job, const Plan& plan, Slice& slice)
      : job_(job),
        plan_(plan),
        slice_(slice),
        shared_(*(SharedMemory*)shared_memory()),
        lane_(thread_index() % kWarp),
        warp_(thread_index() / kWarp) {}

  // The `turn`-th row that is computed; `next` (plan.rows: none) is fetched as this one is done with.
  KD_DEVICE void compute(int row, int next, int turn) {
    begin(row);
    next_ = next;
    next_lead_ = next < plan_.rows ? lead_of(job_, next) : 0;
    turn_ = turn;
    reversed_ = false;
    if (plan_.folds())
      fold();
    else
      load_state();
    if constexpr (kSecond)
      if (plan_.entry == Entry::kFused || plan_.entry == Entry::kAccumulateValue) value();
    write_results();
    if (plan_.emits(job_)) emit();
  }

  // Zeros for a row that does not count.
  KD_DEVICE void skip(int row) {
    begin(row);
    zero();
  }

 private:
  KD_DEVICE void begin(int row) {
    row_ = row;
    lead_ = lead_of(job_, row);
  }

  // What follows is made anew by each pass: between them registers are for the states.
  KD_DEVICE Side student() const {
    return side(job_.student, slice_.student(), job_.spec.student_scale, job_.spec.student_softcap);
  }
  KD_DEVICE Side teacher() const {
    return side(job_.teacher, slice_.teacher(), job_.spec.teacher_scale, job_.spec.teacher_softcap);
  }
  KD_DEVICE Side side(const Matrix& m, int resident, double scale, double cap) const {
    if (!kTeacher && &m == &job_.teacher) return {};
    const char* at = start_of(m, row_, lead_);
    return {at, lead_, resident, slice_.begin(), m.dtype, is_aligned(at), {(float)scale, (float)cap}};
  }
  KD_DEVICE Target target(const Matrix& m) const {
    if (m.data == nullptr) return {};
    char* at = start_of(m, row_, lead_);
    return {at, lead_, m.dtype, is_aligned(at)};
  }
  KD_DEVICE Kept kept() const {
    const SparseJob& sparse = job_.sparse;
    if (kKind != kNone || sparse.ids == nullptr) return {};
    return {sparse.ids + row_ * sparse.slots, sparse.slots, offset(), first(), end()};
  }
  // The warp's places that are the row's, and what place 0 is in the vocabulary.
  KD_DEVICE int first() const { return slice_.begin() > lead_ ? slice_.begin() : lead_; }
  KD_DEVICE int end() const { return slice_.end(lead_); }
  KD_DEVICE int64_t offset() const { return job_.offset - lead_; }

  // Its place, or one that no warp has.
  KD_DEVICE int label() const {
    const int64_t at = job_.labels == nullptr ? -1 : job_.labels[row_] - job_.offset;
    return at >= 0 && at < job_.width ? (int)at + lead_ : -1;
  }
  KD_DEVICE double weight() const { return job_.weights == nullptr ? 0 : job_.weights[row_]; }

  // Calls f(a step's first column, the columns' end) for all steps of the slice. The first pass over a
  // resident slice waits for its chunks, the last one fetches the next row's.
  template <class F>
  KD_DEVICE void each_step(bool first, bool last, int step, F&& f) {
    if (!slice_.resident()) {
      const int steps = (end() - slice_.begin() + step - 1) / step;
      for (int i = 0; i < steps; ++i) f(slice_.begin() + (reversed_ ? steps - 1 - i : i) * step, end());
      reversed_ = !reversed_;
      return;
    }
    for (int i = 0; i < slice_.chunks(); ++i) {
      if (first) slice_.await(i, turn_);
      const int begin = slice_.begin() + i * slice_.chunk_columns();
      const int limit = begin + slice_.chunk_columns(), end = limit < this->end() ? limit : this->end();
      for (int start = begin; start < end; start += step) f(start, end);
      if (last && next_ < plan_.rows) slice_.fetch(i, next_, next_lead_);
    }
  }

  KD_DEVICE void fetch_next() {
    for (int i = 0; next_ < plan_.rows && i < slice_.chunks(); ++i) slice_.fetch(i, next_, next_lead_);
  }

  // Whether a step is all the row's and is read from shared memory as it is: what the hot loops ask.
  KD_DEVICE static bool is_plain(const Side& s, const Side& t, int start, int step, int end) {
    return start >= s.lead && start + step <= end && s.resident >= 0 && (!kTeacher || t.resident >= 0) &&
           !Types::kMapped;
  }
  template <bool kPlain>
  KD_DEVICE static void load_both(const Side& student, const Side& teacher, int column, int count,
                                  float (&s)[kVector], float (&t)[kVector]) {
    if constexpr (kPlain) {
      load_resident<Types>(student, column, s);
      if (kTeacher) load_resident<Types>(teacher, column, t);
    } else {
      load<Types>(student, column, count, s);
      if (kTeacher) load<Types>(teacher, column, count, t);
    }
  }

  // First pass: the row's state.
  KD_DEVICE void fold() {
    LaneState r;
    const Side student_side = student(), teacher_side = teacher();
    const Kept ids = kept();
    const float base = plan_.numbers.smooth ? sum_base() : 0;
    each_step(true, false, kTile * kStep, [&](int start, int end) {
      float s[kTile][kVector], t[kTile][kVector];
      int columns[kTile];
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        columns[i] = start + i * kStep + lane_ * kVector;
      }
      if (is_plain(student_side, teacher_side, start, kTile * kStep, end)) {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
          load_both<true>(student_side, teacher_side, columns[i], kVector, s[i], t[i]);
      } else {
#pragma unroll
        for (int i = 0; i < kTile; ++i)
          load_both<false>(student_side, teacher_side, columns[i], end - columns[i], s[i], t[i]);
      }
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
        if (plan_.numbers.smooth) add_logits(r, s[i], base, {lead_ - columns[i], end - columns[i]});
        if constexpr (kKind == kNone) drop(ids, start + i * kStep, s[i]);
      }
      fold_tile<kKind, kTile>(r, s, t, columns, plan_.numbers);
    });
    publish(r, ids, base);  // which looks at single logits again, as does what follows
    if (kKind == kNone && plan_.entry == Entry::kFusedSparse) share_kept(ids);
    if (!plan_.emits(job_) && !(kSecond && plan_.entry == Entry::kFused)) fetch_next();
    const bool onto = plan_.entry == Entry::kAccumulate;
    exchange(&shared_.state, onto);
    if (kKind == kNone && plan_.entry == Entry::kFusedSparse && warp_ == 0)
      solve_outcomes(job_, row_, shared_.state, outcomes(), turn_, &shared_.added, &shared_.solved);
    if (onto && warp_ == 0 && cluster_rank() == 0) copy_state(memory_state(), &shared_.state);
    share_coefficients();
  }

  KD_DEVICE static void drop(const Kept& ids, int start, float (&s)[kVector]) {
    if (!ids.any()) return;
    ids.each(start, [&](int64_t, int place, bool mine) {
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (mine && k == place) s[k] = -kInf;
    });
  }

  // What label smoothing's sum of the logits is relative to, so that it keeps its digits where all of them
  // are far from 0: the label's logit, to which the loss compares them, or one of this chunk.
  KD_DEVICE float sum_base() const {
    const int64_t at = job_.labels[row_] - job_.offset;
    const int64_t inside = at < 0 ? 0 : at < job_.width ? at : job_.width - 1;
    Side memory = student();
    memory.resident = -1;
    const float found = logit<Types>(memory, (int)inside + lead_);
    return found - found == 0 ? found : 0;
  }

  // The lanes' sums as this warp's state.
  KD_DEVICE void publish(const LaneState& lane, const Kept& ids, float base) {
    RowState r = across_lanes<kKind>(lane, plan_.numbers, job_.spec.temperature);
    const int columns = end() - first();
    if (lane_ == 0 && columns > 0) r.sum_s += (double)base * columns;
    const float m_s = highest_of_warp(lane.m_s), m_t = kTeacher ? highest_of_warp(lane.m_t) : (float)kNothing;
    r.arg_s = top_column(student(), ids, lane.m_s, lane.at_s, m_s);
    if (kTeacher) r.arg_t = top_column(teacher(), ids, lane.m_t, lane.at_t, m_t);
    const int at = label();
    if (at >= first() && at < end()) {
      if (plan_.numbers.hard) r.label_s = logit<Types>(student(), at);
      if (kTeacher && plan_.numbers.teacher_hard) r.label_t = logit<Types>(teacher(), at);
    }
    write_fold<kKind>(&shared_.warps[warp_], r);
  }

  KD_DEVICE OutcomeMemory outcomes() const {
    return {job_.sparse.slots, (float*)(shared_memory() + plan_.geometry.outcomes_at)};
  }

  // The kept logits of this warp's columns into every block; no logit for the slots without an id.
  KD_DEVICE void share_kept(const Kept& ids) const {
    float* const logits = outcomes().logits(turn_);
    const Side from = student();
    ids.each_of_slice([&](int64_t slot, int column) {
      const float value = logit<Types>(from, column);
      for (int to = 0; to < plan_.geometry.cluster; ++to) in_block(logits, to)[slot] = value;
    });
    const int64_t* all = job_.sparse.ids + row_ * job_.sparse.slots;
    for (int64_t slot = thread_index(); slot < job_.sparse.slots; slot += block_threads())
      if (all[slot] < 0) logits[slot] = -kInf;
  }

  // The first column, counted from the vocabulary's, that holds the warp's maximum `top`.
  KD_DEVICE double top_column(const Side& side, const Kept& ids, float mine, int at, float top) const {
    const int vector = lowest_of_warp(mine == top ? at : INT32_MAX), column = vector + lane_;
    const bool is_top = lane_ < kVector && column >= first() && column < end() &&
                        logit<Types>(side, column) == top && !(kKind == kNone && ids.contains(column));
    const unsigned found = lanes_where(is_top);
    return (double)(found ? offset() + vector + lowest_bit(found) : job_.offset);
  }

  // All warps' states into one, in every block; `onto`: and the one in memory.
  KD_DEVICE void exchange(RowState* out, bool onto) {
    RowState* const parts = shared_.parts[parity_];
    const int blocks = plan_.geometry.cluster, rank = cluster_rank();
    const double temperature = job_.spec.temperature;
    sync_block();
    if (warp_ == 0) {
      combine(shared_.warps, plan_.geometry.warps, temperature, &parts[rank]);
      for (int to = 0; to < blocks; ++to)
        if (to != rank) copy_state(in_block(&parts[rank], to), &parts[rank]);
      if (onto) copy_state(&parts[blocks], memory_state());
      sync_warp();
    }
    if (blocks > 1)
      sync_cluster(warp_ == 0 || plan_.entry == Entry::kFusedSparse);  // share_kept is by all warps
    if (warp_ == 0) combine(parts, blocks + onto, temperature, out);
    // Nobody writes here again before all have passed the next exchange's barrier.
    parity_ ^= 1;
  }

  KD_DEVICE void copy_state(RowState* to, const RowState* from) const {
    if (lane_ < kStateColumns) ((double*)to)[lane_] = ((const double*)from)[lane_];
  }
  KD_DEVICE RowState* memory_state() const { return (RowState*)(job_.state + (int64_t)row_ * kStateColumns); }

  KD_DEVICE void load_state() {
    sync_block();  // the last row's is done with
    if (warp_ == 0) {
      copy_state(&shared_.state, memory_state());
      sync_warp();
    }
    share_coefficients();
  }

  KD_DEVICE void share_coefficients() {
    if (warp_ == 0) {
      sync_warp();
      const RowState& r = shared_.state;
      const Logs logs = logs_of(r);
      const SparseJob& sparse = job_.sparse;
      const bool solved = plan_.entry == Entry::kFusedSparse;
      const double lse1 = solved                   ? shared_.solved.lse1
                          : sparse.lse1 != nullptr ? sparse.lse1[row_]
                                                   : r.m_s + logs.z1_s;
      const double rest = solved ? shared_.solved.rest : sparse.rest != nullptr ? sparse.rest[row_] : 0;
      const Coefficients c =
          coefficients(r, logs, job_.spec, kKind, weight(), job_.labels != nullptr, lse1, rest, job_.vocab);
      if (lane_ == 0) shared_.coefficients = c;
    }
    sync_block();
  }

  KD_DEVICE void write_results() {
    // The warp that is last in the row has the fewest columns of it, if any.
    const bool last = cluster_rank() == plan_.geometry.cluster - 1 && thread_index() == block_threads() - 1;
    if (!plan_.whole_rows() || !last) return;
    double* results = job_.results + (int64_t)row_ * 6;
    if (plan_.entry == Entry::kFused)
      kd::finish(shared_.state, job_.spec, kTeacher, job_.labels != nullptr, job_.vocab, results);
    else
      for (int i = 0; i < 6; ++i) results[i] = shared_.solved.results[i];
  }

  // Second pass, for divergences without a closed form: value and slope.
  KD_DEVICE void value() {
    if constexpr (kSecond) {
      const Normal n = shared_.coefficients.normal;
      const Side student_side = student(), teacher_side = teacher();
      const Formula<kKind, Divergence> formula(job_.spec, n, plan_.numbers.factor);
      float phi = 0, slope = 0;
      each_step(plan_.entry == Entry::kAccumulateValue, !plan_.emits(job_), kStep, [&](int start, int end) {
        const int column = start + lane_ * kVector;
        float s[kVector], t[kVector];
        if (is_plain(student_side, teacher_side, start, kStep, end))
          load_both<true>(student_side, teacher_side, column, kVector, s, t);
        else
          load_both<false>(student_side, teacher_side, column, end - column, s, t);
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const Terms terms = formula.terms(n, s[k], t[k]);
          phi += terms.phi;
          slope += terms.q_psi;
        }
      });
      RowState r = empty_state();
      r.value = phi;
      r.slope = slope;
      write_state(&shared_.warps[warp_], r);
      exchange(&shared_.added, false);
      if (thread_index() == 0) add_value(shared_.state, shared_.added);
      share_coefficients();
    }
  }

  KD_DEVICE void add_value(RowState& r, const RowState& added) {
    r.value +=
        added.value + 0 * (r.z_s + r.z_t);  // NaN logits stay visible whatever the formula does with them
    r.slope += added.slope;
    if (r.value != r.value) r.slope = r.value;
    if (plan_.entry != Entry::kAccumulateValue || cluster_rank() != 0) return;
    memory_state()->value = r.value;
    memory_state()->slope = r.slope;
  }

  // Last pass: weight * d(loss)/d(raw logits).
  KD_DEVICE void emit() {
    if (weight() == 0) {
      zero();
      fetch_next();
      return;
    }
    const Coefficients& c = shared_.coefficients;
    const Normal n = c.normal;
    const Side student_side = student(), teacher_side = teacher();
    const Target to = target(job_.grad), teacher_to = target(job_.teacher_grad);
    const Formula<kKind, Divergence> formula(job_.spec, n, plan_.numbers.factor);
    const Kept ids = kept();
    const int at = label();
    each_step(plan_.entry == Entry::kGradient, true, kStep, [&](int start, int end) {
      const int column = start + lane_ * kVector, count = end - column;
      float s[kVector], t[kVector];
      if (is_plain(student_side, teacher_side, start, kStep, end))
        load_both<true>(student_side, teacher_side, column, count, s, t);
      else
        load_both<false>(student_side, teacher_side, column, count, s, t);
      if (job_.grad.data != nullptr) {
        float g[kVector] = {};
        if constexpr (kTeacher) {
          if (n.soft != 0) {
#pragma unroll
            for (int k = 0; k < kVector; ++k) g[k] = formula.gradient(n, s[k], t[k]);
          }
        } else if (ids.any_in_row()) {
          sparse_gradient(n, c.rest, ids, start, s, g);
        }
        if (plan_.numbers.hard) {
#pragma unroll
          for (int k = 0; k < kVector; ++k) g[k] += c.hard(s[k]) - c.spread;
          subtract_at_label(c.hard.onehot, at - column, g);
        }
        if (Types::kMapped) through_map(student_side.map, s, g);
        store<Types>(to, column, count, g);
      }
      if (kTeacher && job_.teacher_grad.data != nullptr) {
        float h[kVector];
#pragma unroll
        for (int k = 0; k < kVector; ++k) h[k] = c.teacher_hard(t[k]);
        subtract_at_label(c.teacher_hard.onehot, at - column, h);
        if (Types::kMapped) through_map(teacher_side.map, t, h);
        store<Anything>(teacher_to, column, count, h);
      }
    });
  }

  // The rest's softmax, and at the kept ids what was solved for them.
  KD_DEVICE void sparse_gradient(const Normal& n, float rest, const Kept& ids, int start,
                                 const float (&s)[kVector], float (&g)[kVector]) const {
    const float factor = plan_.numbers.factor;
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      g[k] = rest == 0 ? 0.0f : rest * fast_exp2((s[k] - n.m_s) * factor - n.log2_z_s);
    const float* solved = plan_.entry == Entry::kFusedSparse ? outcomes().grad()
                                                             : (const float*)job_.sparse.kept_grad.row(row_);
    ids.each(start, [&](int64_t slot, int place, bool mine) {
      const float value = (float)(weight() * solved[slot]);
#pragma unroll
      for (int k = 0; k < kVector; ++k)
        if (mine && k == place) g[k] = value;
    });
  }

  KD_DEVICE static void subtract_at_label(float onehot, int place, float (&g)[kVector]) {
    if (place < 0 || place >= kVector) return;
#pragma unroll
    for (int k = 0; k < kVector; ++k)
      if (k == place) g[k] -= onehot;
  }

  KD_DEVICE static void through_map(const LogitMap& map, const float (&logits)[kVector],
                                    float (&g)[kVector]) {
    if (map.identity()) return;
#pragma unroll
    for (int k = 0; k < kVector; ++k) g[k] *= map.slope(logits[k]);
  }

  KD_DEVICE void zero() {
    const float zeros[kVector] = {};
    const Target to = target(job_.grad), teacher_to = target(job_.teacher_grad);
    for (int column = slice_.begin() + lane_ * kVector; column < end(); column += kStep) {
      if (job_.grad.data != nullptr) store<Types>(to, column, end() - column, zeros);
      if (job_.teacher_grad.data != nullptr) store<Anything>(teacher_to, column, end() - column, zeros);
    }
  }

  const Job& job_;
  const Plan& plan_;
  Slice& slice_;
  SharedMemory& shared_;
  int lane_, warp_;
  int row_ = 0, lead_ = 0, next_ = 0, next_lead_ = 0, turn_ = 0, parity_ = 0;
  bool reversed_ = false;
};

}  // namespace kd
