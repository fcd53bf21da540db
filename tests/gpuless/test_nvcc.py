"""nvcc on the example kernels: they compile for every target without spills and use the instructions they name."""

import subprocess

import pytest
from cuda_tools import SHIM, find_cuobjdump, find_nvcc, inspect_cubin

pytestmark = [
    pytest.mark.skipif(find_nvcc() is None, reason="nvcc is not installed"),
    pytest.mark.skipif(find_cuobjdump() is None, reason="cuobjdump is not installed (the Triton wheel holds one)"),
]


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_probe(arch, tmp_path):
    cubin = tmp_path / "probe.cubin"
    command = [find_nvcc(), "-std=c++17", "-cubin", f"-arch={arch}", "-Xptxas", "-v", str(SHIM / "probe.cu")]
    result = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    functions = [line for line in result.stderr.splitlines() if "bytes stack frame" in line]
    assert len(functions) == 2
    for line in functions:
        assert line.strip() == "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    found = inspect_cubin(cubin)
    assert found["stack_bytes"] == found["local_bytes"] == 0
    for opcode in ("IMMA.16832", "LDSM.16.M88.4", "LDGSTS.E.BYPASS.128", "SHFL.BFLY", "BAR.SYNC"):
        assert any(name.startswith(opcode) for name in found["opcodes"]), (opcode, found["opcodes"])
