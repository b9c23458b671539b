// The operators of the CUDA backend on CPU tensors, by the fibers of fibers.cpp, and the chip that tests
// describe.
#define Py_LIMITED_API 0x030a0000
#include <Python.h>

#include "cuda/launch.h"
#include "cuda/platform.cuh"
#include "cuda/runtime.h"
#include "operators.h"

namespace kd {
namespace {

struct Host {
  static void run(Entry entry, const Job& job, int64_t rows, const Tensor&) {
    launch(job, entry, rows, 0, nullptr);
  }
};

void set_chip(int64_t multiprocessors, int64_t shared_bytes, int64_t largest_cluster, int64_t clusters) {
  runtime::host_chip = {(int)multiprocessors, shared_bytes, (int)largest_cluster};
  runtime::host_clusters = (int)clusters;
}

void set_mutation(int64_t number) { host::mutation = (int)number; }

// cluster, warps, span, chunk, student resident, teacher resident, bytes of shared memory. Zeros: the row
// cannot be held in registers.
void geometry_of(bool in_registers, int64_t width, int64_t rows, int64_t student_bytes, int64_t teacher_bytes,
                 const Tensor& out) {
  Geometry g;
  if (in_registers) {
    const auto found = held(width, rows, (int)student_bytes, (int)teacher_bytes, runtime::host_chip);
    if (!found) return;
    g = *found;
  } else {
    g = geometry(width, rows, (int)student_bytes, (int)teacher_bytes, 0, runtime::host_chip);
  }
  const int64_t found[] = {g.cluster,          g.warps,         g.span, g.chunk, g.student_resident,
                           g.teacher_resident, g.shared_bytes()};
  STD_TORCH_CHECK(out.numel() == 7 && out.scalar_type() == ScalarType::Long, "seven numbers");
  std::memcpy(out.data_ptr(), found, sizeof found);
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY(kdkernels_cuda_host, m) {
  kd::define_operators(m);
  m.def("set_chip(int multiprocessors, int shared_bytes, int largest_cluster, int clusters) -> ()");
  m.def("set_mutation(int number) -> ()");
  m.def(
      "geometry(bool in_registers, int width, int rows, int student_bytes, int teacher_bytes, Tensor(a!) "
      "out) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda_host, CPU, m) { kd::implement_operators<kd::Host>(m); }

STABLE_TORCH_LIBRARY_IMPL(kdkernels_cuda_host, CompositeExplicitAutograd, m) {
  m.impl("set_chip", TORCH_BOX(&kd::set_chip));
  m.impl("set_mutation", TORCH_BOX(&kd::set_mutation));
  m.impl("geometry", TORCH_BOX(&kd::geometry_of));
}

extern "C" PyMODINIT_FUNC PyInit_kdkernels_cuda_host(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "kdkernels_cuda_host", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
