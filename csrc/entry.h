// The entry points of the waist (kdkernels/backends/__init__.py).
#pragma once

namespace kd {
enum class Entry { kFused, kAccumulate, kAccumulateValue, kGradient, kFusedSparse };
}  // namespace kd
