// csrc/cuda/runtime.h for a host: a chip that a test describes, and a launch that runs every fiber.
#pragma once

#include <functional>
#include <type_traits>

#include "geometry.h"

namespace kd::runtime {

// Few clusters at once, so that each has several rows.
extern Chip host_chip;
extern int host_clusters;

// Runs `thread` once for every thread of every block.
void run(int blocks, int threads, int cluster, int64_t shared_bytes, const std::function<void()>& thread);

inline Chip chip(const void*, int) { return host_chip; }
inline int architecture(const void*) { return 90; }
inline int resident_clusters(const void*, const Geometry& g) {
  return g.cluster <= host_chip.largest_cluster && g.shared_bytes() <= host_chip.shared_bytes ? host_clusters
                                                                                              : 0;
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), int blocks, const Geometry& g, void*,
            const std::type_identity_t<Arguments>&... arguments) {
  run(blocks, g.threads(), g.cluster, g.shared_bytes(), [&] { kernel(arguments...); });
}

}  // namespace kd::runtime
