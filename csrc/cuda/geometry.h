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
//
// A kernel that holds its row in registers (held.cuh) is laid out by held(): there shared memory is where the
// next rows wait.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>

namespace kd {

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 16, kPortableCluster = 8;
constexpr int kReserved = 12 * 1024;  // bytes before the slices: SharedMemory (staging.cuh)
// With kReserved: a multiprocessor of sm_90 has room for two such blocks, in its registers as well.
constexpr int kSlice = 100 * 1024;
constexpr int kSpanUnit = 256;  // a warp's columns are a multiple of what it takes at once
constexpr int kMaxChunks = 16;
constexpr int kChunk = 1024;  // columns that are copied at once, or more where kMaxChunks would not do
// How many numbers a lane holds (held.cuh), a pair of logits being two, a logit without a teacher one. A
// multiprocessor has registers for sixteen such warps, one of which holds nothing.
constexpr int kHeldNumbers = 80;
// What held.cuh has in shared memory beside the rows, and of every warp of the cluster.
constexpr int kHeldMemory = 256, kHandedOver = 48;

struct Chip {
  int multiprocessors = 0;
  int64_t shared_bytes = 0;  // that one block can have
  int largest_cluster = 1;   // 1: no clusters and no bulk copies
};

struct Geometry {
  int cluster = 1, warps = 1;
  int span = 0, chunk = 0;  // columns of a warp, and of one of its copies
  int stages = 1;           // rows that shared memory has room for
  bool held = false;        // by a kernel that holds its row in registers (held.cuh)
  bool student_resident = false, teacher_resident = false;
  int bytes_per_warp = 0;
  int outcomes_at = kReserved, slices_at = kReserved;  // in shared memory

  // Kernels that hold their rows have a warp beside those that have columns.
  int threads() const { return (warps + held) * 32; }
  int64_t shared_bytes() const { return slices_at + (int64_t)stages * warps * bytes_per_warp; }
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

// Where rows are too few to fill the chip, clusters are larger.
inline int least_cluster(int64_t width, int64_t rows, int portable, const Chip& chip) {
  int least = 1;
  while (least < portable && rows * least < chip.multiprocessors && width > (int64_t)least * 8 * kSpanUnit)
    least *= 2;
  return least;
}

// `teacher_bytes` 0: there is none. `outcome_bytes`: what a sparse target needs of each block.
inline Geometry geometry(int64_t width, int64_t rows, int student_bytes, int teacher_bytes,
                         int64_t outcome_bytes, const Chip& chip) {
  const int portable = std::min(chip.largest_cluster, kPortableCluster);
  const int least = least_cluster(width, rows, portable, chip);
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

// The row in registers, if it fits: every warp has as many columns as it can hold, and no more warps are
// taken than it needs.
inline std::optional<Geometry> held(int64_t width, int64_t rows, int student_bytes, int teacher_bytes,
                                    const Chip& chip) {
  const int portable = std::min(chip.largest_cluster, kPortableCluster);
  Geometry g;
  g.held = g.student_resident = true;
  g.teacher_resident = teacher_bytes > 0;
  g.span = g.chunk = 32 * kHeldNumbers / (teacher_bytes ? 2 : 1);
  g.bytes_per_warp = g.span * (student_bytes + teacher_bytes);
  g.cluster = std::max(2, least_cluster(width, rows, portable, chip));  // a block alone cannot send
  for (; g.cluster <= portable; g.cluster *= 2) {
    const int64_t warps = (width - 1) / ((int64_t)g.cluster * g.span) + 1;
    if (warps > kMaxWarps - 1) continue;
    g.warps = (int)warps;
    g.slices_at = (int)rounded_up(kReserved + kHeldMemory + 2 * kHandedOver * (g.cluster * g.warps + 1), 128);
    for (g.stages = 2; g.stages > 0; --g.stages)
      if (g.shared_bytes() <= chip.shared_bytes) return g;
  }
  return {};
}

}  // namespace kd
