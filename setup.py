"""Builds pyops._C: the pybind11 module and the CPU ops in one extension; CUDA sources where nvcc is there.

PYOPS_CUDA=auto|0|1     build csrc/*.cu: if there is an nvcc (auto, the default), never, or fail without one
PYOPS_NATIVE=auto|1     without a C++ compiler: install without the extension (auto, the default), or fail
PYOPS_CUDA_ARCH         what to build for, such as 90a or 80;90a (default 80;90a); no device is asked for
"""

import glob
import os
import re
import shutil
import subprocess
import sys

import pybind11
from setuptools import setup
from torch.utils import cpp_extension

TARGET = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # the stable ABI of torch 2.11: one build serves every later torch
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-maybe-uninitialized", "-Wno-uninitialized", "-Wno-psabi"]


def cuda_sources() -> list[str]:
    """The .cu files to build, by PYOPS_CUDA and whether there is an nvcc."""
    wanted, sources = os.environ.get("PYOPS_CUDA", "auto"), sorted(glob.glob("csrc/*.cu"))
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"PYOPS_CUDA={wanted!r} is not one of auto, 0, 1")
    if wanted == "1" and shutil.which("nvcc") is None:
        raise SystemExit("PYOPS_CUDA=1, but there is no nvcc on the PATH")
    return sources if wanted == "1" or (wanted == "auto" and shutil.which("nvcc")) else []


def cuda_library_dirs() -> list[str]:
    """Where nvcc's own libraries lie; it may be a wrapper, so it is asked."""
    text = subprocess.run(["nvcc", "--dryrun", "x.cu"], capture_output=True, text=True).stderr
    return [path for line in text.splitlines() if "LIBRARIES=" in line for path in re.findall(r'-L"?([^"\s]+)', line)]


class BuildExtension(cpp_extension.BuildExtension):
    """Also compiles .cu files, by calling nvcc itself: a CPU build of torch refuses to."""

    def build_extension(self, ext):
        arches = os.environ.get("PYOPS_CUDA_ARCH", "80;90a").split(";")
        flags = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in arches]
        jobs = []
        for source in cuda_sources():
            out = os.path.join(self.build_temp, os.path.basename(source) + ".o")
            os.makedirs(self.build_temp, exist_ok=True)
            includes = [f"-I{path}" for path in ext.include_dirs]
            command = [
                "nvcc",
                "-O3",
                "-std=c++17",
                "-Xcompiler",
                "-fPIC",
                TARGET,
                *flags,
                *includes,
                "-c",
                source,
                "-o",
                out,
            ]
            command += ["-o", out]
            jobs.append((command, subprocess.Popen(command)))
            ext.extra_objects.append(out)
        for command, job in jobs:
            if job.wait():
                raise SystemExit("failed: " + " ".join(command))
        super().build_extension(ext)


compiler = os.environ.get("CXX", "c++").split()[-1]
if shutil.which("ccache") and shutil.which("ninja") and "CXX" not in os.environ:
    os.environ["CXX"] = "ccache c++"

cuda = cuda_sources()
extension = cpp_extension.CppExtension(
    "pyops._C",
    sorted(glob.glob("csrc/*.cpp")),
    include_dirs=[os.path.abspath("csrc"), pybind11.get_include(), *cpp_extension.include_paths()],
    define_macros=[("PYOPS_CUDA", "1")] if cuda else [],
    extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", TARGET, *WARNINGS],
    library_dirs=cuda_library_dirs() if cuda else [],
    libraries=["cudart_static", "rt", "dl"] if cuda else [],
    depends=glob.glob("csrc/*.h") + glob.glob("csrc/*.inc"),
)
if shutil.which(compiler) is None and os.environ.get("PYOPS_NATIVE", "auto") != "1":
    print(f"WARNING: no C++ compiler ({compiler}): installing the PyTorch reference only", file=sys.stderr)
    setup()
else:
    setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
