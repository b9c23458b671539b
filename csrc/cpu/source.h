// Where a row's blocks come from, and the memory that a thread works on them in.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "convert.h"
#include "row_loops.h"

namespace kd {
namespace KD_ISA {

// Columns of a block. All that is made of a block of both sides fits in L1. A lane adds 128 fp32 terms, in
// groups (kGroup, row.h), before fp64 takes over.
constexpr int kBlock = 128 * kLanes;

inline int padded(int64_t n) { return (int)((n + kLanes - 1) / kLanes * kLanes); }

// Logits of one side, adjacent and in whole vectors: in the caller's memory, or as fp32 in a buffer.
struct Block {
  const char* at = nullptr;
  DType dtype = kFloat;
};

// Rows of one side as logits: raw -> cap * tanh(scale * raw / cap).
struct Source {
  const char* row = nullptr;
  DType dtype = kFloat;
  float scale = 1, cap = 0;

  bool is_mapped() const { return scale != 1 || cap != 0; }
  int bytes() const { return bytes_of(dtype); }
  const char* at(int64_t start) const { return row + start * bytes(); }

  // Where is_mapped().
  Vec mapped(Vec raw) const { return cap != 0 ? vtanh(raw * (scale / cap)) * cap : raw * scale; }

  // One logit of the row, with the bits that it has in a block. A label's loss is the normaliser, which is
  // made of blocks, less this: of a confident label, or far from 0, that difference is small.
  double logit(int64_t i) const {
    float raw[kLanes] = {};
    load_floats(row, dtype, i, 1, raw);
    return is_mapped() ? mapped(load(raw))[0] : raw[0];
  }

  // n logits from `start`, mapped, padded with -inf to whole vectors. Where there is nothing to map or pad
  // they stay in the row's own memory and type; else they are made in `buffer`.
  Block block(int64_t start, int n, float* buffer) const {
    if (!is_mapped() && n % kLanes == 0) return {at(start), dtype};
    return {(const char*)floats(start, n, buffer), kFloat};
  }

  // The same in fp32, and always in the buffer.
  float* floats(int64_t start, int n, float* buffer) const {
    load_floats(row, dtype, start, n, buffer);
    const int end = padded(n);
    if (is_mapped())
      for (int i = 0; i < end; i += kLanes) store(buffer + i, mapped(load(buffer + i)));
    for (int i = n; i < end; ++i) buffer[i] = -kInf;  // last: a cap would make -cap of it
    return buffer;
  }
};

inline Source source(const Matrix& m, int64_t i, double scale, double cap) {
  return {m.row(i), m.dtype, (float)scale, (float)cap};
}

// What a block's exponentials are relative to.
struct References {
  double student = 0, teacher = 0;
  bool operator==(const References&) const = default;
};

// A thread's working memory: what the first pass leaves of a whole row to the passes after it, and a block of
// each side in L1.
class Scratch {
 public:
  explicit Scratch(int64_t width)
      : row_((size_t)padded(width) + kBlock),
        floats_(allocate(3 * row_ + 3 * kBlock)),
        references_((width + kBlock - 1) / kBlock) {}

  float* student_exp() { return floats_.get(); }       // exp((s - reference) / T)
  float* second() { return student_exp() + row_; }     // what the divergence needs beside it (fold.h)
  float* student_exp_t1() { return second() + row_; }  // exp(s - reference)
  float* student_block() { return student_exp_t1() + row_; }
  float* teacher_block() { return student_block() + kBlock; }
  float* grad_block() { return teacher_block() + kBlock; }

  References& references(int64_t b) { return references_[b]; }

 private:
  static float* allocate(size_t floats) {
    void* p = std::aligned_alloc(64, (floats * sizeof(float) + 63) / 64 * 64);
    if (p == nullptr) throw std::bad_alloc();
    return (float*)p;
  }
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  size_t row_;
  std::unique_ptr<float[], Free> floats_;
  std::vector<References> references_;
};

}  // namespace KD_ISA
}  // namespace kd
