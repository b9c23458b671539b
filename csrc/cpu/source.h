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

// A lane adds few fp32 terms before fp64 takes over: 128 with 16 lanes, 32 with fewer, whose
// partial sums are larger. Both sides of a block fit in L1.
constexpr int kBlock = kLanes >= 16 ? 2048 : 32 * kLanes;

inline int padded(int64_t n) { return (int)((n + kLanes - 1) / kLanes * kLanes); }

// Rows of one side as fp32 logits: raw -> cap * tanh(scale * raw / cap).
struct Source {
  const char* row = nullptr;
  DType dtype = kFloat;
  float scale = 1, cap = 0;

  bool plain() const { return dtype == kFloat && scale == 1 && cap == 0; }

  int bytes() const { return dtype == kFloat ? 4 : 2; }
  const char* ahead(int64_t start) const { return row + start * bytes(); }

  // One logit.
  double at(int64_t i) const {
    float raw[kLanes];
    load_floats(row, dtype, i, 1, raw);
    const double z = (double)raw[0] * scale;
    return cap == 0 ? z : cap * std::tanh(z / cap);
  }

  // n entries from `start`, padded with -inf to whole vectors; in place where nothing is to do.
  const float* block(int64_t start, int n, float* buffer) const {
    if (plain() && n % kLanes == 0) return (const float*)row + start;
    load_floats(row, dtype, start, n, buffer);
    const int end = padded(n);
    for (int i = n; i < end; ++i) buffer[i] = -kInf;
    if (cap != 0) {
      for (int i = 0; i < end; i += kLanes) store(buffer + i, vtanh(load(buffer + i) * (scale / cap)) * cap);
    } else if (scale != 1) {
      for (int i = 0; i < end; i += kLanes) store(buffer + i, load(buffer + i) * scale);
    }
    for (int i = n; i < end; ++i) buffer[i] = -kInf;
    return buffer;
  }
};

inline Source source(const Matrix& m, int64_t i, double scale, double cap) {
  return {m.row(i), m.dtype, (float)scale, (float)cap};
}

// A thread's working memory: e and a for a whole row, what each block is relative to, L1 buffers.
class Scratch {
 public:
  explicit Scratch(int64_t width)
      : row_((size_t)padded(width) + kBlock),
        memory_(allocate(3 * row_ + 3 * kBlock)),
        m_s((width + kBlock - 1) / kBlock),
        m_t(m_s.size()) {}

  float* e() { return memory_.get(); }  // exp(s - m)
  float* a() { return e() + row_; }     // what the divergence needs beside e
  float* e1() { return a() + row_; }    // exp at temperature 1
  float* s_block() { return e1() + row_; }
  float* t_block() { return s_block() + kBlock; }
  float* g_block() { return t_block() + kBlock; }

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
  std::unique_ptr<float[], Free> memory_;

 public:
  std::vector<double> m_s, m_t;
};

}  // namespace KD_ISA
}  // namespace kd
