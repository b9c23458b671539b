// One side's row as a warp reads it, eight columns a lane at a time, and how gradients are written.
//
// A row need not begin at a multiple of 16 bytes in memory. Its columns are numbered from the last such
// multiple before it; these numbers are called places. The first `lead` places are not the row's own, and
// pointers to a row are to place 0. A lane's places are adjacent and begin at a multiple of eight, so that
// they are read and written in pieces of 16 bytes. Values are fp32 in registers, whatever their type in
// memory.
#pragma once

#include "../job.h"
#include "../vec.h"
#include "geometry.h"
#include "platform.cuh"

namespace kd {

constexpr int kVector = 8;
constexpr int kStep = kWarp * kVector;  // columns that a warp takes at once

// What a kernel knows of its call when it is compiled. kLean, the common case: no statistics, entropy, label
// smoothing, second temperature, sparse target or gradient for the teacher, and no logit is mapped. kHeld:
// how many numbers a lane keeps of its columns from the first pass to the last (held.cuh); 0: the columns are
// read again.
struct PlainBFloat16 {  // all tensors are bf16
  static constexpr bool kLean = true;
  static constexpr int kHeld = 0;
  static constexpr int kTile = 2;  // vectors that a lane takes at once
  KD_HD static constexpr DType of(DType) { return kBFloat16; }
  KD_HD static constexpr DType of_gradient(DType) { return kBFloat16; }
};
struct PlainFloat {  // logits in fp32, an lm_head's tiles as well
  static constexpr bool kLean = true;
  static constexpr int kHeld = 0;
  static constexpr int kTile = 2;
  KD_HD static constexpr DType of(DType) { return kFloat; }
  KD_HD static constexpr DType of_gradient(DType dtype) { return dtype; }
};
template <class Plain>
struct Held : Plain {
  static constexpr int kHeld = kHeldNumbers;
};
struct Anything {
  static constexpr bool kLean = false;
  static constexpr int kHeld = 0;
  static constexpr int kTile = 1;
  KD_HD static DType of(DType dtype) { return dtype; }
  KD_HD static DType of_gradient(DType dtype) { return dtype; }
};

// raw -> cap * tanh(scale * raw / cap); cap 0: no tanh. Rounded before a reference is subtracted: a label's
// logit, which is read by itself, then has the same bits.
struct LogitMap {
  float scale = 1, cap = 0;

  KD_HD bool identity() const { return scale == 1 && cap == 0; }
  KD_HD float operator()(float raw) const {
    using KD_ISA::rounded_product;
    return cap == 0 ? rounded_product(raw, scale) : rounded_product(KD_ISA::vtanh(raw * (scale / cap)), cap);
  }
  // d logit / d raw, from the logit.
  KD_HD float slope(float logit) const {
    const float u = cap == 0 ? 0.0f : logit / cap;
    return (1.0f - u * u) * scale;
  }
};

// How many columns after a multiple of 16 bytes a row begins.
KD_HD int lead_of(const Matrix& m, int row) { return (int)((uint64_t)m.row(row) & 15) / bytes_of(m.dtype); }

// The row's lead, where all that is read and written has the same. Else 0: what is not aligned then is read
// and written column by column.
KD_HD int lead_of(const Job& job, int row) {
  const int lead = lead_of(job.student, row);
  const bool agree = (job.teacher.data == nullptr || lead_of(job.teacher, row) == lead) &&
                     (job.grad.data == nullptr || lead_of(job.grad, row) == lead) &&
                     (job.teacher_grad.data == nullptr || lead_of(job.teacher_grad, row) == lead);
  return agree ? lead : 0;
}

// Place 0 of a row.
KD_HD char* start_of(const Matrix& m, int row, int lead) { return m.row(row) - lead * bytes_of(m.dtype); }
KD_HD bool is_aligned(const void* p) { return ((uint64_t)p & 15) == 0; }

struct Side {
  const char* row = nullptr;  // place 0, in the caller's memory
  int lead = 0;
  int resident = -1;  // where place `first` is in shared memory; -1: it is not there
  int first = 0;
  DType dtype = kFloat;
  bool aligned = false;  // place 0 is at a multiple of 16 bytes
  LogitMap map;
};

template <class Types>
KD_DEVICE float value_at(const char* p, DType dtype, int i) {
  const DType known = Types::of(dtype);
  if (known == kFloat) return ((const float*)p)[i];
  const uint16_t bits = ((const uint16_t*)p)[i];
  return known == kHalf ? from_half(bits) : __builtin_bit_cast(float, (uint32_t)bits << 16);
}

// Two neighbours in one word.
template <class Types>
KD_DEVICE void unpack(uint32_t word, DType dtype, float* v) {
  if (Types::of(dtype) == kHalf) {
    v[0] = from_half((uint16_t)word);
    v[1] = from_half((uint16_t)(word >> 16));
  } else {
    v[0] = __builtin_bit_cast(float, word << 16);
    v[1] = __builtin_bit_cast(float, word & 0xffff0000u);
  }
}

template <class Types>
KD_DEVICE void load_whole(const char* p, DType dtype, float (&v)[kVector]) {
  if (Types::of(dtype) == kFloat) {
    const uint4 a = ((const uint4*)p)[0], b = ((const uint4*)p)[1];
    const uint32_t words[kVector] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = __builtin_bit_cast(float, words[k]);
  } else {
    const uint4 a = *(const uint4*)p;
    const uint32_t words[kVector / 2] = {a.x, a.y, a.z, a.w};
#pragma unroll
    for (int k = 0; k < kVector / 2; ++k) unpack<Types>(words[k], dtype, v + 2 * k);
  }
}

// Which of a vector's entries are the row's: those from `before` (which may be negative) up to, not
// including, `count`.
struct Present {
  int before, count;
  KD_DEVICE bool all() const { return before <= 0 && count >= kVector; }
  KD_DEVICE bool operator()(int k) const { return k >= before && k < count; }
};

// A vector whose entries that are not the row's are -inf.
template <class Types>
KD_DEVICE void load_from(const char* p, bool aligned, DType dtype, Present present, float (&v)[kVector]) {
  if (aligned && present.all()) return load_whole<Types>(p, dtype, v);
#pragma unroll
  for (int k = 0; k < kVector; ++k) v[k] = present(k) ? value_at<Types>(p, dtype, k) : -KD_ISA::kInf;
}

// The logits from `column` on; the row ends `count` columns after it.
template <class Types>
KD_DEVICE void load(const Side& side, int column, int count, float (&v)[kVector]) {
  const int size = bytes_of(Types::of(side.dtype));
  const Present present{side.lead - column, count};
  if (side.resident >= 0)
    load_from<Types>(shared_memory() + side.resident + (column - side.first) * size, true, side.dtype,
                     present, v);
  else
    load_from<Types>(side.row + (int64_t)column * size, side.aligned, side.dtype, present, v);
  if constexpr (!Types::kLean) {
    if (side.map.identity()) return;
#pragma unroll
    for (int k = 0; k < kVector; ++k) v[k] = present(k) ? side.map(v[k]) : -KD_ISA::kInf;
  }
}

// The same for a whole vector in shared memory whose logits are not mapped.
template <class Types>
KD_DEVICE void load_resident(const Side& side, int column, float (&v)[kVector]) {
  const int at = side.resident + (column - side.first) * bytes_of(Types::of(side.dtype));
  load_whole<Types>(shared_memory() + at, side.dtype, v);
}

// One logit of the row.
template <class Types>
KD_DEVICE float logit(const Side& side, int column) {
  const float raw = side.resident >= 0
                        ? value_at<Types>(shared_memory() + side.resident, side.dtype, column - side.first)
                        : value_at<Types>(side.row, side.dtype, column);
  return Types::kLean ? raw : side.map(raw);
}

// Where a row's gradient is written; the fields are those of Side.
struct GradRow {
  char* row = nullptr;
  int lead = 0;
  DType dtype = kFloat;
  bool aligned = false;
};

KD_DEVICE void store_value(char* row, DType dtype, int64_t i, float value) {
  if (dtype == kFloat)
    ((float*)row)[i] = value;
  else if (dtype == kBFloat16)
    ((uint16_t*)row)[i] = (uint16_t)pack_bfloat16(value, 0.0f);
  else
    ((uint16_t*)row)[i] = (uint16_t)pack_half(value, 0.0f);
}

// A vector that is all the row's, at a multiple of 16 bytes.
template <class Types>
KD_DEVICE void store_whole(const GradRow& to, int column, const float (&v)[kVector]) {
  const DType dtype = Types::of_gradient(to.dtype);
  char* p = to.row + (int64_t)column * bytes_of(dtype);
  uint32_t w[kVector];
  if (dtype == kFloat) {
#pragma unroll
    for (int k = 0; k < kVector; ++k) w[k] = __builtin_bit_cast(uint32_t, v[k]);
    store_streaming(p + 16, {w[4], w[5], w[6], w[7]});
  } else {
#pragma unroll
    for (int k = 0; k < kVector / 2; ++k)
      w[k] = dtype == kHalf ? pack_half(v[2 * k], v[2 * k + 1]) : pack_bfloat16(v[2 * k], v[2 * k + 1]);
  }
  store_streaming(p, {w[0], w[1], w[2], w[3]});
}

template <class Types>
KD_DEVICE void store(const GradRow& to, int column, int count, const float (&v)[kVector]) {
  const Present present{to.lead - column, count};
  if (present.all() && to.aligned) return store_whole<Types>(to, column, v);
#pragma unroll
  for (int k = 0; k < kVector; ++k)
    if (present(k)) store_value(to.row, Types::of_gradient(to.dtype), (int64_t)column + k, v[k]);
}

}  // namespace kd
