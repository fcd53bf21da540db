"""Configs of `pyops.swap_` that quantize: what they take, what they refuse, what the report says of them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from cases import randn
from torch import nn

import pyops
from pyops import backend, ops
from pyops.nn import Fp8Linear, Int4Linear, Int8Linear

pytestmark = pytest.mark.usefixtures("short_turns")

MODULES = {
    pyops.Int8Dynamic(): Int8Linear,
    pyops.Int8Weight(): Int8Linear,
    pyops.Int4Weight(): Int4Linear,
    pyops.Fp8Dynamic(): Fp8Linear,
}
"""Every config and what it makes."""


@pytest.fixture(params=MODULES, ids=lambda config: config.choice)
def config(request):
    return request.param


def mlp(*sizes):
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(k, n) for k, n in itertools.pairwise(sizes))).eval()


def test_configs_are_frozen_values(config):
    assert config == type(config)()
    assert hash(config) == hash(type(config)())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.choice = "other"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"group_size": 48}, ValueError, "group_size is 48; allowed: 32, a multiple of 64, or -1"),
        ({"group_size": 0}, ValueError, "group_size is 0"),
        ({"group_size": True}, TypeError, "group_size must be an int, got bool"),
        ({"group_size": "128"}, TypeError, "group_size must be an int, got str"),
        ({"symmetric": 1}, TypeError, "symmetric must be True or False, got 1"),
        ({"method": "gptq"}, ValueError, "method='gptq' is not one of rtn, mse"),
        ({"compute": "fp16"}, ValueError, "compute='fp16' is not one of auto, int8, float"),
        ({"compute": ["int8"]}, ValueError, "compute=.'int8'. is not one of"),
        ({"groupsize": 64}, TypeError, "groupsize"),
    ],
    ids=str,
)
def test_bad_int4_weight(arguments, error, message):
    with pytest.raises(error, match=message):
        pyops.Int4Weight(**arguments)


def test_what_is_swapped_and_what_the_report_says(config):
    model, x = mlp(70, 33, 64, 5), randn(6, 70)
    before = {name: m.weight.numel() for name, m in model.named_children()}
    y = model(x)
    rows = pyops.swap_(model, config, example_inputs=x).rows
    assert [(row.name, row.choice, row.kind) for row in rows] == [(n, config.choice, "Linear") for n in "012"]
    for row in rows:
        layer = model.get_submodule(row.name)
        assert type(layer) is MODULES[config]
        held = [*layer._parameters.values(), *(b for b in layer._buffers.values() if b is not None)]
        assert row.bytes_after == sum(t.untyped_storage().nbytes() for t in held), "views would keep more alive"
        assert row.bytes_before == 4 * (before[row.name] + layer.out_features)
        assert row.ms_before > 0
        assert row.ms_after > 0
        assert row.sqnr_db > {"int4_weight": 15, "fp8_dynamic": 25}.get(config.choice, 35)
    assert 10 * torch.log10(y.square().sum() / (model(x) - y).square().sum()) > 12


@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"symmetric": True}, {"method": "mse"}], ids=str)
def test_int4_weight_passes_its_fields_on(options):
    model = nn.Sequential(nn.Linear(128, 64))
    expected = ops.quantize_int4(model[0].weight, **{"group_size": 128, **options})
    pyops.swap_(model, pyops.Int4Weight(**options))
    layer = model[0]
    assert all(a is None if b is None else torch.equal(a, b) for a, b in zip(_state(layer), expected, strict=True))
    assert (layer.group_size, layer.symmetric) == (options.get("group_size", 128), "symmetric" in options)
    assert layer.weight_scale.dtype is torch.bfloat16


def _state(layer):
    return layer.weight, layer.weight_scale, layer.weight_zero


@pytest.mark.parametrize("compute", ["auto", "int8", "float"])
def test_int4_weight_computes_as_told(compute):
    model, x = nn.Sequential(nn.Linear(64, 8)), randn(3, 64)
    pyops.swap_(model, pyops.Int4Weight(compute=compute))
    expected = {"int8": "int8", "auto": "int8", "float": "float"}[compute]
    assert torch.equal(model(x), ops.int4_linear(x, *_state(model[0]), model[0].bias, compute=expected))


def test_bytes_of_large_layers_are_what_the_format_says():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    row = pyops.swap_(model, pyops.Int4Weight()).rows[0]
    steps = 1024 * 4 if backend.native else 0  # of the packed form
    assert row.bytes_after == 1024 * 1024 // 2 + 1024 * 8 * 3 + steps  # 4 bits a weight, bf16 and a byte a group
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False))
    row = pyops.swap_(model, pyops.Int4Weight(group_size=64, symmetric=True)).rows[0]
    assert row.bytes_after == 1024 * 1024 // 2 + 1024 * 16 * 2 + steps


def test_a_layer_given_itself_is_told_how_to_convert():
    with pytest.raises(ValueError, match=r"pyops\.nn\.Int4Linear\.from_float\(model, group_size=64, symmetric=False,"):
        pyops.swap_(nn.Linear(3, 3), pyops.Int4Weight(group_size=64))
    scope = {"pyops": pyops, "model": nn.Linear(64, 3)}
    layer = eval(pyops.Int4Weight(group_size=64, method="mse").by_hand(scope["model"]), scope)
    assert (type(layer), layer.group_size) == (Int4Linear, 64)


def test_a_tied_embedding_is_untouched(config):
    model = nn.ModuleDict({"embed": nn.Embedding(50, 32), "head": nn.Linear(32, 50, bias=False)})
    model["head"].weight = model["embed"].weight
    weight = model["embed"].weight
    before = weight.detach().clone()
    row = pyops.swap_(model, config).rows[0]
    assert "its weight was tied to embed.weight: the tie is cut" in row.reason
    assert type(model["head"]) is MODULES[config]
    assert model["embed"].weight is weight
    assert torch.equal(weight, before)


def test_a_swapped_model_is_saved_and_loaded_into_a_swapped_one(config):
    model, fresh = mlp(70, 64, 32), mlp(70, 64, 32)
    pyops.swap_(model, config)
    pyops.swap_(fresh, config)
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    fresh.load_state_dict(model.state_dict())
    x = randn(4, 70)
    assert torch.equal(fresh(x), model(x))


def test_a_swapped_meta_model_takes_a_checkpoint(config):
    model = mlp(70, 64, 32)
    pyops.swap_(model, config)
    with torch.device("meta"):
        empty = nn.Sequential(nn.Linear(70, 64), nn.Linear(64, 32))
    pyops.swap_(empty, config, example_inputs=torch.empty(4, 70, device="meta"))
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    empty.load_state_dict(model.state_dict(), assign=True)
    x = randn(4, 70)
    assert torch.equal(empty(x), model(x))


def test_a_swapped_model_is_swapped_no_further(config):
    model = mlp(64, 32)
    pyops.swap_(model, config)
    assert [pyops.swap_(model, other).rows for other in MODULES] == [[]] * len(MODULES)
