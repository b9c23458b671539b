// The few calls of the CUDA runtime: what a device is, what fits on it, and the launch. Host code.
#pragma once

#if defined(KD_CUDA_HOST)

#include "runtime_host.h"

#else

#include <cuda_runtime.h>

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

inline Chip chip(int device) {
  Chip c;
  c.multiprocessors = attribute(cudaDevAttrMultiProcessorCount, device);
  c.shared_bytes = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  c.largest_cluster = attribute(cudaDevAttrComputeCapabilityMajor, device) >= 9 ? kMaxCluster : 1;
  return c;
}

// Of the machine code that this device would run, 0 where there is none for it.
inline int architecture(const void* kernel) {
  cudaFuncAttributes found{};
  if (cudaFuncGetAttributes(&found, kernel) == cudaSuccess) return found.binaryVersion;
  cudaGetLastError();
  return 0;
}

// A launch of `blocks` blocks; `attributes` is the memory for its one attribute.
inline cudaLaunchConfig_t config(int blocks, const Geometry& g, void* stream, cudaLaunchAttribute* attributes) {
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

// How many clusters the current device holds at once; 0: not one. Allows the kernel its shared memory.
inline int resident_clusters(const void* kernel, const Geometry& g) {
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)g.shared_bytes()),
        "shared memory of the kernel");
  int device = 0, found = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  if (g.cluster == 1) {
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&found, kernel, g.threads(), (size_t)g.shared_bytes()),
          "occupancy of the kernel");
    return found * attribute(cudaDevAttrMultiProcessorCount, device);
  }
  if (g.cluster > kPortableCluster)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of the kernel");
  cudaLaunchAttribute attributes;
  const cudaLaunchConfig_t c = config(g.cluster, g, nullptr, &attributes);
  if (cudaOccupancyMaxActiveClusters(&found, kernel, &c) == cudaSuccess) return found;
  cudaGetLastError();
  return 0;
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
