// Rows in registers: the common case of a whole row with its gradient, where the registers of a cluster hold
// it.
//
// The first pass makes a logit's exponential once and keeps it; q or p is that exponential times a number
// shared by all of the warp's columns. So a pair of logits costs two exponentials instead of four, and its
// place in shared memory is free for a later row as soon as it has been read.
//
// A block has warps with columns and one without, the steward. The steward runs ahead: it asks for the copies
// of later rows, reads what is needed of them, and in the last block works out the results. The others share
// no barrier of all threads. Each waits for its row's copies, sends what it found of its columns to every
// block of the cluster, and waits for what all the others send. Two buffers suffice: a warp sends for row n +
// 2 only after it has received everything for row n + 1, and every reader sent that after reading row n. The
// last block's steward reads too, so it sends a part of no columns.
//
// Mixed and AlphaBeta, which need the logits again, are left to kernel.cuh's passes.
//
// Traffic: each logit is read from memory once, and the gradient written once.
//
// Numerics: a warp's exponentials are relative to its own maximum, and moved to the row's by a factor that
// both sides compute in the same way. Products that must cancel are rounded one by one, so that equal logits
// have a gradient of exactly 0. Sums are fp32 within a warp. Over the warps they are fp32 for gradients, fp64
// for results.
#pragma once

#include "gradient.cuh"
#include "parts.cuh"

namespace kd {

template <class Divergence>
constexpr bool kCanHold = [] {
  if constexpr (kHasClosedForm<Divergence>)
    return true;
  else
    return Divergence::kFromProbabilities;
}();

template <class Row>
constexpr int kHeldVectors = Row::Types::kHeld / kVector / (Row::kTeacher ? 2 : 1);

// What a lane holds of its columns. After the first pass: the student's exponentials, and the teacher's or,
// for ReverseKL, the difference of the distances to the maxima, d_t - d_s. After the second: q and q_psi.
template <class Row>
struct Columns {
  float s[kHeldVectors<Row>][kVector], t[kHeldVectors<Row>][kVector];
};

// What a warp found of its columns, as others get it.
struct alignas(16) Found {
  float sums[3] = {};  // those of Parts
  float student = (float)kNoReference, teacher = (float)kNoReference;

  KD_DEVICE operator Parts() const { return {{sums[0], sums[1], sums[2]}, student, teacher}; }
};
// What it found in the second pass.
struct alignas(16) FoundValue {
  float phi = 0, sum_q_psi = 0;
};
static_assert(sizeof(Found) == 32 && sizeof(Found) + sizeof(FoundValue) == kHandedOver);

// What the steward reads of a row for the others.
struct Ticket {
  int row, lead;  // row: the number of rows where there is no further one
  int label;      // its place, negative: nowhere
  float factor, inverse_temperature;
  float soft, onehot, squared;  // weights of the outputs
};
// While the steward writes row n's, the slowest warp may still read row n - 2's; a power of two.
constexpr int kTickets = 4;

struct HeldMemory {
  Ticket tickets[kTickets];
  float label_logits[kTickets];
  Barrier full[2], empty[2], found[2], values[2];
};
static_assert(sizeof(HeldMemory) <= kHeldMemory);

// Where everything is in shared memory. Findings have two turns, this row's and the next one's.
template <class Row>
struct HeldLayout {
  const Row& row;
  const Geometry& g;
  int turn = 0;  // how many rows were computed before

  KD_DEVICE explicit HeldLayout(const Row& row) : row(row), g(row.plan.geometry) {}
  KD_DEVICE HeldMemory& memory() const { return *(HeldMemory*)(shared_memory() + kReserved); }
  KD_DEVICE Ticket& ticket() const { return memory().tickets[turn % kTickets]; }

  // The row's place among those that are on their way, and which use of it this is.
  KD_DEVICE int stage() const { return g.stages == 2 ? turn & 1 : 0; }
  KD_DEVICE int use() const { return turn >> (g.stages - 1) & 1; }
  KD_DEVICE int block_columns() const { return g.warps * g.span; }
  KD_DEVICE int student() const { return g.slices_at + stage() * g.warps * g.bytes_per_warp; }
  KD_DEVICE int teacher() const { return student() + block_columns() * size(); }
  KD_DEVICE Barrier& full() const { return memory().full[stage()]; }
  KD_DEVICE Barrier& empty() const { return memory().empty[stage()]; }
  KD_DEVICE static constexpr int size() { return bytes_of(Row::Types::of(kFloat)); }

  KD_DEVICE int senders() const { return g.cluster * g.warps + 1; }
  KD_DEVICE int half() const { return turn & 1; }
  KD_DEVICE Found* found() const {
    return (Found*)(shared_memory() + kReserved + kHeldMemory) + half() * senders();
  }
  KD_DEVICE FoundValue* values() const {
    return (FoundValue*)(found() + (2 - half()) * senders()) + half() * senders();
  }
  KD_DEVICE Barrier& found_barrier() const { return memory().found[half()]; }
  KD_DEVICE Barrier& values_barrier() const { return memory().values[half()]; }
  // Waits until all have sent what they found of this row.
  KD_DEVICE void wait_for_all(Barrier& barrier) const {
    wait(barrier, turn >> 1 & 1);
    sync_warp();
  }
};

// A warp's numbers into every block, as number `at` of `all`: lane l writes to block l.
template <class T>
KD_DEVICE void send_to_all(T* all, int at, const T& mine, Barrier& barrier, const Geometry& g) {
  const int lane = thread_index() % kWarp;
  if (lane >= g.cluster) return;
#pragma unroll
  for (int i = 0; i < (int)sizeof(T) / 16; ++i) {
    uint4 words;
    __builtin_memcpy(&words, (const char*)&mine + 16 * i, 16);
    send((char*)(all + at) + 16 * i, words, barrier, lane);
  }
}

// With the warp's sums in the place of the lanes', which are at common references.
KD_DEVICE Found with_sums(Found found, float (&sums)[4]) {
  add_across_warp<4>(sums);
#pragma unroll
  for (int i = 0; i < 3; ++i) found.sums[i] = from_lane(sums[0], i * kWarp / 4);
  return found;
}
KD_DEVICE Found added(const Found& lane) {
  float sums[4] = {lane.sums[0], lane.sums[1], lane.sums[2]};
  return with_sums(lane, sums);
}

// How many of all warps' findings a lane takes care of.
constexpr int kMostFound = kPortableCluster * kMaxWarps / kWarp;

// Of all warps: in fp32, for gradients, as a Found; in fp64, for results, as Parts.
template <class Part, class Row>
KD_DEVICE Part all_found(const HeldLayout<Row>& at) {
  return combined<Row::kKind == kReverseKL, Part, kMostFound>(at.found(), at.senders(), at.ticket().factor);
}

// The sums over all warps, phi in lanes 0 to 15 and q_psi in the others.
template <class T, class Row>
KD_DEVICE T all_values(const HeldLayout<Row>& at) {
  T sums[2] = {};
#pragma unroll
  for (int j = 0; j < kMostFound; ++j) {
    const int i = at.row.lane + j * kWarp;
    if (i >= at.senders()) continue;
    sums[0] += at.values()[i].phi;
    sums[1] += at.values()[i].sum_q_psi;
  }
  add_across_warp<2>(sums);
  return sums[0];
}
// NaN logits stay visible, whatever the formula does with them.
template <class Row>
KD_DEVICE float sum_q_psi_of(const HeldLayout<Row>& at) {
  const float sums = all_values<float>(at), phi = from_lane(sums, 0);
  return from_lane(sums, kWarp / 2) + (phi - phi);
}

// Calls f(number of a vector, its first column) for all of a lane's vectors. Not only for those that have
// columns of the row: then the compiler would keep the arrays in memory.
template <class Row, class F>
KD_DEVICE void each_vector(const Row& row, F&& f) {
#pragma unroll
  for (int i = 0; i < kHeldVectors<Row>; ++i) f(i, row.slice.begin() + i * kStep + row.lane * kVector);
}

// Whether all columns of the warp are the row's.
template <class Row>
KD_DEVICE bool is_whole(const Row& row) {
  return row.slice.begin() >= row.lead && row.end() - row.slice.begin() == row.plan.geometry.span;
}

// Gives -inf to the others in shared memory, from `at` on: the passes need not ask.
template <class Row>
KD_DEVICE void blank(const Row& row, char* at) {
  const auto put = [&](int from, int to) {
#pragma unroll 1
    for (int i = from + row.lane; i < to; i += kWarp)
      if (Row::Types::of(kFloat) == kFloat)
        ((float*)at)[i] = -kInf;
      else
        ((uint16_t*)at)[i] = 0xff80;  // of bf16
  };
  put(0, row.lead - row.slice.begin());
  put(row.end() - row.slice.begin(), row.plan.geometry.span);
}

// A vector as it is in shared memory.
template <class Types>
struct Words {
  static constexpr bool kPairs = Types::of(kFloat) == kBFloat16;
  uint32_t words[kPairs ? 4 : 8];

  KD_DEVICE void load(const char* at) {
#pragma unroll
    for (int i = 0; i < (kPairs ? 1 : 2); ++i) {
      const uint4 four = ((const uint4*)at)[i];
      words[4 * i] = four.x;
      words[4 * i + 1] = four.y;
      words[4 * i + 2] = four.z;
      words[4 * i + 3] = four.w;
    }
  }
  KD_DEVICE void unpack(float (&v)[kVector]) const {
#pragma unroll
    for (int k = 0; k < kVector; k += kPairs ? 2 : 1)
      if constexpr (kPairs)
        kd::unpack<Types>(words[k / 2], kBFloat16, v + k);
      else
        v[k] = __builtin_bit_cast(float, words[k]);
  }
  // NaN is passed over: it is seen in the sums.
  KD_DEVICE float highest() const {
    float v[kVector];
    if constexpr (kPairs) {
      kd::unpack<Types>(
          highest_bfloat16x2(highest_bfloat16x2(words[0], words[1]), highest_bfloat16x2(words[2], words[3])),
          kBFloat16, v);
      return fmaxf(v[0], v[1]);
    } else {
      unpack(v);
      return kd::highest(v);
    }
  }
};

// First pass: what the warp finds of its columns, the third sum before the temperature. `have_read()` is
// called when they are no longer needed in shared memory, where they begin at `student` and `teacher`.
template <class Row, class F>
KD_DEVICE Found fold_columns(const Row& row, const char* student, const char* teacher, float factor,
                             Columns<Row>& columns, F&& have_read) {
  constexpr bool kReverse = Row::kKind == kReverseKL, kCross = kReverse || needs_cross_t(Row::kKind);
  constexpr int kVectorBytes = kVector * bytes_of(Row::Types::of(kFloat));
  Words<typename Row::Types> words_s[kHeldVectors<Row>], words_t[kHeldVectors<Row>];
  Found found;
  each_vector(row, [&](int i, int) {
    words_s[i].load(student + (i * kWarp + row.lane) * kVectorBytes);
    if (Row::kTeacher) words_t[i].load(teacher + (i * kWarp + row.lane) * kVectorBytes);
  });
  each_vector(row, [&](int i, int) {
    found.student = fmaxf(found.student, words_s[i].highest());
    if (Row::kTeacher) found.teacher = fmaxf(found.teacher, words_t[i].highest());
  });
  found.student = highest_of_warp(found.student);
  if (Row::kTeacher) found.teacher = highest_of_warp(found.teacher);
  have_read();
  float sums[4] = {};
  each_vector(row, [&](int i, int) {
    float s[kVector], t[kVector];
    words_s[i].unpack(s);
    if (Row::kTeacher) words_t[i].unpack(t);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float d_s = s[k] - found.student, e_s = fast_exp2(d_s * factor);
      sums[0] += columns.s[i][k] = e_s;
      if constexpr (Row::kTeacher) {
        const float d_t = t[k] - found.teacher, e_t = fast_exp2(d_t * factor), weight = kReverse ? e_s : e_t;
        sums[1] += e_t;
        columns.t[i][k] = kReverse ? d_t - d_s : e_t;
        if (kCross && weight > 0) sums[2] += weight * (d_t - d_s);
      }
    }
  });
  return with_sums(found, sums);
}

// What turns a warp's exponentials into q and p.
struct Shares {
  float s, t;
};
KD_DEVICE Shares shares_of(const Found& mine, const Found& all, float factor) {
  return {fast_exp2((mine.student - all.student) * factor) * inverse(all.sums[0]),
          fast_exp2((mine.teacher - all.teacher) * factor) * inverse(all.sums[1])};
}

template <class Divergence, class Row>
KD_DEVICE Divergence divergence_of(const Row& row, const Found& all, const Ticket& ticket) {
  const float gap = Row::kKind == kSkewKL ? logf(all.sums[1]) - logf(all.sums[0]) : 0;
  const float mean = all.sums[2] * inverse(all.sums[1]) * ticket.inverse_temperature;
  return Divergence(row.job.parameters, Row::kKind == kSkewKL && disagree(mean, gap));
}

// Second pass, for divergences without a closed form: q and q_psi, and the warp's sums.
template <class Divergence, class Row>
KD_DEVICE FoundValue value_of_columns(const Row& row, const Divergence& divergence, const Shares& shares,
                                      Columns<Row>& columns) {
  float sums[2] = {};
  each_vector(row, [&](int i, int) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const float q = rounded_product(columns.s[i][k], shares.s);
      const float p = rounded_product(columns.t[i][k], shares.t);
      const Terms terms = divergence(p, q, 0, 0, 0);
      sums[0] += terms.phi;
      sums[1] += terms.q_psi;
      columns.s[i][k] = q;
      columns.t[i][k] = terms.q_psi;
    }
  });
  add_across_warp<2>(sums);
  return {from_lane(sums[0], 0), from_lane(sums[0], kWarp / 2)};
}

// What multiplies a warp's columns in the gradient.
struct Weights {
  float soft = 0;      // 0: the divergence has no part in it
  float s = 0, t = 0;  // of the divergence's two terms
  float mean = 0;      // ReverseKL's mean of d_t - d_s under q, at the warp's own maxima; else sum q_psi
  float hard = 0, onehot = 0;
};

// `shares`: those of the first pass; after the second, whose numbers are normalised, 1.
template <class Row>
KD_DEVICE Weights weights_of(const Row& row, const Ticket& ticket, const Found& all, const Shares& shares,
                             float mean) {
  Weights w;
  w.soft = ticket.soft * ticket.inverse_temperature;
  w.s = shares.s * w.soft * (Row::kKind == kReverseKL ? ticket.inverse_temperature : 1);
  w.t = shares.t * w.soft;
  w.mean = mean;
  w.onehot = ticket.onehot;
  float hard = ticket.onehot;
  if (ticket.squared != 0) hard += 2 * ticket.squared * (all.student + logf(all.sums[0]));
  w.hard = hard == 0 ? 0 : shares.s * hard;
  return w;
}

// The divergence's gradient at one column, with the row's weight.
template <class Row>
KD_DEVICE float soft_gradient(const Weights& w, float s, float t) {
  if constexpr (Row::kKind == kForwardKL) return rounded_product(s, w.s) - rounded_product(t, w.t);
  if constexpr (Row::kKind == kReverseKL) {
    const float q = s * w.s;  // with the weight; t is infinite where it may be 0
    return q != 0 ? q * (w.mean - t) : q;
  }
  return (t - rounded_product(s, w.mean)) * w.soft;
}

// Last pass. `whole`: is_whole().
template <class Row>
KD_DEVICE void write_columns(const Row& row, const Weights& w, int label, bool whole,
                             const Columns<Row>& columns) {
  const GradRow grad = row.grad_row(row.job.grad);
  whole &= grad.aligned;
  each_vector(row, [&](int i, int column) {
    float g[kVector] = {};
    if (Row::kTeacher && w.soft != 0) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) g[k] = soft_gradient<Row>(w, columns.s[i][k], columns.t[i][k]);
    }
    if (w.hard != 0) {
#pragma unroll
      for (int k = 0; k < kVector; ++k) g[k] += columns.s[i][k] * w.hard;
    }
    if (row.plan.flags.label) subtract_at_label(w.onehot, label - column, g);
    if (whole)
      store_whole<typename Row::Types>(grad, column, g);
    else
      store<typename Row::Types>(grad, column, row.end() - column, g);
  });
}

// A row of a warp that has columns.
template <class Divergence, class Row>
KD_DEVICE void compute_held(const Row& row, const HeldLayout<Row>& at) {
  constexpr bool kReverse = Row::kKind == kReverseKL, kSecond = !kHasClosedForm<Divergence>;
  const int me = cluster_rank() * at.g.warps + row.warp, begin = row.warp * at.g.span * at.size();
  const float factor = at.ticket().factor;
  if (thread_index() == 0) {
    arrive_expecting(at.found_barrier(), at.senders() * sizeof(Found));
    if (kSecond) arrive_expecting(at.values_barrier(), at.senders() * sizeof(FoundValue));
  }
  char* const student = shared_memory() + at.student() + begin;
  char* const teacher = shared_memory() + at.teacher() + begin;
  const bool whole = is_whole(row);
  if (!whole) {
    blank(row, student);
    if (Row::kTeacher) blank(row, teacher);
    sync_warp();
  }
  Columns<Row> columns;
  const Found mine = fold_columns(row, student, teacher, factor, columns, [&] {
    if (!whole) fence_before_copies();
    sync_warp();
    if (row.lane == 0) arrive(at.empty());
  });
  send_to_all(at.found(), me, mine, at.found_barrier(), at.g);

  at.wait_for_all(at.found_barrier());
  const Found all = all_found<Found>(at);
  Shares shares = shares_of(mine, all, factor);
  float mean = 0;
  if constexpr (kReverse)
    mean = all.sums[2] * inverse(all.sums[0]) - ((all.student - mine.student) - (all.teacher - mine.teacher));
  if constexpr (kSecond) {
    const FoundValue value =
        value_of_columns(row, divergence_of<Divergence>(row, all, at.ticket()), shares, columns);
    send_to_all(at.values(), me, value, at.values_barrier(), at.g);
    at.wait_for_all(at.values_barrier());
    mean = sum_q_psi_of(at);
    shares = {1, 1};
  }
  write_columns(row, weights_of(row, at.ticket(), all, shares, mean), at.ticket().label, whole, columns);
}

// All rows of a warp that has columns.
template <class Divergence, class Row>
KD_DEVICE void compute_all(Row& row, HeldLayout<Row>& at) {
  int done = block_index() / at.g.cluster;
  for (;; ++at.turn) {
    wait(at.full(), at.use());
    sync_warp();
    const int index = at.ticket().row;
    for (; done < index; done += row.plan.clusters) {
      row.begin(done);
      write_zeros(row);
    }
    if (index >= row.plan.rows) return;
    row.row = index;
    row.lead = at.ticket().lead;
    compute_held<Divergence>(row, at);
    done += row.plan.clusters;
  }
}

template <class Row>
KD_DEVICE void write_ticket(const Row& row, const HeldLayout<Row>& at) {
  const RowWeights weights = row.weights();
  Ticket& ticket = at.ticket();
  ticket.lead = row.lead;
  ticket.label = row.plan.flags.label ? row.label() : -1;
  ticket.factor = log2e_over(row.temperature());
  ticket.inverse_temperature = row.job.spec.tempered ? (float)(1 / row.temperature()) : 1.0f;
  ticket.soft = (float)weights.soft;
  ticket.onehot = (float)weights.label;
  ticket.squared = (float)weights.lse_squared;
}

// Columns of one side into shared memory: what the copy engine takes, and up to 15 bytes after it.
template <class Row>
struct Copies {
  static constexpr int kSize = HeldLayout<Row>::size(), kMostRest = 16 / kSize - 1;
  using Bits = std::conditional_t<kSize == 4, uint32_t, uint16_t>;
  int columns;

  KD_DEVICE uint32_t bytes() const { return (uint32_t)(columns * kSize) & ~15u; }
  KD_DEVICE void rest(const char* from, char* to) const {
    const int first = (int)bytes() / kSize;
    Bits read[kMostRest];
#pragma unroll
    for (int i = 0; i < kMostRest; ++i)
      if (first + i < columns) read[i] = ((const Bits*)from)[first + i];
#pragma unroll
    for (int i = 0; i < kMostRest; ++i)
      if (first + i < columns) ((Bits*)to)[first + i] = read[i];
  }
};

// The block's columns of the steward's row; by one lane, whose arrival tells of all that it wrote.
template <class Row>
KD_DEVICE void copy_columns(const Row& row, const HeldLayout<Row>& at) {
  const int begin = cluster_rank() * at.block_columns(), left = (int)row.job.width + row.lead - begin;
  const Copies<Row> copies{left < 0 ? 0 : left < at.block_columns() ? left : at.block_columns()};
  const char* const student = start_of(row.job.student, row.row, row.lead) + (int64_t)begin * at.size();
  const char* const teacher = start_of(row.job.teacher, row.row, row.lead) + (int64_t)begin * at.size();
  char* const to_student = shared_memory() + at.student();
  char* const to_teacher = shared_memory() + at.teacher();
  copies.rest(student, to_student);
  if (Row::kTeacher) copies.rest(teacher, to_teacher);
  fence_before_copies();
  arrive_expecting(at.full(), (Row::kTeacher ? 2 : 1) * copies.bytes());
  if (copies.bytes() == 0) return;
  bulk_copy(to_student, student, copies.bytes(), at.full());
  if (Row::kTeacher) bulk_copy(to_teacher, teacher, copies.bytes(), at.full());
}

// Asks for the copies of row `index`, the number of rows for none, and tells the others of it. `wants_logit`:
// the label's logit is read, before the gradient may replace it.
template <class Row>
KD_DEVICE void produce(Row& row, const HeldLayout<Row>& at, int index, bool wants_logit) {
  const bool any = index < row.plan.rows;
  if (any) row.begin(index);
  const float logit = any && wants_logit ? label_logit(row) : 0;
  if (row.lane != 0) return;
  at.ticket().row = index;
  at.memory().label_logits[at.turn % kTickets] = logit;
  if (any) {
    write_ticket(row, at);
    copy_columns(row, at);
  } else {
    arrive(at.full());
  }
}

// The steward's part in an exchange: a part of no columns, of the turn that `at` is at.
template <class Divergence, class Row>
KD_DEVICE void send_nothing(const HeldLayout<Row>& at) {
  send_to_all(at.found(), at.senders() - 1, Found(), at.found_barrier(), at.g);
  if (!kHasClosedForm<Divergence>)
    send_to_all(at.values(), at.senders() - 1, FoundValue(), at.values_barrier(), at.g);
}

// `has_next`: another row follows.
template <class Divergence, class Row>
KD_DEVICE void write_held_results(const Row& row, const HeldLayout<Row>& at, int index, bool has_next) {
  constexpr bool kSecond = !kHasClosedForm<Divergence>;
  at.wait_for_all(at.found_barrier());
  const Parts all = all_found<Parts>(at);
  double phi = 0;
  if constexpr (kSecond) {
    at.wait_for_all(at.values_barrier());
    phi = from_lane(all_values<double>(at), 0);
  }
  const float label_logit = at.memory().label_logits[at.turn % kTickets];
  if (has_next) {
    HeldLayout<Row> next = at;
    ++next.turn;
    send_nothing<Divergence>(next);
  }
  RowState r;
  write_state<Row::kKind == kReverseKL>(r, all, label_logit, row.job.temperature_of(index, row.job.spec));
  r.pair.value = phi + nan_without_softmax(all.sums[0], all.sums[1]);  // NaN stays NaN, whatever the formula
  if (row.lane == 0)
    finish(r, row.job.spec, Row::kTeacher, row.job.vocab, row.job.results + (int64_t)index * kResults);
}

template <class Divergence, class Row>
KD_DEVICE void serve(Row& row, HeldLayout<Row>& at) {
  const int step = row.plan.clusters;
  const bool last = cluster_rank() == at.g.cluster - 1;
  const auto after = [&](int index) {
    return index < row.plan.rows ? next_computed(row.job, row.plan, index + step, step) : index;
  };
  int index = next_computed(row.job, row.plan, block_index() / at.g.cluster, step), next = after(index);
  HeldLayout<Row> producing = at;
  for (; producing.turn < at.g.stages; ++producing.turn)
    produce(row, producing, producing.turn == 0 ? index : next, last);
  if (last && index < row.plan.rows) send_nothing<Divergence>(at);
  while (index < row.plan.rows) {
    const int after_next = after(next);
    wait(at.empty(), at.use());
    sync_warp();
    produce(row, producing, at.g.stages == 2 ? after_next : next, last);
    if (last) write_held_results<Divergence>(row, at, index, next < row.plan.rows);
    index = next;
    next = after_next;
    ++at.turn;
    ++producing.turn;
  }
}

template <class Divergence, class Row>
KD_DEVICE void held_rows(Row& row) {
  HeldLayout<Row> at(row);
  if constexpr (kAsync) {
    HeldMemory& memory = at.memory();
    if (thread_index() == 0) {
      for (int i = 0; i < 2; ++i) {
        init(memory.full[i]);
        init(memory.empty[i], at.g.warps);
        init(memory.found[i]);
        init(memory.values[i]);
      }
      publish_barriers();
    }
    sync_cluster(false);  // all blocks have begun: their memory can be written to
    if (row.warp < at.g.warps)
      compute_all<Divergence>(row, at);
    else
      serve<Divergence>(row, at);
    sync_cluster(false);  // nobody leaves while others may still send to its block
  }
}

}  // namespace kd
