// csrc/cuda/platform.cuh for a host: a CUDA thread is a fiber, and all blocks of a cluster run side by side.
//
// What a GPU leaves open is made as bad as it may be: shared memory starts as NaN, a bulk copy happens
// either at once or only when it is waited for, turn about, and what waits in vain fails the launch.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#define KD_DEVICE inline __attribute__((always_inline))
#define KD_KERNEL(threads) void
#define KD_GRID_CONSTANT

struct uint4 {
  uint32_t x, y, z, w;
} __attribute__((aligned(16)));

namespace kd {

constexpr bool kAsync = true;

// The fibers' side (fibers.cpp). Every function here is called by a fiber, and acts on its thread.
namespace host {
extern int mutation;  // which of the tests' mutations is awake
int thread_index();
int block_threads();
int block_index();
int cluster_blocks();
char* shared_memory(int rank_in_cluster);
void meet_warp();
void meet_block();
void meet_cluster();
void reach_block(int rank);
// The warp's 32 values: each thread puts its own, and sees all after.
uint64_t* exchange(uint64_t mine);
}  // namespace host

KD_DEVICE int thread_index() { return host::thread_index(); }
KD_DEVICE int block_threads() { return host::block_threads(); }
KD_DEVICE int block_index() { return host::block_index(); }
KD_DEVICE int cluster_rank() { return host::block_index() % host::cluster_blocks(); }
KD_DEVICE char* shared_memory() { return host::shared_memory(cluster_rank()); }
KD_DEVICE void sync_warp() { host::meet_warp(); }
KD_DEVICE void sync_block() { host::meet_block(); }
KD_DEVICE void sync_cluster(bool) { host::meet_cluster(); }

template <class T>
inline T from_lane(T value, int lane) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  const uint64_t theirs = host::exchange(bits)[lane];
  host::meet_warp();
  std::memcpy(&value, &theirs, sizeof value);
  return value;
}
template <class T>
inline T from_lane_xor(T value, int bits) {
  return from_lane(value, (thread_index() % kWarp) ^ bits);
}
inline unsigned lanes_where(bool condition) {
  const uint64_t* all = host::exchange(condition);
  unsigned mask = 0;
  for (int i = 0; i < kWarp; ++i) mask |= (unsigned)all[i] << i;
  host::meet_warp();
  return mask;
}
inline int lowest_of_warp(int value) {
  const uint64_t* all = host::exchange((uint64_t)(int64_t)value);
  int least = value;
  for (int i = 0; i < kWarp; ++i) least = (int)(int64_t)all[i] < least ? (int)(int64_t)all[i] : least;
  host::meet_warp();
  return least;
}
inline int lowest_bit(unsigned mask) { return __builtin_ffs((int)mask) - 1; }

// The hardware's errs by up to two units in the last place, but not at 0; so does this, as the argument
// decides.
inline float fast_exp2(float x) {
  const float y = exp2f(x);
  if (y < 1.17549435e-38f) return 0.0f;
  if (x == 0 || !(y < std::numeric_limits<float>::infinity())) return y;
  const int error = (int)((__builtin_bit_cast(uint32_t, x) * 2654435769u >> 16) % 5) - 2;
  return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, y) + error);
}

inline float from_half(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return (float)h;
}
inline uint32_t half_bits(float x) {
  const _Float16 h = (_Float16)x;
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline uint32_t bfloat16_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return bfloat16_bits(low) | bfloat16_bits(high) << 16;
}
inline uint32_t pack_half(float low, float high) { return half_bits(low) | half_bits(high) << 16; }

inline float from_bfloat16(uint32_t bits) { return __builtin_bit_cast(float, bits << 16); }
inline uint32_t highest_bfloat16x2(uint32_t a, uint32_t b) {
  return pack_bfloat16(fmaxf(from_bfloat16(a & 0xffff), from_bfloat16(b & 0xffff)),
                       fmaxf(from_bfloat16(a >> 16), from_bfloat16(b >> 16)));
}

inline void store_streaming(void* to, uint4 value) { *(uint4*)to = value; }

// The same place in another block's memory.
template <class T>
inline T* in_block(T* mine, int rank) {
  host::reach_block(rank);
  return (T*)(host::shared_memory(rank) + ((char*)mine - shared_memory()));
}

// A phase is complete when its arrivals have come and no bytes are outstanding.
struct Barrier {
  uint64_t word;
};
namespace host {
struct Phase {
  uint32_t parity = 0;
  int arrivals = 1, pending = 1;
  int64_t bytes = 0;
};
Phase& phase(Barrier& barrier);
void start_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier);
void finish_copies(Barrier& barrier);
void wait_for_phase(Barrier& barrier, uint32_t parity);
void settle(Phase& phase);
void arrive_once(Phase& phase);
}  // namespace host

inline void init(Barrier& barrier, int arrivals = 1) {
  host::phase(barrier) = {.arrivals = arrivals, .pending = arrivals};
}
inline void publish_barriers() {}
inline void fence_before_copies() {}
inline void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  host::Phase& phase = host::phase(barrier);
  host::arrive_once(phase);
  phase.bytes += bytes;
  host::settle(phase);
}
inline void arrive(Barrier& barrier) { arrive_expecting(barrier, 0); }
// At once. Bytes may come before the arrival that expects them.
inline void send(void* mine, uint4 value, Barrier& barrier, int rank) {
  *in_block((uint4*)mine, rank) = value;
  host::Phase& phase = host::phase(*in_block(&barrier, rank));
  phase.bytes -= sizeof value;
  host::settle(phase);
}
inline void wait(Barrier& barrier, uint32_t parity) { host::wait_for_phase(barrier, parity); }
inline void bulk_copy(void* to, const void* from, uint32_t bytes, Barrier& barrier) {
  host::start_copy(to, from, bytes, barrier);
}

}  // namespace kd
