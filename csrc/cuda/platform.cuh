// What the kernels need of a GPU beyond C++: lanes of a warp, shared memory, clusters, bulk copies.
//
// Everything that is not plain CUDA C++ is here. tests/support/cuda_host/platform_host.h has the same names
// for a host, where a thread is a fiber, so that the kernels' own source runs without a GPU. Clusters, bulk
// copies and mbarriers exist from sm_90 on (kAsync). Below, a cluster is one block.
#pragma once

#include <cstdint>

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#if defined(KD_CUDA_HOST)

#include "platform_host.h"

#else

#include <cuda_runtime.h>

#define KD_DEVICE __device__ __forceinline__
#define KD_KERNEL(threads) __global__ void __launch_bounds__(threads, 1)
#define KD_GRID_CONSTANT __grid_constant__

namespace kd {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kAsync = true;
#else
constexpr bool kAsync = false;
#endif

KD_DEVICE int thread_index() { return (int)threadIdx.x; }
KD_DEVICE int block_threads() { return (int)blockDim.x; }
KD_DEVICE int block_index() { return (int)blockIdx.x; }

// The block's memory, 128-byte aligned; its layout is SharedMemory's (staging.cuh).
KD_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char memory[];
  return memory;
}

KD_DEVICE void sync_block() { __syncthreads(); }
KD_DEVICE void sync_warp() { __syncwarp(); }

template <class T>
KD_DEVICE T from_lane(T value, int lane) {
  return __shfl_sync(kAllLanes, value, lane);
}
template <class T>
KD_DEVICE T from_lane_xor(T value, int bits) {
  return __shfl_xor_sync(kAllLanes, value, bits);
}
KD_DEVICE unsigned lanes_where(bool condition) { return __ballot_sync(kAllLanes, condition); }
KD_DEVICE int lowest_of_warp(int value) { return __reduce_min_sync(kAllLanes, value); }
KD_DEVICE int lowest_bit(unsigned mask) { return __ffs((int)mask) - 1; }

// 2^x to 2 ulp, one instruction; subnormals are 0.
KD_DEVICE float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

KD_DEVICE float from_half(uint16_t bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}
// Two rounded to nearest even, `low` in the lower half.
KD_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}
KD_DEVICE uint32_t pack_half(float low, float high) {
  uint32_t packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// The higher of two bf16 each, in both halves of a word. NaN is passed over.
KD_DEVICE uint32_t highest_bfloat16x2(uint32_t a, uint32_t b) {
  uint32_t highest;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(highest) : "r"(a), "r"(b));
  return highest;
}

// For what is written once and not read again here: it leaves L2 to the logits.
KD_DEVICE void store_streaming(void* to, uint4 value) { __stcs((uint4*)to, value); }

KD_DEVICE int cluster_rank() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  int rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}
// Waits for all threads of all blocks of the cluster. `wrote`: what this warp wrote to other blocks is seen
// by them afterwards. A warp that wrote nothing there need not wait until its gradient has arrived in memory.
KD_DEVICE void sync_cluster(bool wrote) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if (wrote)
    asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  else
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}
// Block `rank`'s copy of what `mine` is in this block's shared memory.
template <class T>
KD_DEVICE T* in_block(T* mine, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint64_t theirs;
  asm("mapa.u64 %0, %1, %2;" : "=l"(theirs) : "l"(mine), "r"(rank));
  return (T*)theirs;
#else
  return mine;
#endif
}

KD_DEVICE uint32_t shared_address(const void* p) { return (uint32_t)__cvta_generic_to_shared(p); }

// An mbarrier, used again and again. A use is complete when as many threads have arrived as it was
// initialised with, and the bytes that they announced have been copied or sent. A waiter names the use by its
// parity: 0, 1, 0, 1, ...
struct Barrier {
  uint64_t word;
};

KD_DEVICE void init(Barrier& barrier, int arrivals = 1) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals)
               : "memory");
#endif
}
// Barriers initialised by this thread are seen by the copy engine.
KD_DEVICE void publish_barriers() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}
KD_DEVICE void arrive_expecting(Barrier& barrier, uint32_t bytes) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)),
               "r"(bytes)
               : "memory");
#endif
}
KD_DEVICE void arrive(Barrier& barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
#endif
}
// What other blocks sent is acquired for this block alone. In the memory model's words that is too narrow.
// But no cache stands before shared memory, and the wider scope empties L1 at every wait, a quarter of a
// row's time.
KD_DEVICE void wait(Barrier& barrier, uint32_t parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t done = 0;
  while (!done) {
    asm volatile(
        "{\n.reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(shared_address(&barrier)), "r"(parity)
        : "memory");
  }
#endif
}
// Sixteen bytes into block `rank`'s copy of what `mine` is here. They are among those that its copy of
// `barrier` expects; no other synchronisation is needed.
KD_DEVICE void send(void* mine, uint4 value, Barrier& barrier, int rank) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint32_t to, signal;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(to) : "r"(shared_address(mine)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(signal) : "r"(shared_address(&barrier)), "r"(rank));
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
          to),
      "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w), "r"(signal)
      : "memory");
#endif
}
// This thread's earlier reads and writes of shared memory come before copies that it issues afterwards.
KD_DEVICE void fence_before_copies() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}
// Global to shared; both 16-byte aligned, `bytes` a multiple of 16. Completes on `barrier`.
KD_DEVICE void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          shared_address(to)),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(&barrier))
      : "memory");
#endif
}

}  // namespace kd

#endif
