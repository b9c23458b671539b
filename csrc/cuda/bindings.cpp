// torch's side of the CUDA backend: the stream, and architectures. Operators and schemas are the CPU's.
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030a0000
#endif
#include <Python.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../operators.h"
#include "launch.h"

// Exported by every CUDA build of torch; the header hides it from builds without CUDA's own headers.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace kd {
namespace {

struct Cuda {
  static void run(Entry entry, const Job& job, int64_t rows, const Tensor& like) {
    const int32_t device = like.get_device_index();
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0,
                    "kdkernels: no current CUDA stream");
    launch(job, entry, rows, device, stream);
  }
};

int64_t compute_capability(const Tensor& any) {
  const torch::stable::accelerator::DeviceGuard guard(any.get_device_index());
  return architecture();
}

}  // namespace
}  // namespace kd

STABLE_TORCH_LIBRARY_IMPL(kdkernels_native, CUDA, m) {
  kd::implement_operators<kd::Cuda>(m);
  m.impl("compute_capability", TORCH_BOX(&kd::compute_capability));
}

extern "C" PyMODINIT_FUNC PyInit__cuda(void) {
  static PyModuleDef module = {
      PyModuleDef_HEAD_INIT, "_cuda", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
