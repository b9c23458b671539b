"""Builds kdkernels._C where torch and a C++20 compiler are at hand; else installs pure Python, and leaves
the reason in kdkernels/_C.txt, for `python -m kdkernels info`: pip shows what a build prints only with -v.

One set of sources is compiled once per instruction set (csrc/cpu/rows_*.cpp) and linked together;
which one runs is decided on the machine that runs it. Where nvcc is there and torch is a CUDA build,
kdkernels._cuda is built as well, for the GPU at hand, else for those in ARCHITECTURES, else for what
TORCH_CUDA_ARCH_LIST says. The extensions use torch's stable ABI and Python's limited API, so one build
serves torch 2.10 and later and Python 3.10 and later.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

AGAIN = "then reinstall kdkernels with `pip install --force-reinstall --no-deps --no-build-isolation`"


def what_is_missing():
    """One line that says it, and what to type; None where the extension can be built."""
    try:
        import torch

        found = torch.__version__
    except Exception as error:  # a broken torch must not stop a pure Python install
        return f"it was built without torch ({error}): install torch, {AGAIN}"
    if tuple(int(x) for x in found.split("+")[0].split(".")[:2]) < (2, 10):
        return f"it was built with torch {found}: install torch 2.10 or later, {AGAIN}"
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        return f"it was built without a C++ compiler: install g++ or clang++, {AGAIN}"
    return None


def tell(problem, package):
    """Prints why there is no native backend, and leaves it in the package's folder; None: there is one."""
    note = Path(package, "_C.txt")
    if problem is None:
        note.unlink(missing_ok=True)
        return
    print(f"kdkernels: no native backend: {problem}", file=sys.stderr)
    note.write_text(problem + "\n")


class PurePython(build_py):
    def run(self):
        super().run()
        tell(MISSING, "kdkernels" if self.editable_mode else os.path.join(self.build_lib, "kdkernels"))


ARCHITECTURES = "8.0 9.0a 10.0"


def nvcc():
    """Its path where the CUDA kernels can be built, else None."""
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return None
    return shutil.which("nvcc") or (CUDA_HOME and shutil.which(os.path.join(CUDA_HOME, "bin", "nvcc")))


def architectures():
    """nvcc's flags for the GPUs that are built for."""
    import torch

    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST")
    if wanted is None and torch.cuda.is_available():
        found = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
        wanted = " ".join(f"{major}.{minor}{'a' * (major == 9)}" for major, minor in sorted(found))
    flags = []
    for one in re.split("[ ;,]+", (wanted or ARCHITECTURES).strip()):
        number, ptx = re.fullmatch(r"(\d+\.\d+[af]?)(\+PTX)?", one).groups()
        name = number.replace(".", "")
        flags.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{name},code=compute_{name}")
    return flags


def toolkit_libraries(compiler):
    """Where the toolkit keeps libcudart_static; nvcc may be a script far from it, and says so itself."""
    told = subprocess.run(
        [compiler, "--dryrun", "-c", "csrc/cuda/launch.cu"], capture_output=True, text=True
    ).stderr
    top = Path(re.search(r"TOP=(\S+)", told)[1]).resolve()
    found = [top / "lib64", top / "lib", *top.glob("targets/*/lib")]
    return [str(path) for path in found if (path / "libcudart_static.a").exists()]


def build_kernels(compiler, folder):
    """The object of csrc/cuda/launch.cu; all cores help.

    By hand and not by CUDAExtension, which refuses an nvcc of another major version than torch's and links the
    shared runtime: the kernels include nothing of torch, and bring their own.
    """
    made = os.path.join(folder, "cuda_launch.o")
    os.makedirs(folder, exist_ok=True)
    flags = "-std=c++20 -O3 -Xcompiler -fPIC,-fvisibility=hidden --threads=0 --split-compile=0 -Icsrc".split()
    command = [compiler, *flags, *architectures(), "-c", "csrc/cuda/launch.cu", "-o", made]
    print(" ".join(command))
    subprocess.run(command, check=True)
    return made


def extensions():
    """(ext_modules, cmdclass); no modules where nothing can be built."""
    if MISSING:
        return [], {"build_py": PurePython}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, library_paths

    class PerFileFlags(BuildExtension):
        """Gives each rows_<isa>.cpp its own -m flags, compiles files side by side (MAX_JOBS at once, as many as there are
        cores), and goes on without the extension if it fails."""

        def build_extensions(self):
            for one in list(self.extensions):
                if one.name == "kdkernels._cuda":
                    self.add_kernels(one)
            compile_all, original, running = self.compiler.compile, self.compiler._compile, []
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:

                def begin_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
                    flags = list(extra_postargs) + isa_flags(src)
                    running.append(pool.submit(original, obj, src, ext, cc_args, flags, pp_opts))

                def compile_and_wait(*arguments, **options):
                    objects = compile_all(*arguments, **options)
                    mine, running[:] = running[:], []
                    wait(mine)
                    for one in mine:
                        one.result()
                    return objects

                self.compiler._compile, self.compiler.compile = begin_one, compile_and_wait
                super().build_extensions()

        def add_kernels(self, one):
            """Without the kernels the rest is still built."""
            try:
                one.extra_objects = [build_kernels(nvcc(), self.build_temp)]
            except Exception as error:
                print(f"kdkernels: no CUDA kernels, their build failed: {error}", file=sys.stderr)
                self.extensions.remove(one)

        def run(self):
            try:
                super().run()
            except Exception as error:
                print(f"kdkernels: {error}", file=sys.stderr)
                self.extensions = []
            package = "kdkernels" if self.inplace else os.path.join(self.build_lib, "kdkernels")
            built = os.path.exists(self.get_ext_fullpath("kdkernels._C"))
            tell(None if built else f"its build failed: `pip install -v` shows how; {AGAIN}", package)

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    sources = ["csrc/bindings.cpp", "csrc/cpu/rows_baseline.cpp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources += [f"csrc/cpu/rows_{isa}.cpp" for isa in ("avx2", "avx512", "avx512bf16")]
    common = dict(
        depends=[str(path) for path in Path("csrc").rglob("*.*")],
        include_dirs=["csrc"],
        py_limited_api=True,
        optional=True,
        extra_compile_args=[
            "-std=c++20",
            "-O3",
            "-g0",
            "-fno-math-errno",
            "-ffp-contract=fast",
            "-Wno-psabi",
            "-Wno-uninitialized",
            "-Wno-maybe-uninitialized",
            "-fvisibility=hidden",
            "-DTORCH_TARGET_VERSION=0x020a000000000000",
        ],
    )
    modules = [CppExtension("kdkernels._C", sources, **common)]
    if cuda := nvcc():
        # The CUDA runtime is linked in: whatever version torch brings, both use the same driver's context.
        modules.append(
            CppExtension(
                "kdkernels._cuda",
                ["csrc/cuda/bindings.cpp"],
                **common,
                libraries=["torch_cuda", "cudart_static", "rt", "dl"],
                library_dirs=[*library_paths(), *toolkit_libraries(cuda)],
            )
        )
    commands = PerFileFlags.with_options(use_ninja=False, no_python_abi_suffix=False)
    return modules, {"build_ext": commands}


_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
ISA_FLAGS = {"avx2": _AVX2, "avx512": _AVX512, "avx512bf16": [*_AVX512, "-mavx512bf16"]}


def isa_flags(source: str) -> list:
    return ISA_FLAGS.get(Path(source).stem.removeprefix("rows_"), [])


MISSING = what_is_missing()
modules, commands = extensions()
setup(
    ext_modules=modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
