"""Ten thousand malformed sparse weights, against the CPU kernels built with AddressSanitizer: no read out of bounds."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cases
import pytest
from conftest import CHECKOUT
from torch.utils import cpp_extension

from pyops import backend

CASES = 10_000
ISAS = ("generic", "avx2", "avx512", "avx512vnni")
"""Those that have kernels of their own; the cases are dealt out to what this machine has of them."""
SOURCES = ("cpu", "sparse_conv2d*", "int8_sparse_conv2d*")
KINDS = ("indices", "counts", "sizes", "window", "dtypes", "blobs", "states")
COMPILER = os.environ.get("CXX", "g++").split()[-1]


def runtime(name: str) -> str | None:
    """The path of one of the compiler's libraries."""
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        return None
    found = subprocess.run([COMPILER, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return found if os.path.isabs(found) and os.path.exists(found) else None


PRELOADED = [runtime("libasan.so"), runtime("libstdc++.so.6")]
"""The second because AddressSanitizer has to find the C++ runtime that it wraps."""
pytestmark = [
    cases.needs_native,
    pytest.mark.skipif(None in PRELOADED, reason=f"{COMPILER} has no libasan.so here"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """The sparse kernels alone. Not optimized: that would take minutes, and may drop a load that nobody looks at."""
    folder = tmp_path_factory.mktemp("sanitized")
    flags = ["-O0", "-g1", "-w", "-std=c++17", "-fPIC", "-fsanitize=address"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000", *(f"-I{path}" for path in cpp_extension.include_paths())]

    def run(*command: object) -> None:
        done = subprocess.run([COMPILER, *(str(part) for part in command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    found = [path for name in SOURCES for path in (CHECKOUT / "csrc").glob(f"{name}.cpp")]
    sources = [path for path in found if not path.stem.endswith("_python")]  # a binding, which is no op
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(lambda path: run("-c", *flags, path, "-o", folder / f"{path.stem}.o"), sources))
    out = folder / "sparse.so"
    libraries = [*(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    run("-shared", "-fsanitize=address", *folder.glob("*.o"), "-o", out, *libraries)
    return out


def sanitized(*arguments: str, **env: str) -> subprocess.Popen:
    """A python under AddressSanitizer."""
    env = {
        **os.environ,
        "LD_PRELOAD": " ".join(PRELOADED),
        "ASAN_OPTIONS": "detect_leaks=0:allocator_may_return_null=1",
        "PYTHONPATH": os.pathsep.join((str(CHECKOUT), str(CHECKOUT / "tests"))),
        "OMP_NUM_THREADS": "1",
        **env,
    }
    env.pop("PYOPS_BACKEND", None)
    return subprocess.Popen(
        [sys.executable, *arguments], env=env, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_ten_thousand_malformed_weights(library):
    isas = [name for name in backend.native.available_cpu_isas() if name in ISAS]
    worker, seen = str(CHECKOUT / "tests/sparse_fuzz_worker.py"), Counter()
    running = []
    try:
        for seed, isa in enumerate(isas):
            share = CASES * (seed + 1) // len(isas) - CASES * seed // len(isas)
            running.append(sanitized(worker, str(library), str(seed), str(share), PYOPS_CPU_ISA=isa))
        for isa, child in zip(isas, running, strict=True):
            out, said = child.communicate(timeout=400)
            assert child.returncode == 0, f"{isa}:\n{said[:6000]}\n{said[-2000:]}"
            seen.update(json.loads(out))
    finally:
        for child in running:
            child.kill()
    assert seen.total() == CASES
    for kind in KINDS:  # else it would show nothing
        assert seen[f"{kind} refused"] > 100, seen
        assert seen[f"{kind} accepted"] > 10, seen


OVERREAD = """
import ctypes, torch
t = torch.ones(30, dtype=torch.int32)
print(len(ctypes.string_at(t.data_ptr(), 120)), flush=True)
ctypes.string_at(t.data_ptr(), 121)
"""


def test_a_read_of_one_byte_too_many_is_seen():
    child = sanitized("-c", OVERREAD)
    out, said = child.communicate(timeout=100)
    assert out.strip() == "120", said
    assert "heap-buffer-overflow" in said
    assert child.returncode != 0
