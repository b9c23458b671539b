// How a row is laid over a cluster of blocks: a pure function of its width, its types and the chip.
//
// A row stays on the chip, in the blocks' shared memory, where it fits there. The first of these that holds
// both sides is taken:
// 1. the smallest cluster whose blocks need at most kSlice bytes: then several blocks share a multiprocessor,
//    and one's copies cover another's arithmetic and barriers;
// 2. the largest portable cluster;
// 3. the largest cluster that the chip has.
// Of a row too wide for that the student alone stays on the chip, by the same rules. Of a still wider one,
// and where the chip has no clusters, nothing does.
#pragma once

#include <algorithm>
#include <cstdint>

namespace kd {

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 16, kPortableCluster = 8;
constexpr int kReserved = 12 * 1024;  // bytes before the slices: SharedMemory (staging.cuh)
// With kReserved: a multiprocessor of sm_90 has room for two such blocks, in its registers as well.
constexpr int kSlice = 100 * 1024;
constexpr int kSpanUnit = 256;  // a warp's columns are a multiple of what it takes at once
constexpr int kMaxChunks = 16;
constexpr int kChunk = 1024;  // columns that are copied at once, or more where kMaxChunks would not do

struct Chip {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // that one block can have
  int largest_cluster = 1;   // 1: no clusters and no bulk copies
};

struct Geometry {
  int cluster = 1, warps = 1;
  int span = 0, chunk = 0;  // columns of a warp, and of one of its copies
  bool student_resident = false, teacher_resident = false;
  int bytes_per_warp = 0;
  int outcomes_at = kReserved, slices_at = kReserved;  // in shared memory

  int threads() const { return warps * 32; }
  int64_t shared_bytes() const { return slices_at + (int64_t)warps * bytes_per_warp; }
};

inline int64_t rounded_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// The row over `cluster` blocks of at most `warps` warps, `bytes` of each column on the chip.
inline Geometry laid_out(int64_t width, int cluster, int warps, int bytes, int64_t outcome_bytes) {
  Geometry g;
  g.slices_at += (int)outcome_bytes;
  g.cluster = cluster;
  g.warps = (int)std::min<int64_t>(warps, (width + cluster * kSpanUnit - 1) / (cluster * kSpanUnit));
  g.span = (int)rounded_up((width + cluster * g.warps - 1) / (cluster * g.warps), kSpanUnit);
  g.chunk = (int)std::max<int64_t>(kChunk, rounded_up((g.span + kMaxChunks - 1) / kMaxChunks, 2 * kSpanUnit));
  g.bytes_per_warp = g.span * bytes;
  return g;
}

// `teacher_bytes` 0: there is none. `outcome_bytes`: what a sparse target needs of each block. `rows`: where
// they are too few to fill the chip, clusters are larger.
inline Geometry geometry(int64_t width, int64_t rows, int student_bytes, int teacher_bytes,
                         int64_t outcome_bytes, const Chip& chip) {
  const int portable = std::min(chip.largest_cluster, kPortableCluster);
  int least = 1;
  while (least < portable && rows * least < chip.multiprocessors && width > (int64_t)least * 8 * kSpanUnit)
    least *= 2;
  const int sides = teacher_bytes ? 2 : 1;
  for (int resident = chip.largest_cluster > 1 ? sides : 0; resident > 0; --resident) {
    const int bytes = student_bytes + (resident == 2 ? teacher_bytes : 0);
    auto found = [&](Geometry g) {
      g.student_resident = true;
      g.teacher_resident = resident == 2;
      return g;
    };
    for (int cluster = least; cluster <= portable; cluster *= 2) {
      const Geometry g = laid_out(width, cluster, 8, bytes, outcome_bytes);
      if (g.shared_bytes() <= std::min<int64_t>(kReserved + kSlice, chip.shared_bytes)) return found(g);
    }
    for (int cluster = portable; cluster <= chip.largest_cluster; cluster *= 2) {
      const Geometry g = laid_out(width, cluster, kMaxWarps, bytes, outcome_bytes);
      if (g.shared_bytes() <= chip.shared_bytes) return found(g);
    }
  }
  return laid_out(width, portable, kMaxWarps, 0, outcome_bytes);
}

}  // namespace kd
