"""Malformed sparse weights against a build of the kernels; `test_sparse_fuzz.py` starts it under AddressSanitizer, as

python tests/sparse_fuzz_worker.py LIBRARY SEED CASES

Each case changes one thing of a good call: the indices, a size, the window, a dtype, the packed form, a state_dict.
What is malformed must raise; what happens to be right still has to give the reference's answer. The library stands in
for `pyops._C`, so that the layers run on it too. Prints how many cases of each kind were refused and accepted, as JSON.
"""

from __future__ import annotations

import json
import random
import sys
import types
from collections import Counter
from collections.abc import Callable

import torch

LIBRARY = sys.argv[1]
torch.set_num_threads(1)
sys.modules["pyops._C"] = types.SimpleNamespace(
    cpu_isa=lambda: "",
    available_cpu_isas=list,
    build_info=lambda: {"cuda": False},
    sparse_conv2d=lambda *args: False,  # the op instead
)
import pyops.ops.int8_sparse_conv2d_native  # noqa: E402  these define what the library implements
import pyops.ops.sparse_conv2d_native  # noqa: E402, F401

torch.ops.load_library(LIBRARY)

from cases import randn, sparse_weight  # noqa: E402
from test_sparse_weight import int32, is_structure, mutate  # noqa: E402

from pyops import ops  # noqa: E402
from pyops.nn import Int8SparseConv2d, SparseConv2d, SparseLinear  # noqa: E402
from pyops.ops.int8_sparse_conv2d import int8_sparse_conv2d_ref  # noqa: E402
from pyops.ops.sparse_conv2d import (  # noqa: E402
    output_size,
    sparse_conv2d_dw_ref,
    sparse_conv2d_dx_ref,
    sparse_conv2d_ref,
)
from pyops.ops.sparse_weight import PATTERNS  # noqa: E402

native = torch.ops.pyops
REFUSED = (RuntimeError, ValueError)
SPECIAL = (-(2**31), -1, 0, 1, 2, 3, 7, 64, 65, 2**15, 2**20, 2**24, 2**31 - 1, 2**31, 2**40, 2**62)


def exact(t: torch.Tensor) -> torch.Tensor:
    """A copy in an allocation of its own, of just its size: whatever is read behind it is reported."""
    return t.clone(memory_format=torch.preserve_format)


class Call:
    """A good call of every op, and its parts by name, to be changed."""

    def __init__(self, rng: random.Random) -> None:
        groups, self.int8 = rng.choice((1, 1, 2, 3)), rng.random() < 0.3
        shape = (groups * rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 3), rng.randint(1, 3))
        self.pattern = "ic_block4" if self.int8 else rng.choice(list(PATTERNS))
        seed = rng.randrange(1000)
        weight = sparse_weight(*shape, keep=rng.random(), seed=seed, pattern=self.pattern, groups=groups)
        if self.int8:
            weight, self.scale = ops.quantize_sparse(weight)
        dtype = rng.choice((torch.float32, torch.bfloat16))
        x = randn(rng.randint(1, 3), groups * shape[1], rng.randint(1, 9), rng.randint(1, 9), dtype=dtype, seed=seed)
        self.channels_last = rng.random() < 0.5 and not x.is_contiguous(memory_format=torch.channels_last)
        self.x = exact(x.contiguous(memory_format=torch.channels_last)) if self.channels_last else x
        self.parts = {
            "values": weight.values.to(rng.choice((dtype, torch.float32))) if not self.int8 else weight.values,
            "crow": weight.crow_indices,
            "col": weight.col_indices,
            "shape": list(shape),
            "block": list(weight.block),
            "stride": [rng.randint(1, 3) for _ in range(2)],
            "padding": [rng.randint(2, 4) for _ in range(4)],
            "dilation": [rng.randint(1, 2) for _ in range(2)],
            "groups": groups,
            "x_shape": list(x.shape),
        }
        self.parts["values"] = exact(self.parts["values"])
        window = (self.parts[name] for name in ("stride", "padding", "dilation"))
        y = output_size(x.shape, shape, *window)
        self.bias, self.residual = randn(shape[0]), randn(*y, dtype=dtype)
        self.grad = randn(*y, dtype=dtype, seed=1)
        if self.channels_last:
            self.grad = exact(self.grad.contiguous(memory_format=torch.channels_last))

    def ops(self, p: dict, packed: torch.Tensor | None = None) -> dict[str, tuple[Callable, Callable]]:
        """Every op with the parts `p`: the native one, and its reference."""
        weight = (p["values"], p["crow"], p["col"], p["shape"], p["block"])
        structure, window = weight[1:], (p["stride"], p["padding"], p["dilation"], p["groups"])
        if self.int8:
            scaled = (self.x, p["values"], self.scale, *structure[:3], self.bias, self.residual, *window, "relu")
            return {
                "int8": (
                    lambda: native.int8_sparse_conv2d_native(*scaled, None, packed),
                    lambda: int8_sparse_conv2d_ref(*scaled),
                ),
                "pack": (lambda: native.sparse_conv2d_pack(*weight, *window, p["x_shape"], self.channels_last), None),
            }
        forward = (self.x, *weight, self.bias, self.residual, *window, "relu")
        dx = (self.grad, *weight, p["x_shape"], *window)
        dw = (self.grad, self.x, *structure, *window)
        return {
            "native": (lambda: native.sparse_conv2d_native(*forward, packed), lambda: sparse_conv2d_ref(*forward)),
            "dx": (lambda: native.sparse_conv2d_dx_native(*dx, packed), lambda: sparse_conv2d_dx_ref(*dx)),
            "dw": (lambda: native.sparse_conv2d_dw_native(*dw), lambda: sparse_conv2d_dw_ref(*dw)),
            "pack": (
                lambda: native.sparse_conv2d_pack(
                    *weight, *window, p["x_shape"], self.channels_last, p["crow"].numel() % 2 > 0
                ),
                None,
            ),
            "pack_dx": (lambda: native.sparse_conv2d_pack_dx(*weight, *window, p["x_shape"], self.channels_last), None),
        }


def close(y: torch.Tensor, expected: torch.Tensor) -> None:
    bound = 0.05 if y.dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(y.float(), expected.float(), rtol=bound, atol=bound * 4, equal_nan=True)


def try_all(call: Call, parts: dict, malformed: bool | None = None, packed: torch.Tensor | None = None) -> bool:
    """Whether any op took the call. `malformed`: all have to raise; False: none may; None: either."""
    taken = False
    for name, (op, reference) in call.ops(parts, packed).items():
        values = parts["values"]
        if name == "dw" and (values is not call.parts["values"] or len(values) != parts["col"].numel()):
            continue  # it takes no values, so that this may be right
        try:
            y = op()
        except REFUSED:
            assert malformed is not False, f"{name} refused what is right"
            continue
        assert not malformed, f"{name} took a malformed call"
        taken = True
        if reference is not None:
            close(y, reference())
    return taken


# ------------------------------------------------------------------------------------------- kinds of cases


def indices(rng: random.Random, call: Call) -> bool:
    """Values of crow and col."""
    parts = call.parts
    crow, col = parts["crow"].tolist(), parts["col"].tolist()
    for _ in range(rng.randint(1, 3)):
        mutate(rng, rng.choice((crow, col)))
    right = is_structure(len(parts["values"]), crow, col, parts["shape"], tuple(parts["block"]), parts["groups"])
    return try_all(call, parts | {"crow": int32(*crow), "col": int32(*col)}, malformed=not right)


def counts(rng: random.Random, call: Call) -> bool:
    """More or fewer values and indices than fit."""
    name, parts = rng.choice(("values", "crow", "col")), call.parts
    t, n = parts[name], rng.randint(1, 3)
    changed = t[:-n] if rng.random() < 0.5 else torch.cat([t, t.new_zeros((n, *t.shape[1:]))])
    return try_all(call, parts | {name: exact(changed)}, malformed=len(changed) != len(t))


def sizes(rng: random.Random, call: Call) -> bool:
    """An entry of the weight's shape, its block, groups; or a list of another length."""
    name = rng.choice(("shape", "shape", "block", "groups"))
    value = call.parts[name]
    if name == "groups":
        changed = rng.choice(SPECIAL)
    elif rng.random() < 0.1:
        changed = rng.choice((value[:-1], [*value, 1], []))
    else:
        changed = list(value)
        changed[rng.randrange(len(value))] = rng.choice(SPECIAL)
    return try_all(call, call.parts | {name: changed})


def window(rng: random.Random, call: Call) -> bool:
    """An entry of the stride, padding, dilation or the shape of x."""
    name = rng.choice(("stride", "padding", "dilation", "x_shape"))
    changed = list(call.parts[name])
    if rng.random() < 0.2:
        changed = rng.choice((changed[:-1], [*changed, 1], []))
    else:
        changed[rng.randrange(len(changed))] = rng.choice(SPECIAL)
    return try_all(call, call.parts | {name: changed})


def dtypes(rng: random.Random, call: Call) -> bool:
    """Tensors of another dtype, dimension or stride."""
    name, parts = rng.choice(("values", "crow", "col")), call.parts
    t = parts[name]
    stretched = t.repeat_interleave(2, dim=0)[::2]
    change = rng.choice(("dtype", "more", "fewer", "strided", "expanded"))
    if change == "dtype":
        dtype = rng.choice((torch.int64, torch.int8, torch.uint8, torch.float16, torch.float64, torch.bool))
        changed = t.to(dtype)
    elif change == "expanded" and len(t):
        changed = t[:1].expand(t.shape)
    else:
        changed = {"more": t[None], "fewer": t.reshape(-1) if t.dim() > 1 else t.sum()}.get(change, stretched)
    right = change == "strided" or (changed.dtype, changed.shape) == (t.dtype, t.shape)
    either = change == "expanded" or changed.dtype == torch.int8  # which blocks of 1 × 4 may be
    return try_all(call, parts | {name: changed}, malformed=None if either else not right)


def blobs(rng: random.Random, call: Call) -> bool:
    """Packed forms of another weight, of a file, in part, with another header: refused, or not needed."""
    parts, ops_ = call.parts, call.ops(call.parts)
    made = ops_[rng.choice([name for name in ops_ if name.startswith("pack")])][0]()
    change = rng.choice(("copy", "shifted", "short", "long", "sealed", "zero", "noise", "dtype", "other"))
    malformed = True
    if change in ("copy", "shifted"):
        blob, malformed = made.clone(), None  # right for one of the ops
        if change == "shifted":
            blob = torch.cat([blob[:1], blob])[1:]
    elif change == "short":
        blob = exact(made[: rng.choice((0, 1, 8, 64, 200, len(made) - 64, len(made) - 1))])
    elif change == "long":
        blob = torch.cat([made, made[:64]])
    elif change == "sealed":  # the header
        blob = made.clone()
        blob[rng.randrange(216)] ^= 1 << rng.randrange(8)
    elif change == "zero":
        blob = torch.zeros_like(made)
    elif change == "noise":
        blob = torch.randint(0, 256, made.shape, dtype=torch.uint8)
    elif change == "dtype":
        blob = made.repeat_interleave(2).view(torch.int16)
    else:
        other = Call(rng)
        while other.parts["shape"] == parts["shape"] or other.int8 != call.int8:
            other = Call(rng)
        blob = other.ops(other.parts)["pack"][0]()
    taken = False
    for name in ("int8",) if call.int8 else ("native", "dx"):
        op, reference = call.ops(parts, blob)[name]
        try:
            y = op()
        except REFUSED:
            continue
        assert not malformed, f"{name} took a packed form with this change: {change}"
        taken = True
        close(y, reference())
    assert taken or malformed
    return taken


def states(rng: random.Random, call: Call) -> bool:
    """A state_dict with changed indices, through each kind of layer."""
    kind = rng.choice((SparseConv2d, SparseLinear, Int8SparseConv2d))
    O, C, k = rng.randint(1, 9), rng.randint(1, 6), rng.randint(1, 3)
    pattern = "ic_block4" if kind is Int8SparseConv2d else rng.choice(list(PATTERNS))
    sizes = (C, O) if kind is SparseLinear else (C, O, k)
    layer = kind(*sizes) if kind is Int8SparseConv2d else kind(*sizes, pattern=pattern)
    state = {key: exact(t) for key, t in layer.state_dict().items()}
    crow, col = state["crow_indices"].tolist(), state["col_indices"].tolist()
    for _ in range(rng.randint(1, 2)):
        mutate(rng, rng.choice((crow, col)))
    state |= {"crow_indices": int32(*crow), "col_indices": int32(*col)}
    if rng.random() < 0.2 and len(state["values"]):
        state["values"] = exact(state["values"][:-1])
    right = is_structure(len(state["values"]), crow, col, layer.weight_shape, PATTERNS[pattern], 1)
    before = {key: t.clone() for key, t in layer.state_dict().items()}
    try:
        layer.load_state_dict(state)
    except REFUSED:
        after = layer.state_dict()
        assert after.keys() == before.keys()
        assert all(torch.equal(after[key], t) for key, t in before.items())
        taken = False
    else:
        assert right, "a malformed state_dict was loaded"
        taken = True
    x = randn(2, C) if kind is SparseLinear else randn(2, C, 5, 5)
    expected = layer.to_dense()(x).detach()
    y = layer(x)
    assert (y - expected).abs().max() <= (0.05 if kind is Int8SparseConv2d else 1e-4) * (1 + expected.abs().max())
    if kind is not Int8SparseConv2d:
        y.sum().backward()
    return taken


KINDS = {indices: 10, counts: 2, sizes: 2, window: 1, dtypes: 1, blobs: 3, states: 3}
"""Each with its share."""


def main(seed: int, cases: int) -> None:
    rng, seen = random.Random(seed), Counter()
    torch.manual_seed(seed)
    for i in range(cases):
        if i % 20 == 0:
            call = Call(rng)
            try_all(call, call.parts, malformed=False)
        (kind,) = rng.choices(list(KINDS), list(KINDS.values()))
        where = rng.getstate()
        try:
            taken = kind(rng, call)
        except BaseException:
            rng.setstate(where)
            parts = call.parts | {"values": (call.parts["values"].shape, call.parts["values"].dtype)}
            print(f"case {i}, {kind.__name__}, of {call.pattern}: {parts}", file=sys.stderr)
            raise
        seen[f"{kind.__name__} {'accepted' if taken else 'refused'}"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    main(int(sys.argv[2]), int(sys.argv[3]))
