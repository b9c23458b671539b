// The entry points of a backend (kdkernels/backends/protocol.py).
#pragma once

namespace kd {
enum class Entry { kFused, kAccumulate, kAccumulateValue, kGradient, kFusedSparse };
}  // namespace kd
