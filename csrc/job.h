// What the row loops and kernels are given: plain pointers and numbers, no torch.
#pragma once

#include <cstdint>

#include "spec.h"
#include "vec.h"

namespace kd {

enum DType { kFloat, kBFloat16, kHalf };

// `[rows, width]`, a row's entries side by side, rows `stride` entries apart; data null if absent.
struct Matrix {
  char* data = nullptr;
  DType dtype = kFloat;
  int64_t stride = 0;

  KD_HD char* row(int64_t i) const { return data + i * stride * (dtype == kFloat ? 4 : 2); }
};

// A sparse target (kdkernels/backends/outcomes.py), and what becomes of it between the passes.
struct SparseJob {
  const int64_t* ids = nullptr;  // [rows, slots], ascending, -1: none; left out of the student's sums
  int64_t slots = 0;
  Matrix teacher;                                      // [rows, slots + 1] log-masses, fp32
  const double *scale = nullptr, *constant = nullptr;  // [rows], the soft term is scale * D + constant
  Spec outcome_spec{};                                 // of the divergence between outcomes
  Matrix kept_grad;                                    // solved: [rows, slots] fp32, and per row
  const double *rest = nullptr, *lse1 = nullptr;
};

struct Job {
  Matrix student, teacher, grad, teacher_grad;
  const int64_t* labels = nullptr;  // [rows], -1: the token is masked
  const double* weights = nullptr;  // [rows], multiply the gradient
  double* results = nullptr;        // [rows, 6], zeroed
  double* state = nullptr;          // [rows, kStateColumns]
  int64_t width = 0;                // columns of this chunk
  int64_t vocab = 0, offset = 0;    // of the whole row, and where the chunk begins in it
  Spec spec{};
  SparseJob sparse;
};

}  // namespace kd
