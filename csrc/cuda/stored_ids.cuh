// A sparse target's stored ids in a warp's slice: which of a step's columns they are, and in which lane.
//
// Ids are ascending with -1 for "none" in between. A step of a warp looks at its ids all at once. A stored
// column costs a few instructions, a step without any costs one look.
#pragma once

#include "row_io.cuh"

namespace kd {

class StoredIds {
 public:
  StoredIds() = default;
  // The ids of the row that lie in columns [begin, end) of a chunk that starts at `offset`.
  KD_DEVICE StoredIds(const int64_t* ids, int64_t slots, int64_t offset, int begin, int end)
      : ids_(ids), offset_(offset), first_((int)slots), last_((int)slots) {
    for (int64_t slot = thread_index() % kWarp; slot < slots; slot += kWarp) {
      if (ids[slot] >= offset + begin && slot < first_) first_ = (int)slot;
      if (ids[slot] >= offset + end && slot < last_) last_ = (int)slot;
    }
    first_ = lowest_of_warp(first_);
    last_ = lowest_of_warp(last_);
  }

  KD_DEVICE bool any_in_row() const { return ids_ != nullptr; }
  KD_DEVICE bool any() const { return first_ < last_; }

  // Calls f(slot, k, mine) for each stored column in [start, start + kStep); `mine` in the lane whose k-th it
  // is.
  template <class F>
  KD_DEVICE void each(int start, F&& f) const {
    const int lane = thread_index() % kWarp;
    for (int64_t base = first_; base < last_; base += kWarp) {
      const int64_t id = base + lane < last_ ? ids_[base + lane] : -1;
      const int64_t at = id - offset_ - start;
      unsigned found = lanes_where(id >= 0 && at >= 0 && at < kStep);
      while (found) {
        const int b = lowest_bit(found);
        found &= found - 1;
        const int column = from_lane((int)at, b);
        f(base + b, column % kVector, column / kVector == lane);
      }
    }
  }

  // Calls f(slot, column) for each of the slice's, spread over the lanes.
  template <class F>
  KD_DEVICE void each_of_slice(F&& f) const {
    for (int64_t slot = first_ + thread_index() % kWarp; slot < last_; slot += kWarp)
      if (ids_[slot] >= 0) f(slot, (int)(ids_[slot] - offset_));
  }

  KD_DEVICE bool contains(int column) const {
    for (int64_t i = first_; i < last_; ++i)
      if (ids_[i] == offset_ + column) return true;
    return false;
  }

 private:
  const int64_t* ids_ = nullptr;
  int64_t offset_ = 0;
  int first_ = 0, last_ = 0;
};

}  // namespace kd
