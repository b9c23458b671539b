// What the row loops and kernels are given: plain pointers and numbers, no torch.
#pragma once

#include <cstdint>

#include "row_state.h"

namespace kd {

enum DType { kFloat, kBFloat16, kHalf };
KD_HD constexpr int bytes_of(DType dtype) { return dtype == kFloat ? 4 : 2; }

// `[rows, width]`, a row's entries side by side, rows `stride` entries apart; data null if absent.
struct Matrix {
  char* data = nullptr;
  DType dtype = kFloat;
  int64_t stride = 0;

  KD_HD char* row(int64_t i) const { return data + i * stride * bytes_of(dtype); }
};

// A number for each row, or one for all of them (stride 0).
struct PerRow {
  const double* data = nullptr;
  int64_t stride = 0;

  KD_HD double of(int64_t row) const { return data[row * stride]; }
};

// What a row's outputs are multiplied by; 0 for one that is not asked for.
struct RowWeights {
  double soft = 0, label = 0, smooth = 0, lse_squared = 0, entropy = 0, teacher_label = 0;

  KD_HD bool any_hard() const { return label != 0 || smooth != 0 || lse_squared != 0; }
  // Whether the student has a gradient.
  KD_HD bool any_student() const { return soft != 0 || entropy != 0 || any_hard(); }
};

// A sparse target (kdkernels/backends/outcomes.py), and what becomes of it between the passes.
struct SparseJob {
  const int64_t* ids = nullptr;  // [rows, slots], ascending, -1: none; left out of the student's sums
  int64_t slots = 0;
  Matrix teacher;                                      // [rows, slots + 1] log-masses, fp32
  const double *scale = nullptr, *constant = nullptr;  // [rows], the soft output is scale * D + constant
  const bool* rounding = nullptr;                      // [rows], see rest_is_none
  Spec outcome_spec;                                   // of the divergence between outcomes
  Matrix stored_grad;                // [rows, slots] fp32: the soft gradient, before weights
  const double* rest = nullptr;      // [rows]: the same of all ids that are not stored
  const Normaliser* at_1 = nullptr;  // [rows]: the whole row's at temperature 1
  const Softmax* softmax = nullptr;  // [rows]: the whole row's at T; only where an entropy is asked for

  // The rest is no outcome where the student has none (`sum_exp` is of it) and the teacher's may be rounding.
  KD_HD bool rest_is_none(int64_t row, double sum_exp) const { return rounding[row] && sum_exp == 0; }
};

struct Job {
  Matrix student, teacher, grad, teacher_grad;
  const int64_t* labels = nullptr;     // [rows], -1: the row takes no part
  PerRow temperature;                  // not read where the spec says that it is 1
  const double* parameters = nullptr;  // [2], of the divergence
  const double* weights = nullptr;     // [rows, kOutputs], multiply the gradient
  double* results = nullptr;           // [rows, kResults], zeroed
  double* state = nullptr;             // [rows, kStateColumns]
  int64_t width = 0;                   // columns of this chunk
  int64_t vocab = 0, offset = 0;       // of the whole row, and where the chunk begins in it
  Spec spec;
  SparseJob sparse;

  KD_HD bool is_live(int64_t row) const { return labels == nullptr || labels[row] >= 0; }
  KD_HD double temperature_of(int64_t row, const Spec& problem) const {
    return problem.tempered ? temperature.of(row) : 1.0;
  }
  KD_HD double weight(int64_t row, Output output) const {
    return spec.asks(output) ? weights[row * kOutputs + output] : 0.0;
  }
  KD_HD RowWeights weights_of(int64_t row) const {
    return {weight(row, kSoft),       weight(row, kLabel),   weight(row, kSmooth),
            weight(row, kLseSquared), weight(row, kEntropy), weight(row, kTeacherLabel)};
  }
};

}  // namespace kd
