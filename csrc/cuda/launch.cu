// Which kernel, over which geometry, how many clusters.
#include <map>
#include <mutex>
#include <tuple>

#include "kernel.cuh"
#include "launch.h"
#include "runtime.h"

namespace kd {
namespace {

template <class Types>
Kernel kernel_of(const Job& job) {
  Kernel found = nullptr;
  with_kind(job.spec.kind, job.teacher.data != nullptr,
            [&]<Kind kKind, class Divergence>() { found = &rows_kernel<kKind, Divergence, Types>; });
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

Kernel kernel_of(const Job& job, const PassFlags& flags) {
  const auto all_are = [&](DType dtype) {
    return is_absent_or(dtype, job.student) && is_absent_or(dtype, job.teacher);
  };
  if (!is_lean(job, flags)) return kernel_of<Anything>(job);
  if (all_are(kBFloat16) && is_absent_or(kBFloat16, job.grad)) return kernel_of<PlainBFloat16>(job);
  return all_are(kFloat) ? kernel_of<PlainFloat>(job) : kernel_of<Anything>(job);
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
  const Kernel kernel = kernel_of(job, plan.flags);
  Chip chip = runtime::chip(any_kernel(), device);
  const int teacher_bytes = job.teacher.data == nullptr ? 0 : bytes_of(job.teacher.dtype);
  const int64_t outcome_bytes = entry == Entry::kFusedSparse ? OutcomeMemory::bytes(job.sparse.slots) : 0;
  if (kReserved + outcome_bytes > chip.shared_bytes)
    throw std::runtime_error(
        "kdkernels: a sparse target has too many slots for the shared memory of this device");
  int clusters = 0;
  // The device may refuse a cluster of sixteen. Then half of it is tried.
  for (; clusters == 0 && chip.largest_cluster >= 1; chip.largest_cluster /= 2) {
    plan.geometry =
        geometry(places(job, rows), rows, bytes_of(job.student.dtype), teacher_bytes, outcome_bytes, chip);
    clusters = resident(kernel, plan.geometry, device);
  }
  if (clusters == 0) throw std::runtime_error("kdkernels: no block of the CUDA kernel fits on this device");
  const int blocks = (int)(rows < clusters ? rows : clusters) * plan.geometry.cluster;
  runtime::launch(kernel, blocks, plan.geometry, stream, job, plan);
}

}  // namespace kd
