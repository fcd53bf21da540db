"""Swapped models under torch.compile, torch.export and AOTInductor on the CPU, with a batch of any size."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

import pyops

WIDTH = 64
CALIBRATION = [torch.randn(4, 5, WIDTH, generator=torch.Generator().manual_seed(2))]
CONFIGS = {
    "int8": pyops.Int8Dynamic(),
    "int8_static": pyops.Int8Static(CALIBRATION, smooth=0.5),
    "int8_weight": pyops.Int8Weight(),
    "int4": pyops.Int4Weight(group_size=32),
    "int4_float": pyops.Int4Weight(group_size=-1, symmetric=True, compute="float"),
    "fp8": pyops.Fp8Dynamic(),
}
OPS = {"int8": "int8_linear", "int8_static": "int8_linear", "int8_weight": "int8_weight_linear", "fp8": "fp8_linear"}
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler for what inductor writes")

RUN = """
import sys, torch, pyops
kind, file, inputs, result = sys.argv[1:]
if kind == "export":
    model = torch.export.load(file).module()
else:
    model = torch._inductor.aoti_load_package(file)
with torch.no_grad():
    torch.save([model(x) for x in torch.load(inputs)], result)
"""
"""Run a saved program where nothing but pyops was imported."""


@pytest.fixture(autouse=True)
def quiet(fresh_compiler: None) -> Iterator[None]:
    """Without torch's warnings of its own deprecations."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Mlp(nn.Module):
    """relu in between: compiled it is the same, bit by bit, which gelu is not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, WIDTH]."""
        return self.down(torch.relu(self.up(x)))


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return Mlp().eval()


class Decoder(nn.Module):
    """One decoder layer of a Llama of transformers, with its mask and rotary embedding."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            hidden_size=WIDTH,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=32,
        )
        self.model = transformers.LlamaModel(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, WIDTH]."""
        return self.model(inputs_embeds=x, use_cache=False).last_hidden_state


def decoder() -> nn.Module:
    torch.manual_seed(0)
    return Decoder().eval()


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "decoder": decoder}
EXACT = {"mlp"}


def swapped(model: str, config: str) -> nn.Module:
    new = MODELS[model]()
    report = pyops.swap_(new, CONFIGS[config])
    assert all(row.swapped for row in report.rows)
    return new.requires_grad_(False)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(batch, 5, WIDTH, generator=generator) for batch in (3, 1, 7)]


def check(model: str, got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        if model in EXACT:
            assert torch.equal(a, b)
        else:  # a value that inductor rounds otherwise may be another step of int8 in the next layer
            assert (a - b).norm() <= 1e-2 * b.norm()


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (batches()[0],), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))


@needs_compiler
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_compile(model: str, config: str) -> None:
    """One graph, which serves every batch."""
    new = swapped(model, config)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        want = [new(x) for x in batches()]
        compiled = torch.compile(new, fullgraph=True, dynamic=True, backend=count)
        check(model, [compiled(x) for x in batches()], want)
        if model == "mlp":
            assert len(graphs) <= 2  # a batch of one is another graph
            inductor = torch.compile(new, fullgraph=True, dynamic=True)
            check(model, [inductor(x) for x in batches()], want)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("model", MODELS)
def test_export(model: str, config: str) -> None:
    """The op is one node for each layer, and its weight is held once, as the layer holds it."""
    new = swapped(model, config)
    program = exported(new)
    op = OPS.get(config, "int4_linear")
    nodes = [node for node in program.graph.nodes if getattr(torch.ops.pyops, op).default is node.target]
    layers = {name: layer for name, layer in new.named_modules() if isinstance(layer, pyops.nn.linear.QuantLinear)}
    assert len(nodes) == len(layers)
    for name, layer in layers.items():
        held = {**program.state_dict, **program.constants}[f"{name}._weight"]
        assert held.dtype == layer._weight.dtype
        assert held.shape == layer._weight.shape
    run = program.module()
    with torch.no_grad():
        check(model, [run(x) for x in batches()], [new(x) for x in batches()])


@pytest.mark.parametrize("config", CONFIGS)
def test_exported_program_in_another_process(config: str, tmp_path: Path, python: Callable) -> None:
    new = swapped("mlp", config)
    torch.export.save(exported(new), tmp_path / "model.pt2")
    torch.save(batches(), tmp_path / "inputs.pt")
    files = [str(tmp_path / name) for name in ("model.pt2", "inputs.pt", "result.pt")]
    done = python("-c", RUN, "export", *files)
    assert done.returncode == 0, done.stderr
    check("mlp", torch.load(files[2]), [new(x) for x in batches()])


@needs_compiler
@pytest.mark.parametrize("config", CONFIGS)
def test_aotinductor(config: str, tmp_path: Path, python: Callable) -> None:
    """The package runs here, and where nothing but pyops was imported."""
    new = swapped("mlp", config)
    with torch.no_grad():
        want = [new(x) for x in batches()]
        file = torch._inductor.aoti_compile_and_package(exported(new), package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(file)
        check("mlp", [run(x) for x in batches()], want)
    torch.save(batches(), tmp_path / "inputs.pt")
    done = python("-c", RUN, "aoti", file, str(tmp_path / "inputs.pt"), str(tmp_path / "result.pt"))
    assert done.returncode == 0, done.stderr
    check("mlp", torch.load(tmp_path / "result.pt"), want)


@needs_compiler
def test_aotinductor_of_a_decoder(tmp_path: Path) -> None:
    new = swapped("decoder", "int4")
    with torch.no_grad():
        file = torch._inductor.aoti_compile_and_package(exported(new), package_path=str(tmp_path / "model.pt2"))
        run = torch._inductor.aoti_load_package(file)
        check("decoder", [run(x) for x in batches()], [new(x) for x in batches()])


@pytest.mark.parametrize("config", CONFIGS)
def test_compiled_gradients(config: str) -> None:
    """Of the input and the bias, through the graph that AOTAutograd makes."""
    new = MODELS["mlp"]()
    pyops.swap_(new, CONFIGS[config])
    compiled = torch.compile(new, fullgraph=True, dynamic=True, backend="aot_eager")
    found = []
    for run in (new, compiled):
        x = batches()[0].requires_grad_()
        new.zero_grad()
        run(x).square().sum().backward()
        found.append((x.grad, new.up.bias.grad.clone()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
