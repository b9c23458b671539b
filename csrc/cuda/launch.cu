// Which kernel, over which geometry, how many clusters.
#include <map>
#include <mutex>
#include <tuple>

#include "kernel.cuh"
#include "launch.h"
#include "runtime.h"

namespace kd {
namespace {

// Null where there is none: not every divergence can be computed from what is held.
template <class Types>
Kernel kernel_of(const Job& job) {
  Kernel found = nullptr;
  with_kind(job.spec.kind, job.teacher.data != nullptr, [&]<Kind kKind, class Divergence>() {
    if constexpr (Types::kHeld == 0 || kCanHold<Divergence>) found = &rows_kernel<kKind, Divergence, Types>;
  });
  return found;
}

bool is_absent_or(DType dtype, const Matrix& m) { return m.data == nullptr || m.dtype == dtype; }

bool is_mapped(const Spec& s) {
  return s.student_scale != 1 || s.student_softcap != 0 || s.teacher_scale != 1 || s.teacher_softcap != 0;
}

PassFlags flags_of(const Spec& spec) {
  PassFlags flags;
  flags.soft = spec.asks(kSoft);
  flags.label = spec.asks(kLabel);
  flags.smooth = spec.asks(kSmooth);
  flags.teacher_label = spec.asks(kTeacherLabel);
  flags.hard = spec.asks_hard();
  flags.hard_t1 = flags.hard && spec.tempered;
  flags.teacher_t1 = flags.teacher_label && spec.tempered;
  flags.shifts = spec.sums_shifts();
  flags.stats = spec.stats;
  return flags;
}

// The common case (row_io.cuh).
bool is_lean(const Job& job, const PassFlags& flags) {
  return !(flags.shifts || flags.smooth || flags.hard_t1 || flags.teacher_label) && !is_mapped(job.spec) &&
         job.teacher_grad.data == nullptr && job.sparse.ids == nullptr;
}

// Whether all rows begin at a multiple of 16 bytes.
bool rows_are_aligned(const Matrix& m, int64_t rows) {
  return m.data == nullptr || (is_aligned(m.data) && (rows == 1 || m.stride * bytes_of(m.dtype) % 16 == 0));
}

// How many places (row_io.cuh) a row takes at most.
int64_t places(const Job& job, int64_t rows) {
  const bool aligned = rows_are_aligned(job.student, rows) && rows_are_aligned(job.teacher, rows) &&
                       rows_are_aligned(job.grad, rows) && rows_are_aligned(job.teacher_grad, rows);
  return aligned ? job.width : job.width + kVector - 1;
}

// Whether the two are aligned, or begin equally far after a multiple of 16 bytes in every row.
bool begin_alike(const Matrix& a, const Matrix& b, int64_t rows) {
  if (a.data == nullptr || (rows_are_aligned(a, rows) && rows_are_aligned(b, rows))) return true;
  const int64_t size = bytes_of(a.dtype);
  return size == bytes_of(b.dtype) && ((int64_t)a.data - (int64_t)b.data) % 16 == 0 &&
         (rows == 1 || (a.stride - b.stride) * size % 16 == 0);
}

struct Kernels {
  Kernel plain = nullptr;
  Kernel held = nullptr;  // null: there is none
};
template <class Types>
Kernels common_kernels(const Job& job, const Plan& plan) {
  const bool held = plan.entry == Entry::kFused && plan.writes_gradient(job) &&
                    (job.teacher.data == nullptr || job.spec.kind != kNone) &&
                    begin_alike(job.teacher, job.student, plan.rows) &&
                    begin_alike(job.grad, job.student, plan.rows);
  return {kernel_of<Types>(job), held ? kernel_of<Held<Types>>(job) : nullptr};
}

Kernels kernels_of(const Job& job, const Plan& plan) {
  const auto all_are = [&](DType dtype) {
    return is_absent_or(dtype, job.student) && is_absent_or(dtype, job.teacher);
  };
  if (is_lean(job, plan.flags) && all_are(kFloat)) return common_kernels<PlainFloat>(job, plan);
  if (is_lean(job, plan.flags) && all_are(kBFloat16) && is_absent_or(kBFloat16, job.grad))
    return common_kernels<PlainBFloat16>(job, plan);
  return {kernel_of<Anything>(job)};
}

// How many clusters the device holds at once; asking takes longer than a launch.
int resident(Kernel kernel, const Geometry& g, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<Kernel, int, int, int64_t, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, g.cluster, g.warps, g.shared_bytes(), device);
  const auto found = known.find(key);
  return found != known.end() ? found->second
                              : known[key] = runtime::resident_clusters((const void*)kernel, g);
}

// Where a sparse target is solved.
int64_t outcome_bytes(const Job& job, Entry entry, const Chip& chip) {
  if (entry != Entry::kFusedSparse) return 0;
  const int64_t bytes = OutcomeMemory::bytes(job.sparse.slots);
  if (kReserved + bytes > chip.shared_bytes)
    throw std::runtime_error(
        "kdkernels: a sparse target has too many slots for the shared memory of this device");
  return bytes;
}

// Whether the kernel fits on the device, and was launched.
bool launched(Kernel kernel, const Geometry& g, const Job& job, Plan plan, int device, void* stream) {
  plan.geometry = g;
  plan.clusters = std::min(plan.rows, resident(kernel, g, device));
  if (plan.clusters == 0) return false;
  runtime::launch(kernel, plan.clusters * g.cluster, g, stream, job, plan);
  return true;
}

const void* any_kernel() { return (const void*)&rows_kernel<kForwardKL, ClosedForm, PlainBFloat16>; }

}  // namespace

int architecture() { return runtime::architecture(any_kernel()); }

void launch(const Job& job, Entry entry, int64_t rows, int device, void* stream) {
  const bool closed =
      job.spec.kind == kForwardKL || job.spec.kind == kReverseKL || job.teacher.data == nullptr;
  const bool nothing =
      (entry == Entry::kGradient && job.grad.data == nullptr && job.teacher_grad.data == nullptr) ||
      (entry == Entry::kAccumulateValue && closed);
  if (rows == 0 || job.width == 0 || nothing) return;
  if (rows > INT32_MAX / 2 || job.width > INT32_MAX / 2)
    throw std::runtime_error("kdkernels: at most 2^30 rows and columns in one call");
  Plan plan;
  plan.entry = entry;
  plan.flags = flags_of(job.spec);
  plan.rows = (int)rows;
  Chip chip = runtime::chip(any_kernel(), device);
  const Kernels kernels = kernels_of(job, plan);
  const int student_bytes = bytes_of(job.student.dtype);
  const int teacher_bytes = job.teacher.data == nullptr ? 0 : bytes_of(job.teacher.dtype);
  const int64_t width = places(job, rows), outcomes = outcome_bytes(job, entry, chip);
  if (kernels.held != nullptr && chip.largest_cluster > 1) {
    const auto g = held(width, rows, student_bytes, teacher_bytes, chip);
    if (g && launched(kernels.held, *g, job, plan, device, stream)) return;
  }
  // The device may refuse a cluster of sixteen. Then half of it is tried.
  for (; chip.largest_cluster >= 1; chip.largest_cluster /= 2) {
    const Geometry g = geometry(width, rows, student_bytes, teacher_bytes, outcomes, chip);
    if (launched(kernels.plain, g, job, plan, device, stream)) return;
  }
  throw std::runtime_error("kdkernels: no block of the CUDA kernel fits on this device");
}

}  // namespace kd
