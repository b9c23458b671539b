// fp32 to and from the types of memory, a block at a time. Rounding is to nearest even.
#pragma once

#include "../vec.h"
#include "row_loops.h"

namespace kd {
namespace KD_ISA {

KD_HD Vec from_bfloat16(const uint16_t* p) {
  Halves h;
  std::memcpy(&h, p, sizeof h);
  return (Vec)(__builtin_convertvector(h, Ints) << 16);
}

KD_HD Halves to_bfloat16(Vec v) {
  typedef uint32_t Words __attribute__((vector_size(kLanes * 4)));
  const Words bits = (Words)v;
  const Words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const Words quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(v == v ? rounded : quiet, Halves);
}

#if defined(__AVX512F__)
KD_HD Vec from_half(const uint16_t* p) { return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
KD_HD Halves to_half(Vec v) { return (Halves)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT); }
#elif defined(__AVX2__)
KD_HD Vec from_half(const uint16_t* p) { return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
KD_HD Halves to_half(Vec v) { return (Halves)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT); }
#else
KD_HD Vec from_half(const uint16_t* p) {
  Vec v;
  for (int i = 0; i < kLanes; ++i) {
    _Float16 h;
    std::memcpy(&h, p + i, 2);
    v[i] = (float)h;
  }
  return v;
}
KD_HD Halves to_half(Vec v) {
  Halves out;
  for (int i = 0; i < kLanes; ++i) {
    const _Float16 h = (_Float16)v[i];
    uint16_t bits;
    std::memcpy(&bits, &h, 2);
    out[i] = bits;
  }
  return out;
}
#endif

// The last, partial vector goes through a full one on the stack: no entry past n is touched.
template <class Convert>
KD_HD void load_halves(const uint16_t* p, int n, float* out, Convert convert) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) store(out + i, convert(p + i));
  if (i == n) return;
  uint16_t tail[kLanes] = {};
  std::memcpy(tail, p + i, (n - i) * 2);
  store(out + i, convert(tail));
}

template <class Convert>
KD_HD void store_halves(const float* g, int n, uint16_t* out, Convert convert) {
  int i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    const Halves h = convert(load(g + i));
    std::memcpy(out + i, &h, sizeof h);
  }
  if (i == n) return;
  const Halves h = convert(load(g + i));
  std::memcpy(out + i, &h, (n - i) * 2);
}

inline void load_floats(const char* row, DType dtype, int64_t start, int n, float* out) {
  const uint16_t* halves = (const uint16_t*)row + start;
  if (dtype == kFloat)
    std::memcpy(out, (const float*)row + start, n * sizeof(float));
  else if (dtype == kBFloat16)
    load_halves(halves, n, out, [](const uint16_t* p) { return from_bfloat16(p); });
  else
    load_halves(halves, n, out, [](const uint16_t* p) { return from_half(p); });
}

inline void store_floats(const float* g, int n, char* row, DType dtype, int64_t start) {
  uint16_t* halves = (uint16_t*)row + start;
  if (dtype == kFloat)
    std::memcpy((float*)row + start, g, n * sizeof(float));
  else if (dtype == kBFloat16)
    store_halves(g, n, halves, [](Vec v) { return to_bfloat16(v); });
  else
    store_halves(g, n, halves, [](Vec v) { return to_half(v); });
}

}  // namespace KD_ISA
}  // namespace kd
