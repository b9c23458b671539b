// The CPU's row loops without torch: for processors that are here only as an emulator.
//
// Reads one problem from standard input (problem.py writes it) and leaves results and gradient on standard
// output.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/row_loops.h"
#include "row_state.h"

namespace kd {
const RowLoops& row_loops_baseline();

namespace {

template <class T>
std::vector<T> read(size_t count) {
  std::vector<T> out(count);
  if (std::fread(out.data(), sizeof(T), count, stdin) != count) std::exit(2);
  return out;
}

template <class T>
void write(const std::vector<T>& out) {
  if (std::fwrite(out.data(), sizeof(T), out.size(), stdout) != out.size()) std::exit(2);
}

struct Header {
  int64_t rows, width, dtype, chunk;  // chunk: columns at a time
};

// The columns [begin, end) of a job's rows.
Job columns(Job job, int64_t begin, int64_t end) {
  for (Matrix* m : {&job.student, &job.teacher, &job.grad}) m->data += begin * bytes_of(m->dtype);
  job.width = end - begin;
  job.offset = begin;
  return job;
}

void by_chunks(const RowLoops& loops, const Job& job, int64_t rows, int64_t chunk) {
  const auto each = [&](auto loop) {
    for (int64_t begin = 0; begin < job.vocab; begin += chunk)
      loop(columns(job, begin, begin + chunk < job.vocab ? begin + chunk : job.vocab), 0, rows);
  };
  each(loops.accumulate);
  each(loops.accumulate_value);
  each(loops.gradient);
  for (int64_t i = 0; i < rows; ++i)
    if (job.is_live(i))
      finish(((const RowState*)job.state)[i], job.spec, true, job.vocab, job.results + i * kResults);
}

}  // namespace
}  // namespace kd

int main() {
  using namespace kd;
  const Header h = read<Header>(1)[0];
  const DType dtype = (DType)h.dtype;
  const size_t entries = h.rows * h.width;
  Job job;
  job.spec = read<Spec>(1)[0];
  const auto temperature = read<double>(1), parameters = read<double>(2);
  const auto weights = read<double>(h.rows * kOutputs);
  const auto labels = read<int64_t>(h.rows);
  auto student = read<char>(entries * bytes_of(dtype)), teacher = read<char>(entries * bytes_of(dtype));
  std::vector<char> grad(student.size());
  std::vector<double> results(h.rows * kResults);
  std::vector<RowState> state(h.rows);
  job.student = {student.data(), dtype, h.width};
  job.teacher = {teacher.data(), dtype, h.width};
  job.grad = {grad.data(), dtype, h.width};
  job.labels = labels.data();
  job.temperature = {temperature.data(), 0};
  job.parameters = parameters.data();
  job.weights = weights.data();
  job.results = results.data();
  job.state = (double*)state.data();
  job.width = job.vocab = h.width;
  if (h.chunk == h.width)
    row_loops_baseline().fused(job, 0, h.rows);
  else
    by_chunks(row_loops_baseline(), job, h.rows, h.chunk);
  write(results);
  write(grad);
}
