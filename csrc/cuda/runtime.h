// The few calls of the CUDA runtime: what a device is, what fits on it, and the launch. Host code.
#pragma once

#if defined(KD_CUDA_HOST)

#include "runtime_host.h"

#else

#include <cuda_runtime.h>

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "geometry.h"

namespace kd::runtime {

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string("kdkernels: ") + what + ": " + cudaGetErrorString(error));
}

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), "cudaDeviceGetAttribute");
  return value;
}

// Whether a call of the runtime succeeded. Callers remember a failure as a property of the device. Too little
// memory is none (a kernel's code is loaded at its first use), and is thrown.
inline bool succeeded(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  cudaGetLastError();
  if (error == cudaErrorMemoryAllocation) check(error, what);
  return false;
}

// What the kernel was compiled for, 0 where none of its code runs on the current device. The kernel decides
// what can be launched, not the device: code for sm_80 has no clusters on a newer device either.
inline int architecture(const void* kernel) {
  cudaFuncAttributes found{};
  return succeeded(cudaFuncGetAttributes(&found, kernel), "attributes of the kernel") ? found.ptxVersion : 0;
}

// Every launch needs it, so it is asked once for each device.
inline Chip chip(const void* kernel, int device) {
  static std::mutex mutex;
  static std::map<int, Chip> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  Chip c;
  c.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  c.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  c.largest_cluster = architecture(kernel) >= 90 ? kMaxCluster : 1;
  return known[device] = c;
}

// A launch of `blocks` blocks; `attributes` is the memory for its one attribute.
inline cudaLaunchConfig_t config(int blocks, const Geometry& g, void* stream,
                                 cudaLaunchAttribute* attributes) {
  cudaLaunchConfig_t c{};
  c.gridDim = dim3((unsigned)blocks);
  c.blockDim = dim3((unsigned)g.threads());
  c.dynamicSmemBytes = (size_t)g.shared_bytes();
  c.stream = (cudaStream_t)stream;
  if (g.cluster == 1) return c;
  attributes->id = cudaLaunchAttributeClusterDimension;
  attributes->val.clusterDim = {(unsigned)g.cluster, 1, 1};
  c.attrs = attributes;
  c.numAttrs = 1;
  return c;
}

// How many clusters the current device holds at once; 0: not one. Also allows the kernel all shared memory
// that a block can have, since the limit belongs to the kernel on the device and not to a launch.
inline int resident_clusters(const void* kernel, const Geometry& g) {
  int device = 0, found = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)),
        "shared memory of the kernel");
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                             cudaSharedmemCarveoutMaxShared),
        "shared memory of a multiprocessor");
  if (g.cluster == 1) {
    check(
        cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, g.threads(), (size_t)g.shared_bytes()),
        "occupancy of the kernel");
    return found * attribute(cudaDevAttrMultiProcessorCount, device);
  }
  if (g.cluster > kPortableCluster &&
      !succeeded(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
                 "large clusters of the kernel"))
    return 0;
  cudaLaunchAttribute attributes;
  const cudaLaunchConfig_t c = config(g.cluster, g, nullptr, &attributes);
  return succeeded(cudaOccupancyMaxActiveClusters(&found, kernel, &c), "clusters of the kernel") ? found : 0;
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, const Geometry& g, void* stream,
            const std::type_identity_t<Arguments>&... arguments) {
  cudaLaunchAttribute attributes;
  const cudaLaunchConfig_t c = config(blocks, g, stream, &attributes);
  check(cudaLaunchKernelEx(&c, kernel, arguments...), "launch");
}

}  // namespace kd::runtime

#endif
