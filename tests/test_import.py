"""Importing pyops, its backends, `pyops.info()` and the command line: each in a process of its own."""

from __future__ import annotations

import json

import cases
import pytest
import torch

import pyops
from pyops import backend

TRITON = "sys.modules.keys() & {'triton'}"
NO_NATIVE = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name == "pyops._C":
            raise ImportError(f"no {name} here")
sys.meta_path.insert(0, Block())
sys.modules["triton"] = None
"""
USE = """
import torch, pyops
m = pyops.nn.Int8Linear(70, 33)
x = torch.randn(5, 70)
q, s = pyops.ops.quantize_int8(m.weight * m.weight_scale[:, None])
assert torch.equal(m(x), pyops.ops.int8_linear(x, m.weight, m.weight_scale, m.bias))
"""

once = pytest.mark.skipif(backend.forced == "ref", reason="it sets PYOPS_BACKEND itself, and shows the same under any")


def test_import_does_not_import_triton(python):
    done = python(
        "-c", f"import torch, sys; before = {TRITON}; import pyops; assert {TRITON} == before; print(pyops.__version__)"
    )
    assert (done.returncode, done.stdout.strip()) == (0, pyops.__version__), done.stderr


@once
def test_works_without_extension_and_triton(python):
    code = NO_NATIVE + USE + "i = pyops.info(); assert i.isa is None; print(i)"
    done = python("-c", code, PYOPS_BACKEND=None)
    assert done.returncode == 0, done.stderr
    assert "no pyops._C here" in done.stdout
    assert "cpu: ref" in done.stdout


@once
def test_forced_reference(python):
    done = python("-c", USE + "assert m._weight.dim() == 2; print(pyops.info())", PYOPS_BACKEND="ref")
    assert done.returncode == 0, done.stderr
    assert "switched off by PYOPS_BACKEND=ref" in done.stdout
    assert "unset PYOPS_BACKEND (it is ref)" in done.stdout


@once
def test_the_reference_is_forced_even_where_the_extension_is_loaded(python):
    code = "import sys, pyops; assert 'pyops._C' not in sys.modules"
    assert python("-c", code, PYOPS_BACKEND="ref").returncode == 0


@once
def test_a_forced_backend_that_is_missing_raises(python):
    done = python("-c", NO_NATIVE + "import pyops", PYOPS_BACKEND="cpp")
    assert done.returncode == 1
    assert "ImportError: PYOPS_BACKEND=cpp, but the compiled extension did not load: no pyops._C here" in done.stderr
    assert "pip install" in done.stderr


@once
def test_an_unknown_backend_raises(python):
    done = python("-c", "import pyops", PYOPS_BACKEND="fast")
    assert done.returncode == 1
    assert "PYOPS_BACKEND='fast' is not one of ref, cpp, triton, cuda" in done.stderr


@once
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_forced_triton_refuses_cpu_tensors(python):
    code = "import torch, pyops; pyops.nn.Int8Linear(4, 4)(torch.ones(1, 4))"
    done = python("-c", code, PYOPS_BACKEND="triton", TRITON_INTERPRET=None)
    assert done.returncode == 1
    assert "NotImplementedError: int8_linear: PYOPS_BACKEND=triton has no kernel for cpu tensors" in done.stderr


@cases.needs_native
@pytest.mark.parametrize("name", ["generic", "", None])
def test_isa_from_the_environment(python, name):
    code = USE + "print(pyops.info().isa)"
    done = python("-c", code, PYOPS_CPU_ISA=name, PYOPS_BACKEND=None)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (name or backend.native.available_cpu_isas()[-1])


@cases.needs_native
def test_an_unknown_isa_raises_at_import(python):
    done = python("-c", "import pyops", PYOPS_CPU_ISA="sse9", PYOPS_BACKEND=None)
    assert done.returncode == 1
    assert "PYOPS_CPU_ISA=sse9 is not one of generic, avx2, avx512, avx512vnni, amx" in done.stderr


@cases.needs_native
def test_an_unavailable_isa_raises():
    missing = [
        n for n in ("generic", "avx2", "avx512", "avx512vnni", "amx") if n not in backend.native.available_cpu_isas()
    ]
    before = backend.native.cpu_isa()
    for name in missing:
        with pytest.raises(ValueError, match=f"PYOPS_CPU_ISA={name}: this machine offers up to"):
            backend.native.force_cpu_isa(name)
    with pytest.raises(ValueError, match="is not one of"):
        backend.native.force_cpu_isa("neon")
    assert backend.native.cpu_isa() == before


# ------------------------------------------------------------------------------------------- info


def test_info():
    info = pyops.info()
    data = info.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert (info.version, info.torch, info.threads) == (pyops.__version__, torch.__version__, torch.get_num_threads())
    assert [b.name for b in info.backends] == ["cpp", "triton", "cuda"]
    assert all(b.why and (b.active or b.get) for b in info.backends)
    assert set(info.ops) == set(pyops.ops.registry.names)
    assert info.ops["int8_linear"]["cpu"].startswith("ref" if backend.native is None else "cpp")
    text = str(info)
    assert all(word in text for word in (info.version, info.torch, info.cpu, "int8_linear", "triton"))


def test_public_names():
    assert set(pyops.__all__) <= set(dir(pyops))
    assert {"swap_", "Int8Dynamic", "info", "nn", "ops", "Report"} <= set(pyops.__all__)
    assert callable(pyops.info)


# ------------------------------------------------------------------------------------------- command line


def test_cli_info(python):
    done = python("-m", "pyops", "info")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"pyops    {pyops.__version__}")
    done = python("-m", "pyops", "info", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["version"] == pyops.__version__


@pytest.mark.parametrize("arguments", [(), ("nonsense",), ("info", "--nonsense")], ids=str)
def test_cli_usage_errors(python, arguments):
    done = python("-m", "pyops", *arguments)
    assert done.returncode == 2
    assert "usage: python -m pyops" in done.stderr


def test_cli_help_and_version(python):
    assert python("-m", "pyops", "--help").returncode == 0
    assert python("-m", "pyops", "--version").stdout.strip() == pyops.__version__


def test_cli_forwards_to_bench(monkeypatch):
    import sys
    import types

    from pyops.__main__ import main

    seen = []
    run = types.ModuleType("pyops.bench.run")
    run.main = lambda argv: seen.append(argv) or 7
    monkeypatch.setitem(sys.modules, "pyops.bench.run", run)
    monkeypatch.setattr("pyops.bench.run", run, raising=False)
    assert main(["bench", "int8_linear", "--help"]) == 7
    assert seen == [["int8_linear", "--help"]]
