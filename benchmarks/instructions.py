"""``python -m benchmarks.instructions``: instructions that the GPU kernels execute for a pair of logits, and what follows.

Counted from the machine code for sm_90a, without a GPU: of the passes over columns that are all a row's own, in bf16, forward
and gradient, no hard term. What a row costs beside them (exchanges, weights, results) is not in it. A pass is compiled twice,
written out for different numbers of columns; the difference is what these columns take. Triton's passes are loops, counted
as they are. Divergences whose instructions depend on their parameters (AlphaBeta, Mixed) are left out.

Prints the table, writes benchmarks/results/instructions.json and the table in docs/gpu.md. Needs nvcc, and Triton, whose
package has the disassembler.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import kdkernels as kd
from benchmarks import compile_cuda, machine, pages
from kdkernels.backends.spec import Asked

RESULT = Path(__file__).parent / "results" / "instructions.json"
ARCHITECTURE = "sm_90a"


class Formula(NamedTuple):
    """A divergence, and its kind and functor in csrc/divergence.h."""

    divergence: kd.divergences.Divergence
    kind: str
    functor: str


DIVERGENCES = {
    "forward KL": Formula(kd.ForwardKL(), "kForwardKL", "ClosedForm"),
    "reverse KL": Formula(kd.ReverseKL(), "kReverseKL", "ClosedForm"),
    "JSD": Formula(kd.JSD(0.5), "kJSD", "JSD"),
    "skew KL": Formula(kd.SkewKL(0.1), "kSkewKL", "SkewKL"),
    "skew reverse KL": Formula(kd.SkewReverseKL(0.1), "kSkewReverseKL", "SkewReverseKL<false>"),
    "total variation": Formula(kd.TotalVariation(), "kTotalVariation", "TotalVariation"),
    "overlap": Formula(kd.Overlap(), "kOverlap", "Overlap"),
}


class Kernel(NamedTuple):
    """Of the kernels in csrc/cuda: what docs call it, its types (row_io.cuh), and with statistics or not."""

    name: str
    types: str
    stats: bool = False

    @property
    def is_held(self) -> bool:
        return self.types.startswith("Held")


KERNELS = (
    Kernel("rows in registers", "Held<PlainBFloat16>"),
    Kernel("wider rows", "PlainBFloat16"),
    Kernel("with statistics", "Anything", stats=True),
)
#: Vectors of eight columns that a pass is written out for: their difference is what is counted.
FEWER, MORE = 2, 4
PAIRS = (MORE - FEWER) * 8

#: An H200's; the clock is what ncu saw an H100 keep. And how large the problem is whose bounds are given.
MULTIPROCESSORS, CLOCK, BANDWIDTH = 132, 1.755e9, 4.8e12
ISSUED, SPECIAL = 128, 16  # a clock and multiprocessor: instructions of a thread, special functions
ROWS, VOCAB = 8192, 151_936

SOURCE = """
#include "cuda/kernel.cuh"

namespace kd {

// What other passes would have found.
struct Given {
  float factor;
  Shares shares;
  Weights weights;
  Coefficients coefficients;
};

template <class Types, int kVectors>
struct Fewer : Types {
  static constexpr int kHeld = kVectors * 2 * kVector;
};

// Gradients are there, at multiples of 16 bytes.
template <class Base>
struct Aligned : Base {
  using Base::Base;
  KD_DEVICE GradRow grad_row(const Matrix& m) const {
    char* at = start_of(m, this->row, this->lead);
    return {at, this->lead, kBFloat16, true};
  }
};

// A call that asks for a divergence of bf16 logits, and nothing else that a kernel would look for at run time.
KD_DEVICE Job plain(Job job) {
  job.spec = Spec();
  job.student.dtype = job.teacher.dtype = job.grad.dtype = kBFloat16;
  job.teacher_grad.data = nullptr;
  job.sparse.ids = nullptr;
  return job;
}
KD_DEVICE Plan plain(Plan plan) {
  plan.entry = Entry::kFused;
  plan.flags = PassFlags();
  return plan;
}

template <Kind kKind, class Divergence, class Types, int kVectors>
__global__ void __launch_bounds__(kMaxWarps * kWarp)
    held(const __grid_constant__ Job some_job, const __grid_constant__ Plan some_plan, const Given* given,
         void* first, FoundValue* second) {
  const Job job = plain(some_job);
  const Plan plan = kd::plain(some_plan);
  Slice slice(job, plan.geometry);
  Aligned<Row<kKind, Fewer<Types, kVectors>>> row(job, plan, slice);
  Columns<decltype(row)> columns;
  char* const teacher = shared_memory() + plan.geometry.bytes_per_warp;
  ((Found*)first)[thread_index()] = fold_columns(row, shared_memory(), teacher, given->factor, columns, [] {});
  sync_block();
  if constexpr (!kHasClosedForm<Divergence>)
    second[thread_index()] =
        value_of_columns(row, Divergence(job.parameters, false), given->shares, columns);
  sync_block();
  Weights weights = given->weights;
  weights.hard = weights.onehot = 0;
  write_columns(row, weights, -1, true, columns);
}

template <Kind kKind, class Divergence, class Types, bool kStats, int kVectors>
__global__ void __launch_bounds__(kMaxWarps * kWarp)
    streamed(const __grid_constant__ Job some_job, const __grid_constant__ Plan some_plan, const Given* given,
             void* first, FoundValue* second) {
  constexpr int kTile = Types::kTile;
  const Job job = plain(some_job);
  const Plan plan = kd::plain(some_plan);
  Slice slice(job, plan.geometry);
  Aligned<Row<kKind, Types>> row(job, plan, slice);
  const Side student = row.student(), teacher = row.teacher();
  float s[kTile][kVector], t[kTile][kVector];
  int columns[kTile];
  const auto load = [&](int step) {
#pragma unroll
    for (int i = 0; i < kTile; ++i) columns[i] = (step * kTile + i) * kStep + row.lane * kVector;
    load_step<decltype(row)>(Whole{}, student, teacher, 0, columns, s, t);
  };

  LaneState& found = ((LaneState*)first)[thread_index()];
  LaneState state = found;
#pragma unroll
  for (int step = 0; step < kVectors / kTile; ++step) {
    load(step);
    fold_tile<kKind, kStats, kTile>(state, s, t, columns, given->factor, plan.flags);
  }
  found = state;
  sync_block();

  Coefficients c = given->coefficients;
  c.normal.gap = 0;  // SkewKL's code is there twice, for rows that disagree and others
  const Formula<kKind, Divergence> formula(job.parameters, c.normal);
  if constexpr (!kHasClosedForm<Divergence>) {
    FoundValue value;
#pragma unroll
    for (int step = 0; step < kVectors / kTile; ++step) {
      load(step);
#pragma unroll
      for (int i = 0; i < kTile; ++i) {
#pragma unroll
        for (int k = 0; k < kVector; ++k) {
          const Terms terms = formula.terms(c.normal, s[i][k], t[i][k]);
          value.phi += terms.phi;
          value.sum_q_psi += terms.q_psi;
        }
      }
    }
    second[thread_index()] = value;
  }
  sync_block();

  const GradRow grad = row.grad_row(job.grad);
#pragma unroll
  for (int step = 0; step < kVectors / kTile; ++step) {
    load(step);
#pragma unroll
    for (int i = 0; i < kTile; ++i) {
      float g[kVector];
      student_gradient(row, c, formula, StoredIds(), 0, s[i], t[i], g);
      store_whole<Types>(grad, columns[i], g);
    }
  }
}
"""


class Counts(NamedTuple):
    """Of a whole kernel's code."""

    instructions: int
    special: int


def instances() -> dict[tuple[str, str, int], str]:
    """(divergence, kernel, vectors) -> the name and arguments of its template."""
    made = {}
    for divergence, (_, kind, functor) in DIVERGENCES.items():
        for kernel in KERNELS:
            for vectors in (FEWER, MORE):
                if kernel.is_held:
                    name = f"held<{kind}, {functor}, PlainBFloat16, {vectors}>"
                else:
                    name = (
                        f"streamed<{kind}, {functor}, {kernel.types}, {str(kernel.stats).lower()}, {vectors}>"
                    )
                made[divergence, kernel.name, vectors] = name
    return made


def source(name: str) -> str:
    given = "const __grid_constant__ Job, const __grid_constant__ Plan, const Given*, void*, FoundValue*"
    return f"{SOURCE}\ntemplate __global__ void {name}({given});\n}}  // namespace kd\n"


def compiled(text: str, folder: Path) -> tuple[Path, str]:
    """The machine code's file, and what ptxas said of it."""
    folder.mkdir()
    path = folder / "kernel.cu"
    path.write_text(text)
    done = subprocess.run(compile_cuda.command(ARCHITECTURE, path), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return path.with_suffix(f".{ARCHITECTURE}.cubin"), done.stderr


def disassembler() -> Path:
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


_INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][^;]*);", flags=re.M)
_BRANCH = re.compile(r"BRA\b.*?0x([0-9a-f]+)")


def disassembled(binary: Path) -> dict[int, str]:
    """Address -> instruction, without the padding."""
    said = subprocess.run(
        [disassembler(), "-sass", binary], capture_output=True, text=True, check=True
    ).stdout
    return {int(at, 16): code for at, code in _INSTRUCTION.findall(said) if not code.startswith("NOP")}


def counts(codes: Iterable[str]) -> Counts:
    codes = list(codes)
    return Counts(len(codes), sum(code.startswith("MUFU") for code in codes))


def passes(code: dict[int, str]) -> list[Counts]:
    """Of the innermost loops with exponentials in them, those over columns."""
    loops = [
        (int(to[1], 16), at)
        for at, said in code.items()
        if (to := _BRANCH.match(said)) and int(to[1], 16) <= at
    ]
    inner = [
        (low, high)
        for low, high in loops
        if not any(low <= start and end <= high and (start, end) != (low, high) for start, end in loops)
    ]
    found = [counts(said for at, said in code.items() if low <= at <= high) for low, high in inner]
    return [each for each in found if each.special]


def of_triton() -> list[dict]:
    from benchmarks import compile_triton as offline

    rows = []
    for name, formula in DIVERGENCES.items():
        for kernel, stats in (("Triton", 0), ("Triton, with statistics", 1)):
            with offline.offline("sm_90") as compiled:
                offline.call(
                    formula.divergence,
                    offline.BF16,
                    offline.BF16,
                    rows=ROWS,
                    columns=VOCAB,
                    asked=Asked.SOFT,
                    stats=stats,
                )
            (made,) = compiled
            sizes = {made.src.fn.arg_names[at]: value for (at,), value in made.src.constants.items()}
            pairs = sizes["LANES"] * sizes["K"] / (32 * made.metadata.num_warps)
            with tempfile.TemporaryDirectory() as folder:
                binary = Path(folder, "kernel.cubin")
                binary.write_bytes(made.asm["cubin"])
                found = passes(disassembled(binary))
            assert len(found) == (2 if formula.functor == "ClosedForm" else 3), found
            rows.append(
                {
                    "divergence": name,
                    "kernel": kernel,
                    "instructions": sum(each.instructions for each in found) / pairs,
                    "special": sum(each.special for each in found) / pairs,
                    "registers": offline.usage(made, "sm_90").registers,
                }
            )
    return rows


def of_cuda() -> list[dict]:
    """A row for each divergence and kernel."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(2) as pool:

        def count(index: int, name: str) -> Counts:
            return counts(disassembled(compiled(source(name), Path(folder, str(index)))[0]).values())

        def registers_of(index: int, divergence: str, kernel: Kernel) -> int:
            text = compile_cuda.instances((*DIVERGENCES[divergence][1:], kernel.types))
            return compile_cuda.parsed(compiled(text, Path(folder, f"whole{index}"))[1])[0].registers

        names = instances()
        found = dict(zip(names, pool.map(count, range(len(names)), names.values())))
        pairs = [(divergence, kernel) for divergence in DIVERGENCES for kernel in KERNELS]
        registers = list(pool.map(registers_of, range(len(pairs)), *zip(*pairs)))
    rows = []
    for (divergence, kernel), used in zip(pairs, registers):
        more, fewer = (found[divergence, kernel.name, n] for n in (MORE, FEWER))
        rows.append(
            {
                "divergence": divergence,
                "kernel": kernel.name,
                "instructions": (more.instructions - fewer.instructions) / PAIRS,
                "special": (more.special - fewer.special) / PAIRS,
                "registers": used,
            }
        )
    return rows


def bounds(row: dict) -> dict[str, float]:
    """Milliseconds that the row's instructions, its special functions and the memory need."""
    pairs = ROWS * VOCAB
    a_clock = MULTIPROCESSORS * CLOCK
    return {
        "issue": 1e3 * pairs * row["instructions"] / (a_clock * ISSUED),
        "special functions": 1e3 * pairs * row["special"] / (a_clock * SPECIAL),
        "memory": 1e3 * pairs * 6 / BANDWIDTH,
    }


def table(result: dict) -> str:
    lines = [
        "| divergence | kernel | instructions a pair | of them special functions | registers | issue, ms | special functions, ms |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        bound = bounds(row)
        lines.append(
            f"| {row['divergence']} | {row['kernel']} | {row['instructions']:.1f} | {row['special']:.1f} | "
            f"{row['registers']} | {bound['issue']:.2f} | {bound['special functions']:.2f} |"
        )
    memory = bounds(result["rows"][0])["memory"]
    return "\n".join(
        [
            *lines,
            "",
            f"Milliseconds are those of [{ROWS}, {VOCAB}] on {MULTIPROCESSORS} multiprocessors at {CLOCK / 1e9:g} GHz; an "
            f"H200's memory, {BANDWIDTH / 1e12:g} TB/s, needs {memory:.2f}. nvcc {result['nvcc']}, Triton "
            f"{result['environment']['versions']['triton']}, {ARCHITECTURE}.",
        ]
    )


def main() -> None:
    argparse.ArgumentParser(
        prog="python -m benchmarks.instructions",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    result = {
        "environment": machine.describe("cpu"),
        "nvcc": re.search(r"V([\d.]+)", version)[1],  # type: ignore[index]
        "rows": sorted(of_cuda() + of_triton(), key=lambda row: list(DIVERGENCES).index(row["divergence"])),
    }
    print(table(result))
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    pages.fill("instructions", table(result))


if __name__ == "__main__":
    main()
