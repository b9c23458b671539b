// How the kernel is launched, without torch and without CUDA's own types.
#pragma once

#include "../entry.h"
#include "../job.h"
#include "geometry.h"

namespace kd {

// What the kernels were compiled for that run on the current device (90: sm_90), 0: none do.
int architecture();

// Enqueues `entry` for `rows` rows on `stream`. `device` must be the current device, and `stream` one of
// its own. Throws std::runtime_error where CUDA refuses or the job is too large for the kernel.
void launch(const Job& job, Entry entry, int64_t rows, int device, void* stream);

}  // namespace kd
