// torch's side of the CPU backend: which row loops, and threads. Stable ABI, Python's limited API.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>

#include <cstdlib>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/row_loops.h"
#include "operators.h"

namespace kd {

const RowLoops& row_loops_baseline();
#if defined(__x86_64__) || defined(_M_X64)
const RowLoops& row_loops_avx2();
const RowLoops& row_loops_avx512();
const RowLoops& row_loops_avx512bf16();
#endif

namespace {

// The last is AVX-512 with an instruction that rounds to bf16.
constexpr const char* kInstructionSets[] = {"baseline", "avx2", "avx512", "avx512bf16"};

// As its place in kInstructionSets.
int best_instruction_set() {
  int best = 0;
#if defined(__x86_64__) || defined(_M_X64)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"))
    best = 1;
  if (best && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    best = 2;
  if (best == 2 && __builtin_cpu_supports("avx512bf16")) best = 3;
#endif
  return best;
}

// The best, or what KDKERNELS_ISA asks for.
int chosen_instruction_set() {
  const int best = best_instruction_set();
  const char* asked = std::getenv("KDKERNELS_ISA");
  if (asked == nullptr || *asked == 0) return best;
  for (int i = 0; i <= best; ++i)
    if (std::strcmp(asked, kInstructionSets[i]) == 0) return i;
  STD_TORCH_CHECK(false, "kdkernels: KDKERNELS_ISA=", asked, ", but on this machine there are baseline to ",
                  kInstructionSets[best], " (of baseline, avx2, avx512, avx512bf16)");
}

int64_t instruction_set(const Tensor&) {
  static const int64_t chosen = chosen_instruction_set();
  return chosen;
}

const RowLoops& loops(const Tensor& any) {
#if defined(__x86_64__) || defined(_M_X64)
  if (instruction_set(any) == 3) return row_loops_avx512bf16();
  if (instruction_set(any) == 2) return row_loops_avx512();
  if (instruction_set(any) == 1) return row_loops_avx2();
#endif
  return row_loops_baseline();
}

auto loop_of(Entry entry, const RowLoops& loops) {
  switch (entry) {
    case Entry::kFused:
      return loops.fused;
    case Entry::kAccumulate:
      return loops.accumulate;
    case Entry::kAccumulateValue:
      return loops.accumulate_value;
    case Entry::kGradient:
      return loops.gradient;
    default:
      return loops.fused_sparse;
  }
}

struct Cpu {
  static void run(Entry entry, const Job& job, int64_t rows, const Tensor& like) {
    STD_TORCH_CHECK(like.is_cpu(), "kdkernels: expected CPU tensors");
    const auto loop = loop_of(entry, loops(like));
    torch::stable::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { loop(job, begin, end); });
  }
};

Columns columns_of(const Tensor& gradient) {
  STD_TORCH_CHECK(gradient.is_cpu() && gradient.dim() == 2 && gradient.stride(1) == 1,
                  "kdkernels: expected rows on the CPU with adjacent columns");
  Columns of;
  of.gradient = {(char*)gradient.data_ptr(), dtype_of(gradient), gradient.stride(0)};
  of.rows = gradient.size(0);
  of.width = gradient.size(1);
  return of;
}

// squares [width], fp64 and zeroed: of each column.
void column_squares(const Tensor& gradient, const Tensor& squares) {
  Columns of = columns_of(gradient);
  STD_TORCH_CHECK(
      squares.scalar_type() == ScalarType::Double && squares.is_contiguous() && squares.numel() == of.width,
      "kdkernels: expected a number in fp64 for each column");
  of.squares = (double*)squares.data_ptr();
  const auto loop = loops(gradient).column_squares;
  torch::stable::parallel_for(0, of.width, 4096, [&](int64_t begin, int64_t end) { loop(of, begin, end); });
}

// The columns `ids` to the front of their rows; rest [rows], fp32: each row's sum over the others.
void gather_columns(const Tensor& gradient, const Tensor& ids, const Tensor& rest) {
  Columns of = columns_of(gradient);
  STD_TORCH_CHECK(ids.scalar_type() == ScalarType::Long && ids.is_contiguous() && ids.numel() <= of.width,
                  "kdkernels: expected int64 columns");
  STD_TORCH_CHECK(rest.scalar_type() == ScalarType::Float && rest.is_contiguous() && rest.numel() == of.rows,
                  "kdkernels: expected a number in fp32 for each row");
  of.ids = (const int64_t*)ids.data_ptr();
  of.kept = ids.numel();
  of.rest = (float*)rest.data_ptr();
  const auto loop = loops(gradient).gather_columns;
  torch::stable::parallel_for(0, of.rows, 1, [&](int64_t begin, int64_t end) { loop(of, begin, end); });
}

// Asks Linux for huge pages under `fresh`, which nobody has written yet: fewer faults. Only pages of 2 MiB
// that lie wholly inside it; a small tensor has none.
void advise_huge_pages(const Tensor& fresh) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHuge = uintptr_t{1} << 21;
  int64_t entry = 0;
  switch (fresh.scalar_type()) {
    case ScalarType::Double:
      entry = 8;
      break;
    case ScalarType::Float:
      entry = 4;
      break;
    default:
      entry = 2;
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
  kd::define_operators(m);
  m.def("instruction_set(Tensor any) -> int");
  m.def("compute_capability(Tensor any) -> int");
  m.def("advise_huge_pages(Tensor fresh) -> ()");
  m.def("column_squares(Tensor gradient, Tensor squares) -> ()");
  m.def("gather_columns(Tensor gradient, Tensor ids, Tensor rest) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CPU, m) {
  kd::implement_operators<kd::Cpu>(m);
  m.impl("instruction_set", TORCH_BOX(&kd::instruction_set));
  m.impl("advise_huge_pages", TORCH_BOX(&kd::advise_huge_pages));
  m.impl("column_squares", TORCH_BOX(&kd::column_squares));
  m.impl("gather_columns", TORCH_BOX(&kd::gather_columns));
}

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
