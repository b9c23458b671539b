"""Builds kdkernels._C where torch and a C++20 compiler are at hand; else installs pure Python.

One set of sources is compiled once per instruction set (csrc/cpu/rows_*.cpp) and linked together;
which one runs is decided on the machine that runs it. The extension uses torch's stable ABI and
Python's limited API, so one build serves torch 2.10 and later and Python 3.10 and later.
"""

import platform
import shutil
import sys
from pathlib import Path

from setuptools import setup


def torch_is_here() -> bool:
    try:
        import torch

        return tuple(int(x) for x in torch.__version__.split("+")[0].split(".")[:2]) >= (2, 10)
    except Exception as error:  # a broken torch must not stop a pure Python install
        print(f"kdkernels: no torch at build time ({error})", file=sys.stderr)
        return False


def extension():
    """(ext_modules, cmdclass), empty where the extension cannot be built."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not torch_is_here():
        print("kdkernels: installing without the native backend", file=sys.stderr)
        return [], {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    class PerFileFlags(BuildExtension):
        """Gives each rows_<isa>.cpp its own -m flags, and goes on without the extension if it fails."""

        def build_extensions(self):
            original = self.compiler._compile

            def compile_one(obj, src, ext, cc_args, extra_postargs, pp_opts):
                original(obj, src, ext, cc_args, list(extra_postargs) + isa_flags(src), pp_opts)

            self.compiler._compile = compile_one
            super().build_extensions()

        def run(self):
            try:
                super().run()
            except Exception as error:
                print(f"kdkernels: no native backend, the build failed: {error}", file=sys.stderr)
                self.extensions = []

        def copy_extensions_to_source(self):
            if self.extensions:
                super().copy_extensions_to_source()

    sources = ["csrc/bindings.cpp", "csrc/cpu/rows_baseline.cpp"]
    if platform.machine().lower() in ("x86_64", "amd64"):
        sources += ["csrc/cpu/rows_avx2.cpp", "csrc/cpu/rows_avx512.cpp"]
    module = CppExtension(
        "kdkernels._C",
        sources,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        include_dirs=["csrc"],
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
        ],  # fmt: skip
        py_limited_api=True,
        optional=True,
    )
    commands = PerFileFlags.with_options(use_ninja=False, no_python_abi_suffix=False)
    return [module], {"build_ext": commands}


def isa_flags(source: str) -> list:
    if source.endswith("rows_avx512.cpp"):
        return ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c",
                "-mprefer-vector-width=512"]  # fmt: skip
    return ["-mavx2", "-mfma", "-mf16c"] if source.endswith("rows_avx2.cpp") else []


modules, commands = extension()
setup(
    ext_modules=modules,
    cmdclass=commands,
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if modules else {},
)
