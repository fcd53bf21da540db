"""sdist and the wheel built from it, installed into a new environment and used from outside the checkout."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]

USE = """
import pathlib, sys, torch, pyops
assert not pathlib.Path(pyops.__file__).is_relative_to({root!r}), pyops.__file__
from pyops import backend
assert backend.native is not None, backend.native_missing
w_q, w_scale = pyops.ops.quantize_int8(torch.randn(50, 70))
x = torch.randn(3, 70)
y = pyops.ops.int8_linear(x, pyops.ops.pack_int8(w_q), w_scale, activation="relu")
want = torch.relu(x @ (w_q * w_scale[:, None]).T)
assert (y - want).norm() < 0.02 * want.norm()
import pyops.bench.run
try:
    import kernels
except ModuleNotFoundError:
    print("ok")
"""


def run(*command, cwd, env=None):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Compiles without optimization: what is built here has to work, and not to be fast."""
    compiler = tmp_path_factory.mktemp("bin") / "c++"
    real = os.environ.get("CXX", shutil.which("c++"))
    compiler.write_text(f'#!/bin/sh\nexec {real} "$@" -O0\n')
    compiler.chmod(0o755)
    return {**os.environ, "CXX": str(compiler)}


@pytest.fixture(scope="module")
def distributions(tmp_path_factory, environment):
    """The sdist, of a copy of the checkout, and the wheel that is built from it, as pip does with an sdist."""
    tmp = tmp_path_factory.mktemp("build")
    copy = tmp / "checkout"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    )
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp / "dist", copy, cwd=tmp, env=environment)
    (sdist,), (wheel,) = (tmp / "dist").glob("*.tar.gz"), (tmp / "dist").glob("*.whl")
    return {"sdist": sdist, "wheel": wheel}


def install(distribution, tmp_path, env=None):
    """The python of a new environment that holds the distribution and borrows torch from this one."""
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    # A path file inside a path file is not followed, so that an editable install of the checkout stays out.
    purelib = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip()
    (pathlib.Path(purelib) / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation")
    run(*pip, distribution, cwd=tmp_path, env=env)
    return python


def test_installs_and_runs_outside_the_checkout(distributions, tmp_path):
    python = install(distributions["wheel"], tmp_path)
    assert run(python, "-c", USE.format(root=str(ROOT)), cwd=tmp_path).strip() == "ok"
    assert run(python, "-m", "pyops", "info", cwd=tmp_path)


def test_installs_without_a_compiler(distributions, tmp_path):
    """From the sdist, with nothing on the PATH: the reference is installed, and says why it is alone."""
    python = install(distributions["sdist"], tmp_path, env={"PATH": str(tmp_path), "HOME": str(tmp_path)})
    code = (
        "import torch, pyops; from pyops import backend;"
        "w_q, s = pyops.ops.quantize_int8(torch.randn(5, 7)); pyops.ops.int8_linear(torch.randn(2, 7), w_q, s);"
        "print(backend.native, 'pyops._C' in backend.native_missing)"
    )
    assert run(python, "-c", code, cwd=tmp_path).strip() == "None True"


def test_wheel_holds_every_layer_of_an_op_and_nothing_else(distributions):
    names = zipfile.ZipFile(distributions["wheel"]).namelist()
    for part in ("pyops/ops/int8_linear.py", "pyops/kernels/int8_linear.py", "pyops/bench/int8_linear.py"):
        assert part in names
    assert "pyops/report.html.jinja" in names
    assert any(n.startswith("pyops/_C.") for n in names)
    tops = {n.split("/")[0] for n in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"pyops"}


def test_sdist_holds_what_a_build_needs(distributions):
    with tarfile.open(distributions["sdist"]) as archive:
        names = {n.split("/", 1)[-1] for n in archive.getnames()}
    assert {"LICENSE", "README.md", "setup.py", "csrc/int8_linear.cpp", "csrc/epilogue.inc", "csrc/vec.h"} <= names
    assert {"kernels/int8_linear.py", "bench/int8_linear.py", "pyops/ops/int8_linear.py"} <= names
    assert "pyops/report.html.jinja" in names


def test_checkout_does_not_shadow_the_package_named_kernels(tmp_path):
    """`import kernels` with the checkout installed must not find its folder of Triton sources."""
    code = "import pyops, importlib.util; print(importlib.util.find_spec('kernels'), importlib.util.find_spec('bench'))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).strip() == "None None"


CUDA_PROBE = """
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
__global__ void touch(float* x) { x[threadIdx.x] = 1.0f; }
int64_t launch(torch::stable::Tensor x) {
  touch<<<1, 1>>>(static_cast<float*>(x.data_ptr()));
  return cudaGetLastError();
}
STABLE_TORCH_LIBRARY(pyops_probe, m) { m.def("launch(Tensor x) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(pyops_probe, CPU, m) { m.impl("launch", TORCH_BOX(&launch)); }
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on the PATH")
def test_cuda_sources_build_and_import_without_a_gpu(tmp_path, environment):
    """A .cu beside the others is compiled by nvcc; the extension imports and a launch reports its error."""
    ignore = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.so", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignore)
    (tmp_path / "checkout/csrc/probe.cu").write_text(CUDA_PROBE)
    env = {**environment, "PYOPS_CUDA": "1", "PYOPS_CUDA_ARCH": "90a"}
    env.pop("PYTHONPATH", None)
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=tmp_path / "checkout", env=env)
    code = (
        "import torch; from pyops import backend; assert backend.native.build_info()['cuda'];"
        "error = torch.ops.pyops_probe.launch(torch.zeros(1));"
        "assert torch.cuda.is_available() or error != 0; print('ok')"
    )
    assert run(sys.executable, "-c", code, cwd=tmp_path / "checkout", env=env).strip() == "ok"
