// A row's logits on the chip: each warp copies its own columns into its own part of shared memory.
//
// The slice of a warp is cut into chunks, each with a barrier. The first pass waits for a chunk. The last
// one, having written the chunk's gradient, asks for the same columns of the warp's next row: copies are
// under way while the rest of this row is computed, and warps never wait for each other. The lanes themselves
// copy the few columns after the last 16 bytes, and rows whose sides do not begin equally far after 16 bytes.
// A copy from place 0 on reads what is before the row in those 16 bytes, another row's at worst; nobody looks
// at it.
#pragma once

#include "coefficients.cuh"
#include "geometry.h"
#include "row_io.cuh"

namespace kd {

// What is solved of a sparse target between the passes (sparse.cuh).
struct Solved {
  Normaliser at_1;  // the student's at temperature 1, stored ids included
  double rest;      // the gradient for the rest as a whole
  double results[kResults];
};

// What of a state changes hands in the common case: three sums, and what they are relative to.
struct Parts {
  double sums[3] = {};
  float student = (float)kNoReference, teacher = (float)kNoReference;
};
constexpr int kPartWords = sizeof(Parts) / sizeof(double);

// A block's memory before the slices.
struct SharedMemory {
  RowState warps[kMaxWarps];           // of this block
  RowState parts[2][kMaxCluster + 1];  // of the cluster's blocks, and what was there before; two turns
  RowState state, added;               // of the row, and of its second pass
  Parts warp_parts[kMaxWarps], block_parts[2][kMaxCluster + 1];  // the same two of the common case
  Coefficients coefficients;
  EntropyPull entropy;  // beside the coefficients, which kernels keep in registers that some have no more of
  Solved solved;        // of a sparse target
  Barrier chunks[kMaxWarps][kMaxChunks];
};
static_assert(sizeof(SharedMemory) <= kReserved && kReserved % 128 == 0);
static_assert(kSpanUnit == kStep);

// The columns of a warp, and how far they are staged.
class Slice {
 public:
  KD_DEVICE Slice(const Job& job, const Geometry& g) : job_(job), lane_(thread_index() % kWarp) {
    const int warp = thread_index() / kWarp;
    begin_ = (cluster_rank() * g.warps + warp) * g.span;
    last_ = begin_ + g.span;
    chunk_ = g.chunk;
    const int slot = g.slices_at + warp * g.bytes_per_warp;
    if (g.student_resident) student_ = slot;
    if (g.teacher_resident)
      teacher_ = slot + g.span * bytes_of(job.student.dtype);  // beside the student, never alone
    if (kAsync && lane_ == 0) {
      for (int i = 0; i < chunks(); ++i) init(barrier(i));
      publish_barriers();
    }
    sync_warp();
  }

  KD_DEVICE int begin() const { return begin_; }
  KD_DEVICE int end(int lead) const { return at_most(width() + lead); }
  KD_DEVICE bool resident() const { return student_ >= 0; }
  KD_DEVICE int chunk_columns() const { return chunk_; }
  // The same for all rows, since a barrier counts its turns.
  KD_DEVICE int chunks() const {
    return resident() ? (at_most(width() + kVector - 1) - begin_ + chunk_ - 1) / chunk_ : 0;
  }
  KD_DEVICE int student() const { return student_; }
  KD_DEVICE int teacher() const { return teacher_; }

  // Asks for chunk `i` of `row`. The caller no longer needs what the chunk held.
  KD_DEVICE void fetch(int i, int row, int lead) {
    const int first = begin_ + i * chunk_, left = end(lead) - first;
    const int n = left <= 0 ? 0 : left < chunk_ ? left : chunk_;
    const char* const student = start_of(job_.student, row, lead);
    const char* const teacher = start_of(job_.teacher, row, lead);
    fence_before_copies();
    sync_warp();
    const uint32_t bytes =
        whole(job_.student, student, student_, n) + whole(job_.teacher, teacher, teacher_, n);
    if (lane_ == 0) arrive_expecting(barrier(i), bytes);
    copy(job_.student, student, student_, first, n, i);
    copy(job_.teacher, teacher, teacher_, first, n, i);
  }

  // Waits until chunk `i`, fetched for the `turn`-th time (0, 1, ...), is there.
  KD_DEVICE void await(int i, int turn) {
    wait(barrier(i), turn & 1);
    sync_warp();
  }

 private:
  KD_DEVICE static Barrier& barrier(int i) {
    return ((SharedMemory*)shared_memory())->chunks[thread_index() / kWarp][i];
  }

  // How many bytes of n columns the copy engine can take.
  KD_DEVICE static uint32_t whole(const Matrix& m, const char* row, int slot, int n) {
    if (slot < 0 || !is_aligned(row)) return 0;
    return (uint32_t)(n * bytes_of(m.dtype)) & ~15u;
  }

  KD_DEVICE void copy(const Matrix& m, const char* row, int slot, int first, int n, int i) {
    if (slot < 0) return;
    const int size = bytes_of(m.dtype);
    const char* from = row + (int64_t)first * size;
    char* to = shared_memory() + slot + (first - begin_) * size;
    const uint32_t bytes = whole(m, row, slot, n);
    if (lane_ == 0 && bytes) bulk_copy(to, from, bytes, barrier(i));
    for (int k = (int)bytes / size + lane_; k < n; k += kWarp) {
      if (size == 4)
        ((uint32_t*)to)[k] = ((const uint32_t*)from)[k];
      else
        ((uint16_t*)to)[k] = ((const uint16_t*)from)[k];
    }
  }

  KD_DEVICE int width() const { return (int)job_.width; }
  // Place `end`, or the bound of this slice that is nearest to it.
  KD_DEVICE int at_most(int end) const { return end < begin_ ? begin_ : end < last_ ? end : last_; }

  const Job& job_;
  int lane_, begin_, last_, chunk_;
  int student_ = -1, teacher_ = -1;  // where the slots begin in shared memory
};

}  // namespace kd
