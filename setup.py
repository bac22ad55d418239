"""Builds the kernels that skip zeros, where there is a C++ compiler; everything else is in pyproject.toml.

The extension is optional: without a compiler the package installs and runs through torch. ``SECATEUR_NO_KERNELS=1``
leaves it out on purpose. It is a plain C library that Python loads with ctypes, so that it needs neither torch's
headers nor Python's.
"""

import os
import subprocess
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = "src/secateur/sparse/csrc"
# GCC takes the registers that its own intrinsics leave undefined on purpose for forgotten ones.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-uninitialized",
    "-Wno-maybe-uninitialized",
]
KERNELS = Extension(
    "secateur.sparse._kernels",
    sources=sorted(path.as_posix() for path in Path(CSRC).glob("*.cpp")),
    depends=sorted(path.as_posix() for path in Path(CSRC).glob("*.h")),
    language="c++",
    extra_compile_args=FLAGS,
    optional=True,
)


class Build(build_ext):
    """Adds OpenMP where the compiler has it; without it the kernels run on one thread."""

    def build_extension(self, ext: Extension) -> None:
        if self._has_openmp():
            ext.extra_compile_args = [*ext.extra_compile_args, "-fopenmp"]
            ext.extra_link_args = [*ext.extra_link_args, "-fopenmp"]
        super().build_extension(ext)

    def _has_openmp(self) -> bool:
        source = "#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n"
        compiler = getattr(self.compiler, "compiler_cxx", None) or ["c++"]
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory, "openmp.cpp")
            path.write_text(source)
            command = [compiler[0], "-fopenmp", str(path), "-o", str(Path(directory, "openmp"))]
            try:
                return subprocess.run(command, capture_output=True).returncode == 0
            except OSError:
                return False


setup(
    ext_modules=[] if os.environ.get("SECATEUR_NO_KERNELS") == "1" else [KERNELS],
    cmdclass={"build_ext": Build},
)
