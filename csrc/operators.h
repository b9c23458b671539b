// The operators, once for every device: checks, plain pointers, and the call of a backend's row loops.
//
// A backend is a type with `run(entry, job, rows, like)`; `like` tells it the device. Torch's stable ABI.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstring>
#include <optional>

#include "entry.h"
#include "job.h"
#include "row_state.h"

namespace kd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    default:
      STD_TORCH_CHECK(false, "kdkernels: rows must be fp32, bf16 or fp16");
      return kFloat;
  }
}

inline bool on_device_of(const Tensor& t, const Tensor& like) {
  return t.is_cpu() == like.is_cpu() && t.get_device_index() == like.get_device_index();
}

// Tensors of a call, checked against the student's rows.
class Arguments {
 public:
  explicit Arguments(const Tensor& student) : student_(student) {
    STD_TORCH_CHECK(student.dim() == 2, "kdkernels: rows must be a matrix");
    job.width = job.vocab = student.size(1);
    job.student = matrix(student, job.width);
  }

  int64_t rows() const { return student_.size(0); }

  Matrix matrix(const Tensor& t, int64_t width) const {
    STD_TORCH_CHECK(on_device_of(t, student_) && t.dim() == 2 && t.size(0) == rows() && t.size(1) == width &&
                        (t.stride(1) == 1 || width == 1),
                    "kdkernels: expected a matrix of the student's shape and device with adjacent columns");
    return {(char*)t.data_ptr(), dtype_of(t), t.stride(0)};
  }
  Matrix float_matrix(const Tensor& t, int64_t width) const {
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Float, "kdkernels: expected fp32");
    return matrix(t, width);
  }
  template <class T>
  T* numbers(const Tensor& t, ScalarType dtype, int64_t per_row = 1) const {
    return (T*)checked(t, dtype, rows() * per_row);
  }
  double* doubles(const Tensor& t, int64_t per_row = 1) const {
    return numbers<double>(t, ScalarType::Double, per_row);
  }

  void set_spec(const Tensor& spec) {
    STD_TORCH_CHECK(spec.is_cpu() && spec.scalar_type() == ScalarType::Byte && spec.is_contiguous() &&
                        spec.numel() == (int64_t)sizeof(Spec),
                    "kdkernels: a spec is its bytes, uint8 on the CPU");
    std::memcpy((void*)&job.spec, spec.data_ptr(), sizeof(Spec));
  }
  void set_teacher(const MaybeTensor& teacher) {
    if (teacher) job.teacher = matrix(*teacher, job.width);
  }
  void set_labels(const MaybeTensor& labels) {
    if (labels) job.labels = numbers<int64_t>(*labels, ScalarType::Long);
    STD_TORCH_CHECK(labels || !(job.spec.asks(kLabel) || job.spec.asks(kTeacherLabel)),
                    "kdkernels: a label's output is asked for, but there are no labels");
    STD_TORCH_CHECK(job.teacher.data != nullptr || !job.spec.asks(kTeacherLabel),
                    "kdkernels: the teacher's output is asked for, but there is no teacher");
  }
  void set_temperature(const Tensor& temperature) {
    job.temperature = {doubles_of(temperature, temperature.numel() == 1 ? 1 : rows()),
                       temperature.numel() == 1 ? 0 : 1};
  }
  void set_parameters(const Tensor& parameters) { job.parameters = doubles_of(parameters, 2); }
  void set_gradients(const Tensor& weights, const MaybeTensor& grad, const MaybeTensor& teacher_grad) {
    job.weights = doubles(weights, kOutputs);
    if (grad) job.grad = matrix(*grad, job.width);
    if (teacher_grad) job.teacher_grad = matrix(*teacher_grad, job.width);
  }
  void set_ids(const MaybeTensor& ids) {
    if (!ids) return;
    STD_TORCH_CHECK(ids->dim() == 2, "kdkernels: a sparse target's ids must be a matrix");
    job.sparse.slots = ids->size(1);
    job.sparse.ids = numbers<int64_t>(*ids, ScalarType::Long, ids->size(1));
  }
  void set_state(const Tensor& state) { job.state = doubles(state, kStateColumns); }

  Job job;

 private:
  void* checked(const Tensor& t, ScalarType dtype, int64_t count) const {
    STD_TORCH_CHECK(
        on_device_of(t, student_) && t.scalar_type() == dtype && t.is_contiguous() && t.numel() == count,
        "kdkernels: a tensor of numbers has another dtype, device, layout or length");
    return t.data_ptr();
  }
  const double* doubles_of(const Tensor& t, int64_t count) const {
    return (const double*)checked(t, ScalarType::Double, count);
  }

  const Tensor& student_;
};

template <class Backend>
struct Operators {
  static void fused(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
                    const Tensor& temperature, const Tensor& parameters, const Tensor& weights,
                    const Tensor& spec, const Tensor& results, const MaybeTensor& grad,
                    const MaybeTensor& teacher_grad) {
    Arguments a(student);
    a.set_spec(spec);
    a.set_teacher(teacher);
    a.set_labels(labels);
    a.set_temperature(temperature);
    a.set_parameters(parameters);
    a.set_gradients(weights, grad, teacher_grad);
    a.job.results = a.doubles(results, kResults);
    Backend::run(Entry::kFused, a.job, a.rows(), student);
  }

  static void accumulate(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
                         const Tensor& temperature, const Tensor& spec, int64_t offset, const Tensor& state,
                         const MaybeTensor& skipped) {
    Arguments a(student);
    a.set_spec(spec);
    a.set_teacher(teacher);
    a.set_labels(labels);
    a.set_temperature(temperature);
    a.set_ids(skipped);
    a.set_state(state);
    a.job.offset = offset;
    Backend::run(Entry::kAccumulate, a.job, a.rows(), student);
  }

  static void accumulate_value(const Tensor& student, const Tensor& teacher, const Tensor& temperature,
                               const Tensor& parameters, const Tensor& spec, const Tensor& state) {
    Arguments a(student);
    a.set_spec(spec);
    a.set_teacher(teacher);
    a.set_temperature(temperature);
    a.set_parameters(parameters);
    a.set_state(state);
    a.job.spec.asked &= 1 << kSoft;  // this pass sees the divergence alone
    Backend::run(Entry::kAccumulateValue, a.job, a.rows(), student);
  }

  static void gradient(const Tensor& student, const MaybeTensor& teacher, const MaybeTensor& labels,
                       const Tensor& temperature, const Tensor& parameters, const Tensor& weights,
                       const Tensor& spec, int64_t offset, int64_t vocab, const Tensor& state,
                       const MaybeTensor& grad, const MaybeTensor& teacher_grad, const MaybeTensor& ids,
                       const MaybeTensor& rest, const MaybeTensor& stored, const MaybeTensor& at_1,
                       const MaybeTensor& softmax) {
    Arguments a(student);
    a.set_spec(spec);
    a.set_teacher(teacher);
    a.set_labels(labels);
    a.set_temperature(temperature);
    a.set_parameters(parameters);
    a.set_gradients(weights, grad, teacher_grad);
    a.set_ids(ids);
    if (ids) {
      STD_TORCH_CHECK(rest && stored && at_1, "kdkernels: a sparse target's gradient comes in four tensors");
      a.job.spec.asked |= 1 << kSoft;  // `rest` and `stored` are its gradient
      a.job.sparse.rest = a.doubles(*rest);
      a.job.sparse.at_1 = (const Normaliser*)a.doubles(*at_1, 2);
      STD_TORCH_CHECK(softmax || !a.job.spec.asks(kEntropy), "kdkernels: an entropy needs the row's softmax");
      if (softmax) a.job.sparse.softmax = (const Softmax*)a.doubles(*softmax, 3);
      a.job.sparse.stored_grad = a.float_matrix(*stored, a.job.sparse.slots);
    }
    a.set_state(state);
    a.job.offset = offset;
    a.job.vocab = vocab;
    Backend::run(Entry::kGradient, a.job, a.rows(), student);
  }

  static void fused_sparse(const Tensor& student, const Tensor& ids, const Tensor& teacher,
                           const Tensor& scale, const Tensor& constant, const Tensor& rounding,
                           const MaybeTensor& labels, const Tensor& temperature, const Tensor& parameters,
                           const Tensor& weights, const Tensor& spec, const Tensor& results,
                           const MaybeTensor& grad) {
    Arguments a(student);
    a.set_spec(spec);
    a.set_labels(labels);
    a.set_temperature(temperature);
    a.set_parameters(parameters);
    a.set_gradients(weights, grad, std::nullopt);
    a.set_ids(ids);
    a.job.sparse.teacher = a.float_matrix(teacher, a.job.sparse.slots + 1);
    a.job.sparse.scale = a.doubles(scale);
    a.job.sparse.constant = a.doubles(constant);
    a.job.sparse.rounding = a.numbers<bool>(rounding, ScalarType::Bool);
    a.job.sparse.outcome_spec = outcome_spec_of(a.job.spec);
    a.job.spec = student_spec_of(a.job.spec);
    a.job.results = a.doubles(results, kResults);
    Backend::run(Entry::kFusedSparse, a.job, a.rows(), student);
  }
};

// `m` is a torch library, being defined.
template <class Library>
void define_operators(Library& m) {
  m.def(
      "fused(Tensor(a!) student, Tensor(b!)? teacher, Tensor? labels, Tensor temperature, Tensor parameters, "
      "Tensor weights, Tensor spec, Tensor(c!) results, Tensor(d!)? grad, Tensor(e!)? teacher_grad) -> ()");
  m.def(
      "accumulate(Tensor student, Tensor? teacher, Tensor? labels, Tensor temperature, Tensor spec, "
      "int offset, Tensor(a!) state, Tensor? skipped) -> ()");
  m.def(
      "accumulate_value(Tensor student, Tensor teacher, Tensor temperature, Tensor parameters, Tensor spec, "
      "Tensor(a!) state) -> ()");
  m.def(
      "gradient(Tensor(a!) student, Tensor(b!)? teacher, Tensor? labels, Tensor temperature, "
      "Tensor parameters, Tensor weights, Tensor spec, int offset, int vocab, Tensor state, "
      "Tensor(c!)? grad, Tensor(d!)? teacher_grad, Tensor? ids, Tensor? rest, Tensor? stored, "
      "Tensor? at_1, Tensor? softmax) -> ()");
  m.def(
      "fused_sparse(Tensor(a!) student, Tensor ids, Tensor teacher, Tensor scale, Tensor constant, "
      "Tensor rounding, Tensor? labels, Tensor temperature, Tensor parameters, Tensor weights, Tensor spec, "
      "Tensor(b!) results, Tensor(c!)? grad) -> ()");
}

template <class Backend, class Library>
void implement_operators(Library& m) {
  m.impl("fused", TORCH_BOX(&Operators<Backend>::fused));
  m.impl("accumulate", TORCH_BOX(&Operators<Backend>::accumulate));
  m.impl("accumulate_value", TORCH_BOX(&Operators<Backend>::accumulate_value));
  m.impl("gradient", TORCH_BOX(&Operators<Backend>::gradient));
  m.impl("fused_sparse", TORCH_BOX(&Operators<Backend>::fused_sparse));
}

}  // namespace kd
