// Second pass, for divergences without a closed form: the divergence and the sum of q_psi.
#pragma once

#include "formula.cuh"
#include "parts.cuh"

namespace kd {

// Adds what the pass found to the row's state, and for accumulate_value to the state in memory.
template <class Row>
KD_DEVICE void add_value(Row& row, RowState& state, const RowState& added) {
  // NaN stays NaN, whatever the formula.
  state.pair.value += added.pair.value + nan_without_softmax(state.student.sum_exp, state.teacher.sum_exp);
  state.pair.sum_q_psi += added.pair.sum_q_psi;
  if (state.pair.value != state.pair.value) state.pair.sum_q_psi = state.pair.value;
  if (row.plan.entry != Entry::kAccumulateValue || cluster_rank() != 0) return;
  row.memory_state()->pair.value = state.pair.value;
  row.memory_state()->pair.sum_q_psi = state.pair.sum_q_psi;
}

template <class Divergence, class Row>
KD_DEVICE void value(Row& row) {
  const Normal n = row.shared.coefficients.normal;
  const Side student = row.student(), teacher = row.teacher();
  const Formula<Row::kKind, Divergence> formula(row.job.parameters, n);
  const bool first = row.plan.entry == Entry::kAccumulateValue, last = !row.plan.writes_gradient(row.job);
  float phi = 0, q_psi = 0;
  row.template each_step<kStep>(first, last, [&](auto step, int start, int end) {
    const int column[1] = {start + row.lane * kVector};
    float s[1][kVector], t[1][kVector];
    load_step<Row>(step, student, teacher, end, column, s, t);
#pragma unroll
    for (int k = 0; k < kVector; ++k) {
      const Terms terms = formula.terms(n, s[0][k], t[0][k]);
      phi += terms.phi;
      q_psi += terms.q_psi;
    }
  });
  RowState r;
  if constexpr (Row::Types::kLean) {
    const Parts part = added(Parts{{phi, q_psi, 0}, 0, 0});
    if (row.lane == 0) row.shared.warp_parts[row.warp] = part;
    const Parts all = exchange(row, 1);
    r.pair.value = all.sums[0];
    r.pair.sum_q_psi = all.sums[1];
    if (thread_index() == 0) add_value(row, row.shared.state, r);
  } else {
    r.pair.value = phi;
    r.pair.sum_q_psi = q_psi;
    write_state(&row.shared.warps[row.warp], r);
    exchange_states(row, &row.shared.added, false);
    if (thread_index() == 0) add_value(row, row.shared.state, row.shared.added);
  }
}

}  // namespace kd
