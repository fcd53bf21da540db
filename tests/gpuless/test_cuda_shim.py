"""The host shim of shim/: CUDA source as host C++, right in every thread order, and quick to show planted mistakes."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from cuda_tools import SHIM, find_cuda_headers

COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
ORDERS = [0, 1, 7]

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="no C++ compiler"),
    pytest.mark.skipif(find_cuda_headers() is None, reason="nvcc's headers (cuda_fp16.h) are not installed"),
    pytest.mark.xdist_group("cuda_shim"),  # one process builds the probes
]


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """build(*flags) → the path of the probe built with them; each set of flags is built once."""
    programs = {}

    def build(*flags):
        if flags not in programs:
            program = tmp_path_factory.mktemp("probe") / "probe"
            options = ["-std=c++20", "-O1", "-g", "-ffp-contract=off", "-isystem", find_cuda_headers(), *flags]
            command = [COMPILER, *options, str(SHIM / "probe_main.cpp"), "-o", str(program)]
            result = subprocess.run(command, capture_output=True, text=True)
            assert result.returncode == 0, result.stderr
            programs[flags] = program
        return programs[flags]

    return build


def run(program, order, *args):
    environment = {**os.environ, "CUDA_EMU_ORDER": str(order), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run([str(program), *map(str, args)], env=environment, capture_output=True, text=True)


def quantize(program, order, x, folder):
    """(exit code, stderr, q, scale) of the probe's quantize_rows."""
    M, K = x.shape
    x.tofile(folder / "x.bin")
    files = [folder / name for name in ("x.bin", "q.bin", "scale.bin")]
    result = run(program, order, "quantize", M, K, *files)
    if result.returncode:
        return result.returncode, result.stderr, None, None
    return 0, result.stderr, np.fromfile(files[1], np.int8).reshape(M, K), np.fromfile(files[2], np.float32)


def matmul(program, order, a, b, folder):
    """(exit code, stderr, c) of the probe's matmul_s8."""
    (M, K), N = a.shape, b.shape[0]
    files = [folder / name for name in ("a.bin", "b.bin", "c.bin")]
    a.tofile(files[0])
    b.tofile(files[1])
    result = run(program, order, "matmul", M, N, K, *files)
    if result.returncode:
        return result.returncode, result.stderr, None
    return 0, result.stderr, np.fromfile(files[2], np.int32).reshape(M, N)


def activations():
    return np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)


def operands(M=45, N=70, K=208):
    rng = np.random.default_rng(0)
    return tuple(rng.integers(-128, 128, shape).astype(np.int8) for shape in ((M, K), (N, K)))


def quantize_ref(x):
    amax = np.abs(x).max(axis=1)
    q = np.rint(x * (np.float32(127) / amax)[:, None])
    return q.astype(np.int8), amax / np.float32(127)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_quantize_rows(build, flags, order, tmp_path):
    x = activations()
    code, stderr, q, scale = quantize(build(*flags), order, x, tmp_path)
    assert code == 0, stderr
    q_ref, scale_ref = quantize_ref(x)
    assert np.array_equal(q, q_ref)
    assert np.array_equal(scale, scale_ref)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("flags", [(), SANITIZE], ids=["plain", "sanitized"])
def test_matmul(build, flags, order, tmp_path):
    a, b = operands()
    code, stderr, c = matmul(build(*flags), order, a, b, tmp_path)
    assert code == 0, stderr
    assert np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)


def test_missing_sync_is_caught(build, tmp_path):
    x = activations()
    results = [quantize(build("-DPLANT_MISSING_SYNC"), order, x, tmp_path) for order in ORDERS]
    assert any(code or not np.array_equal(q, quantize_ref(x)[0]) for code, _, q, _ in results)


def test_missing_wait_is_caught(build, tmp_path):
    a, b = operands()
    code, _, c = matmul(build("-DPLANT_MISSING_WAIT"), 0, a, b, tmp_path)
    assert code or not np.array_equal(c, a.astype(np.int32) @ b.astype(np.int32).T)


def test_out_of_bounds_is_caught(build, tmp_path):
    code, stderr, _, _ = quantize(build(*SANITIZE, "-DPLANT_OUT_OF_BOUNDS"), 0, activations(), tmp_path)
    assert code
    assert "heap-buffer-overflow" in stderr
