// torch's side of the CPU backend: checks, plain pointers, threads. Stable ABI, Python's limited API.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/job.h"
#include "row_state.h"

namespace kd {

const RowLoops& row_loops_baseline();
#if defined(__x86_64__) || defined(_M_X64)
const RowLoops& row_loops_avx2();
const RowLoops& row_loops_avx512();
#endif

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// 0 baseline, 1 AVX2, 2 AVX-512: the best that this processor has, or what KDKERNELS_ISA asks for.
int64_t best_instruction_set() {
  int best = 0;
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = 2;
#endif
  const char* asked = std::getenv("KDKERNELS_ISA");
  if (asked != nullptr) {
    const char* names[] = {"baseline", "avx2", "avx512"};
    for (int i = 0; i < best; ++i)
      if (std::strcmp(asked, names[i]) == 0) return i;
  }
  return best;
}

int64_t instruction_set(const Tensor&) {
  static const int64_t chosen = best_instruction_set();
  return chosen;
}

const RowLoops& loops(const Tensor& any) {
#if defined(__x86_64__) || defined(_M_X64)
  if (instruction_set(any) == 2) return row_loops_avx512();
  if (instruction_set(any) == 1) return row_loops_avx2();
#endif
  return row_loops_baseline();
}

DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return kFloat;
    case ScalarType::BFloat16: return kBFloat16;
    case ScalarType::Half: return kHalf;
    default: STD_TORCH_CHECK(false, "kdkernels: rows must be fp32, bf16 or fp16"); return kFloat;
  }
}

Matrix matrix(const Tensor& t, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(t.is_cpu() && t.dim() == 2 && t.size(0) == rows && t.size(1) == width &&
                      (t.stride(1) == 1 || width == 1),
                  "kdkernels: expected a CPU matrix of the student's shape with adjacent columns");
  return {(char*)t.data_ptr(), dtype_of(t), t.stride(0)};
}

Matrix float_matrix(const Tensor& t, int64_t rows, int64_t width) {
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "kdkernels: expected fp32");
  return matrix(t, rows, width);
}

template <class T>
T* numbers(const Tensor& t, ScalarType dtype, int64_t count) {
  STD_TORCH_CHECK(t.is_cpu() && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count,
                  "kdkernels: a per-row tensor has another dtype, layout or length");
  return (T*)t.data_ptr();
}

Job make_job(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
             const Tensor& spec) {
  Job job;
  STD_TORCH_CHECK(student.dim() == 2, "kdkernels: rows must be a matrix");
  const int64_t rows = student.size(0), width = student.size(1);
  job.student = matrix(student, rows, width);
  if (teacher) job.teacher = matrix(*teacher, rows, width);
  if (labels) job.labels = numbers<int64_t>(*labels, ScalarType::Long, rows);
  std::memcpy(&job.spec, numbers<double>(spec, ScalarType::Double, kSpecFloats), sizeof(Spec));
  job.width = job.vocab = width;
  return job;
}

void set_gradients(Job& job, const Tensor& student, const Tensor& weights, const MaybeTensor& grad,
                   const MaybeTensor& teacher_grad) {
  const int64_t rows = student.size(0);
  job.weights = numbers<double>(weights, ScalarType::Double, rows);
  if (grad) job.grad = matrix(*grad, rows, job.width);
  if (teacher_grad) job.teacher_grad = matrix(*teacher_grad, rows, job.width);
}

void set_ids(Job& job, const MaybeTensor& ids, int64_t rows) {
  if (!ids) return;
  STD_TORCH_CHECK(ids->dim() == 2, "kdkernels: a sparse target's ids must be a matrix");
  job.sparse.slots = ids->size(1);
  job.sparse.ids = numbers<int64_t>(*ids, ScalarType::Long, rows * ids->size(1));
}

void run(void (*loop)(const Job&, int64_t, int64_t), const Job& job, int64_t rows) {
  torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { loop(job, begin, end); });
}

void fused(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
           const Tensor& weights, const Tensor& spec, const Tensor& results, const MaybeTensor& grad,
           const MaybeTensor& teacher_grad) {
  Job job = make_job(student, teacher, labels, spec);
  set_gradients(job, student, weights, grad, teacher_grad);
  job.results = numbers<double>(results, ScalarType::Double, student.size(0) * 6);
  run(loops(student).fused, job, student.size(0));
}

void accumulate(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
                const Tensor& spec, int64_t offset, const Tensor& state, const MaybeTensor& skipped) {
  Job job = make_job(student, teacher, labels, spec);
  set_ids(job, skipped, student.size(0));
  job.offset = offset;
  job.state = numbers<double>(state, ScalarType::Double, student.size(0) * kStateColumns);
  run(loops(student).accumulate, job, student.size(0));
}

void accumulate_value(const Tensor& student, const Tensor& teacher, const Tensor& spec,
                      const Tensor& state) {
  Job job = make_job(student, teacher, std::nullopt, spec);
  job.state = numbers<double>(state, ScalarType::Double, student.size(0) * kStateColumns);
  run(loops(student).accumulate_value, job, student.size(0));
}

void gradient(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
              const Tensor& weights, const Tensor& spec, int64_t offset, int64_t vocab,
              const Tensor& state, const MaybeTensor& grad, const MaybeTensor& teacher_grad,
              const MaybeTensor& ids, const MaybeTensor& rest, const MaybeTensor& kept, const MaybeTensor& lse1) {
  Job job = make_job(student, teacher, labels, spec);
  set_gradients(job, student, weights, grad, teacher_grad);
  set_ids(job, ids, student.size(0));
  if (ids) {
    STD_TORCH_CHECK(rest && kept && lse1, "kdkernels: a sparse target's gradient comes in four tensors");
    job.sparse.rest = numbers<double>(*rest, ScalarType::Double, student.size(0));
    job.sparse.lse1 = numbers<double>(*lse1, ScalarType::Double, student.size(0));
    job.sparse.kept_grad = float_matrix(*kept, student.size(0), job.sparse.slots);
  }
  job.offset = offset;
  job.vocab = vocab;
  job.state = numbers<double>(state, ScalarType::Double, student.size(0) * kStateColumns);
  run(loops(student).gradient, job, student.size(0));
}

void fused_sparse(const Tensor& student, const Tensor& ids, const Tensor& teacher, const Tensor& scale,
                  const Tensor& constant, const MaybeTensor& labels, const Tensor& weights,
                  const Tensor& spec, const Tensor& outcome_spec, const Tensor& results,
                  const MaybeTensor& grad) {
  const int64_t rows = student.size(0);
  Job job = make_job(student, std::nullopt, labels, spec);
  set_gradients(job, student, weights, grad, std::nullopt);
  set_ids(job, ids, rows);
  job.sparse.teacher = float_matrix(teacher, rows, job.sparse.slots + 1);
  job.sparse.scale = numbers<double>(scale, ScalarType::Double, rows);
  job.sparse.constant = numbers<double>(constant, ScalarType::Double, rows);
  std::memcpy(&job.sparse.outcome_spec, numbers<double>(outcome_spec, ScalarType::Double, kSpecFloats),
              sizeof(Spec));
  job.results = numbers<double>(results, ScalarType::Double, rows * 6);
  run(loops(student).fused_sparse, job, rows);
}

// Only whole huge pages inside the tensor, and only large ones: elsewhere it would change nothing.
void advise_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  int64_t entry = 0;
  switch (fresh.scalar_type()) {
    case ScalarType::Double: entry = 8; break;
    case ScalarType::Float: entry = 4; break;
    default: entry = 2;
  }
  const uintptr_t at = (uintptr_t)fresh.data_ptr();
  const uintptr_t begin = (at + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (at + (uintptr_t)(fresh.numel() * entry)) / kHuge * kHuge;
  if (end > begin) madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY(kdkernels_native, m) {
  m.def("fused(Tensor(a!) student, Tensor(b!)? teacher, Tensor? labels, Tensor weights, Tensor spec, "
        "Tensor(c!) results, Tensor(d!)? grad, Tensor(e!)? teacher_grad) -> ()");
  m.def("accumulate(Tensor student, Tensor? teacher, Tensor? labels, Tensor spec, int offset, "
        "Tensor(a!) state, Tensor? skipped) -> ()");
  m.def("accumulate_value(Tensor student, Tensor teacher, Tensor spec, Tensor(a!) state) -> ()");
  m.def("gradient(Tensor(a!) student, Tensor(b!)? teacher, Tensor? labels, Tensor weights, "
        "Tensor spec, int offset, int vocab, Tensor state, Tensor(c!)? grad, "
        "Tensor(d!)? teacher_grad, Tensor? ids, Tensor? rest, Tensor? kept, Tensor? lse1) -> ()");
  m.def("fused_sparse(Tensor(a!) student, Tensor ids, Tensor teacher, Tensor scale, Tensor constant, "
        "Tensor? labels, Tensor weights, Tensor spec, Tensor outcome_spec, Tensor(b!) results, "
        "Tensor(c!)? grad) -> ()");
  m.def("instruction_set(Tensor any) -> int");
  m.def("advise_huge_pages(Tensor fresh) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  m.impl("fused", TORCH_BOX(&kd::fused));
  m.impl("accumulate", TORCH_BOX(&kd::accumulate));
  m.impl("accumulate_value", TORCH_BOX(&kd::accumulate_value));
  m.impl("gradient", TORCH_BOX(&kd::gradient));
  m.impl("fused_sparse", TORCH_BOX(&kd::fused_sparse));
  m.impl("instruction_set", TORCH_BOX(&kd::instruction_set));
  m.impl("advise_huge_pages", TORCH_BOX(&kd::advise_huge_pages));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
