// fp32 to and from the types of memory, a block at a time. Rounding is to nearest even.
#pragma once

#include "../vec.h"
#include "row_loops.h"

namespace kd {
namespace KD_ISA {

KD_HD Vec from_bfloat16(const uint16_t* p) {
#if defined(__AVX512BW__)
  // One shuffle puts each half into the upper part of its word.
  alignas(64) static constexpr uint16_t kFrom[32] = {0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,
                                                     5,  6,  6,  7,  7,  8,  8,  9,  9,  10, 10,
                                                     11, 11, 12, 12, 13, 13, 14, 14, 15, 15};
  const __m512i halves = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)p));
  return (Vec)_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, _mm512_load_si512(kFrom), halves);
#elif defined(__AVX2__)
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Ints) << 16);
#endif
}

typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));

// The upper 16 bits of each word.
KD_HD Halves high_halves(Words v) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  const __m256i words = _mm256_srli_epi32((__m256i)v, 16);
  return (Halves)_mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
#else
  return __builtin_convertvector(v >> 16, Halves);
#endif
}

// A NaN stays one: its payload is cut, and might have been rounded up to nothing.
#if defined(__AVX512BF16__)
KD_HD Halves to_bfloat16(Vec v) { return (Halves)_mm512_cvtneps_pbh((__m512)v); }
#else
KD_HD Halves to_bfloat16(Vec v) {
  const Words bits = (Words)v;
  const Words rounded = bits + 0x7fff + ((bits >> 16) & 1), quiet = bits | 0x400000;
  return high_halves(v == v ? rounded : quiet);
}
#endif

#if defined(__AVX512F__)
KD_HD Vec from_half(const uint16_t* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
KD_HD Halves to_half(Vec v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
KD_HD Vec from_half(const uint16_t* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
KD_HD Halves to_half(Vec v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
// By integers, since not every compiler has a type for it. A subnormal's bits are the last ones of a number
// that is just large enough; no fp32 subnormal occurs, which the processor would flush.
KD_HD Vec from_half(const uint16_t* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  const Ints all = __builtin_convertvector(h, Ints), magnitude = (all & 0x7fff) << 13, one = Ints{} + 1;
  const Ints rebias = one * (112 << 23), least = one * (113 << 23);  // 113: 2^-14, the least normal
  const Ints normal = magnitude + rebias, infinite = normal + rebias;
  const Ints subnormal = as_ints(as_vec(magnitude + least) - as_vec(least));
  const Ints finite = magnitude < 0x400 << 13 ? subnormal : normal;
  return as_vec((magnitude < 0x7c00 << 13 ? finite : infinite) | (all & 0x8000) << 16);
}
KD_HD Halves to_half(Vec v) {
  const Ints bits = as_ints(v), magnitude = bits & 0x7fffffff, one = Ints{} + 1;
  const Ints normal = (magnitude - (112 << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  const Ints subnormal = as_ints(as_vec(magnitude) + 0.5f) - as_ints(splat(0.5f));
  const Ints finite = magnitude < 113 << 23 ? subnormal : normal;
  const Ints infinite = magnitude > 0x7f800000 ? one * 0x7e00 : one * 0x7c00;
  return __builtin_convertvector((magnitude < 143 << 23 ? finite : infinite) | ((bits >> 16) & 0x8000),
                                 Halves);
}
#endif

// One vector of a type of memory.
template <DType kDType>
KD_HD Vec read(const char* p) {
  if constexpr (kDType == kFloat) return load((const float*)p);
  if constexpr (kDType == kBFloat16) return from_bfloat16((const uint16_t*)p);
  if constexpr (kDType == kHalf) return from_half((const uint16_t*)p);
}

template <DType kDType>
KD_HD void write(char* p, Vec v) {
  if constexpr (kDType == kFloat) return store((float*)p, v);
  const Halves h = kDType == kBFloat16 ? to_bfloat16(v) : to_half(v);
  std::memcpy(p, &h, sizeof h);
}

// Calls f with a type of memory as a constant.
template <class F>
KD_HD void with_dtype(DType dtype, F&& f) {
  if (dtype == kFloat) return f.template operator()<kFloat>();
  if (dtype == kBFloat16) return f.template operator()<kBFloat16>();
  f.template operator()<kHalf>();
}

// n entries from `start`. The last, partial vector goes through a full one on the stack: no entry past n is
// touched.
inline void load_floats(const char* row, DType dtype, int64_t start, int n, float* out) {
  with_dtype(dtype, [&]<DType kDType>() {
    constexpr int kBytes = bytes_of(kDType);
    const char* from = row + start * kBytes;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) store(out + i, read<kDType>(from + i * kBytes));
    if (i == n) return;
    char tail[kLanes * kBytes] = {};
    std::memcpy(tail, from + i * kBytes, (n - i) * kBytes);
    store(out + i, read<kDType>(tail));
  });
}

inline void store_floats(const float* g, int n, char* row, DType dtype, int64_t start) {
  with_dtype(dtype, [&]<DType kDType>() {
    constexpr int kBytes = bytes_of(kDType);
    char* to = row + start * kBytes;
    int i = 0;
    for (; i + kLanes <= n; i += kLanes) write<kDType>(to + i * kBytes, load(g + i));
    if (i == n) return;
    char tail[kLanes * kBytes];
    write<kDType>(tail, load(g + i));
    std::memcpy(to + i * kBytes, tail, (n - i) * kBytes);
  });
}

}  // namespace KD_ISA
}  // namespace kd
