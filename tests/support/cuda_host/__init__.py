"""csrc/cuda built for the host: CUDA threads as fibers on CPU tensors (fibers.cpp).

``build`` compiles it once into ``build/cuda_host``; ``load`` gives its operators, which
``kdkernels.backends.native`` can be given in place of its own; ``set_chip`` says what GPU it plays.
"""

import importlib.util
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
KIB = 1024
#: Name -> multiprocessors, shared memory of a block, largest cluster, clusters at once.
CHIPS = {
    "large": (2, 227 * KIB, 16, 2),  # whole rows on the chip, one block each
    "small": (64, 28 * KIB, 4, 2),  # clusters, several chunks, wide rows with the student alone on the chip
    "tiny": (1, 13 * KIB, 2, 3),  # nothing but narrow rows fits
    "no clusters": (2, 163 * KIB, 1, 3),  # sm_80
}

#: What is broken -> file, a statement of it, and what stands there instead.
MUTATIONS = {
    "the cluster's states are not combined": (
        "exchange.cuh",
        "if (row.warp == 0) combine(parts, blocks + onto_memory, temperature, stats, out);",
        "if (row.warp == 0) combine(parts + rank, 1, temperature, stats, out);",
    ),
    "nor are their parts": (
        "parts.cuh",
        "all = combined<kReverse>(parts, blocks + onto_memory, factor);",
        "all = combined<kReverse>(parts + rank, 1, factor);",
    ),
    "a part's sums do not decay": (
        "parts.cuh",
        "all.sums[0] += r.sums[0] * s.decay;",
        "all.sums[0] += r.sums[0];",
    ),
    "a part is not handed over": (
        "parts.cuh",
        "if (i / kPartWords != rank) ((double*)in_block(&parts[rank], i / kPartWords))[i % kPartWords] = "
        "mine[i % kPartWords];",
        "",
    ),
    "the columns after the last sixteen bytes are not copied": (
        "staging.cuh",
        "if (size == 4) ((uint32_t*)to)[k] = ((const uint32_t*)from)[k]; "
        "else ((uint16_t*)to)[k] = ((const uint16_t*)from)[k];",
        "",
    ),
    "what is before the row in its first sixteen bytes counts": (
        "row_io.cuh",
        "return k >= before && k < count;",
        "return k < count;",
    ),
    "a chunk is not waited for": ("row.cuh", "if (first) slice.await(i, turn);", ""),
    "the exchange has no second buffer": ("exchange.cuh", "row.parity ^= 1;", ""),
    "nor has that of parts": ("parts.cuh", "row.parity ^= 1;", ""),
    "the gradient is zero": (
        "gradient.cuh",
        "store<Types>(grad, columns[i], count, g);",
        "store<Types>(grad, columns[i], count, t[i]);",
    ),
    "the entropy has no gradient": (
        "gradient.cuh",
        "if (entropy.slope != 0) g[k] += entropy(s[k]);",
        "",
    ),
    "nor is its sum moved to a new maximum": (
        "fold.cuh",
        "if (kStats) side.sum_exp_shift = moved(side.sum_exp_shift, side.sum_exp, decay, -up);",
        "",
    ),
    "the label is not subtracted": ("gradient.cuh", "if (k == label) g[k] -= onehot;", ""),
    "the lanes' maxima are not shared": (
        "fold.cuh",
        "side.sum_exp = lane.sum_exp * decay;",
        "side.sum_exp = lane.sum_exp;",
    ),
    "sums are not moved to a new maximum": ("fold.cuh", "side.sum_exp *= decay;", ""),
    "the second pass is not added": ("value.cuh", "state.pair.sum_q_psi += added.pair.sum_q_psi;", ""),
    "what others found of a held row is not waited for": (
        "held.cuh",
        "at.wait_for_all(at.found_barrier());",
        "",
    ),
    "its steward does not wait for room": ("held.cuh", "wait(at.empty(), at.use());", ""),
    "nor do its readers for the copies": ("held.cuh", "wait(at.full(), at.use());", ""),
    "its steward copies no rest": ("held.cuh", "copies.rest(student, to_student);", ""),
    "what is no column of it counts": ("held.cuh", "if (Row::kTeacher) blank(row, teacher);", ""),
    "its lanes' sums are not added": ("held.cuh", "add_across_warp<4>(sums);", ""),
    "its warps' maxima are taken for the row's": (
        "held.cuh",
        "return {fast_exp2((mine.student - all.student) * factor) * inverse(all.sums[0]), "
        "fast_exp2((mine.teacher - all.teacher) * factor) * inverse(all.sums[1])};",
        "return {inverse(all.sums[0]), inverse(all.sums[1])};",
    ),
    "its second pass is not added": ("held.cuh", "sums[1] += terms.q_psi;", ""),
    "it has no hard gradient": ("held.cuh", "g[k] += columns.s[i][k] * w.hard;", ""),
    "its ReverseKL has no mean": ("held.cuh", "w.mean = mean;", ""),
}


def compiler():
    return shutil.which("c++") or shutil.which("g++")


def build(csrc: Path = ROOT / "csrc", folder: Path = ROOT / "build/cuda_host") -> Path:
    """The path of the library, built from ``csrc`` where it is older than its sources."""
    made = folder / "kdkernels_cuda_host.so"
    headers = [
        p for where in (csrc, HERE) for p in where.rglob("*") if p.suffix in (".h", ".cuh", ".cu", ".cpp")
    ]
    if made.exists() and made.stat().st_mtime > max(p.stat().st_mtime for p in headers):
        return made
    folder.mkdir(parents=True, exist_ok=True)
    packages = Path(torch.__file__).parent
    plain = "-std=c++20 -O1 -fPIC -fvisibility=hidden -Wno-psabi -DKD_CUDA_HOST"
    folders = [csrc, csrc / "cuda", HERE, packages / "include", sysconfig.get_paths()["include"]]
    flags = [*plain.split(), "-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{f}" for f in folders)]
    sources = [csrc / "cuda/launch.cu", HERE / "fibers.cpp", HERE / "bindings_host.cpp"]
    objects = [folder / f"{source.stem}.o" for source in sources]
    running = [
        subprocess.Popen(
            [compiler(), *flags, "-x", "c++", "-c", source, "-o", made], stderr=subprocess.PIPE, text=True
        )
        for source, made in zip(sources, objects)
    ]
    for process in running:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-5000:]
    libraries = [f"-L{packages}/lib", "-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run([compiler(), "-shared", *objects, *libraries, "-o", made], check=True)
    return made


def mutated(folder: Path) -> Path:
    """A copy of csrc with all mutations in it, each asleep until ``set_mutation`` names its number."""
    shutil.copytree(ROOT / "csrc", folder)
    texts: dict[str, str] = {}
    for number, (file, there, instead) in enumerate(MUTATIONS.values()):
        text = texts.get(file) or (folder / "cuda" / file).read_text()
        found = re.search(r"\s+".join(map(re.escape, there.split())), text)
        assert found, f"{there!r} is not in {file}"
        either = f"if (host::mutation == {number}) {{ {instead} }} else {{ {there} }}"
        texts[file] = text[: found.start()] + either + text[found.end() :]
    for file, text in texts.items():
        (folder / "cuda" / file).write_text(text)
    return folder


def load(path: Path):
    """Its operators; one library in a process."""
    spec = importlib.util.spec_from_file_location("kdkernels_cuda_host", path)
    importlib.util.module_from_spec(spec)
    return torch.ops.kdkernels_cuda_host


def set_chip(name: str) -> None:
    torch.ops.kdkernels_cuda_host.set_chip(*CHIPS[name])
