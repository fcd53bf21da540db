"""The corrections of `interpreter.py` themselves; run by test_triton_interpreter.py."""

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

interpreter.install()

# Ties both ways, overflow, the smallest numbers of bf16, fp16 and fp8, and random bits.
EDGES = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-4, 1 + 3 * 2**-4, 3.4e38, 65520.0, 464.0, 480.0, 61440.0]
EDGES += [2.0**-126, 2.0**-133, 2.0**-134, 2.0**-9, 2.0**-10, 2.0**-17, float("inf"), float("nan"), -1.7, 447.9]


def _values() -> torch.Tensor:
    bits = torch.randint(-(2**31), 2**31, (1002,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    return torch.cat([torch.tensor(EDGES), bits.view(torch.float32)])


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = a.float(), b.float()
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())


@triton.jit
def _cast_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < n, other=0.0)
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=offs < n)


@triton.jit
def _arithmetic_kernel(a_ptr, b_ptr, sum_ptr, product_ptr, larger_ptr, n, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + offs, mask=offs < n, other=0.0)
    b = tl.load(b_ptr + offs, mask=offs < n, other=0.0)
    tl.store(sum_ptr + offs, a + b, mask=offs < n)
    tl.store(product_ptr + offs, a * b, mask=offs < n)
    tl.store(larger_ptr + offs, tl.where(a > b, a, b), mask=offs < n)


@triton.jit
def _fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tl.fma(tl.load(x_ptr + offs), tl.load(y_ptr + offs), tl.load(z_ptr + offs)))


@triton.jit
def _table_kernel(table_ptr, y_ptr, BLOCK: tl.constexpr):
    x_ptr = tl.load(table_ptr).to(tl.pointer_type(tl.float32))
    offs = tl.arange(0, BLOCK)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs))


@triton.jit
def _unmasked_kernel(x_ptr, y_ptr, n, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=(offs < n) | (not MASK_LOAD), other=0.0)
    tl.store(y_ptr + offs, x, mask=(offs < n) | (not MASK_STORE))


@triton.jit
def _bf16_sum_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    tl.store(y_ptr, tl.sum(tl.load(x_ptr + tl.arange(0, BLOCK)), axis=0))


@triton.jit
def _order_kernel(counter_ptr, y_ptr):
    tl.store(y_ptr + tl.program_id(0), tl.atomic_add(counter_ptr, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_casts_round_to_nearest_even(dtype):
    x = _values()
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, len(x), BLOCK=1024)
    largest = torch.finfo(dtype).max
    assert _same_bits(y, (x.clamp(-largest, largest) if dtype.itemsize == 1 else x).to(dtype))
    back = torch.empty(x.shape)
    _cast_kernel[(1,)](y, back, len(x), BLOCK=1024)
    assert _same_bits(back, y)


def test_integers_become_bf16():
    x = torch.arange(-300, 300, dtype=torch.int32)
    y = torch.empty(x.shape, dtype=torch.bfloat16)
    _cast_kernel[(1,)](x, y, len(x), BLOCK=1024)
    assert _same_bits(y, x.to(torch.bfloat16))


def test_bf16_arithmetic():
    a, b = (torch.randn(1000, generator=torch.Generator().manual_seed(i)).bfloat16() for i in (0, 1))
    total, product, larger = (torch.empty_like(a) for _ in range(3))
    _arithmetic_kernel[(1,)](a, b, total, product, larger, len(a), BLOCK=1024)
    assert torch.equal(total, a + b)
    assert torch.equal(product, a * b)
    assert torch.equal(larger, torch.maximum(a, b))


def test_fma_rounds_once():
    x, y, z = (torch.randn(1024, generator=torch.Generator().manual_seed(i)) for i in range(3))
    out = torch.empty_like(x)
    _fma_kernel[(1,)](x, y, z, out, BLOCK=1024)
    assert torch.equal(out, (x.double() * y.double() + z.double()).float())
    assert not torch.equal(out, x * y + z)


def test_reachable_tensors_are_allowed_within_their_extent():
    storage, y = torch.randn(256), torch.empty(128)
    table = torch.tensor([storage.data_ptr()])
    with pytest.raises(InterpreterError, match="load: 128 of 128"):
        _table_kernel[(1,)](table, y, BLOCK=128)
    with interpreter.reachable([storage[:100]]) as add:
        with pytest.raises(InterpreterError, match="load: 28 of 128"):
            _table_kernel[(1,)](table, y, BLOCK=128)
        assert add(storage) is storage
        _table_kernel[(1,)](table, y, BLOCK=128)
    assert torch.equal(y, storage[:128])
    with pytest.raises(InterpreterError, match="load: 128 of 128"):
        _table_kernel[(1,)](table, y, BLOCK=128)


@pytest.mark.parametrize("kind", ["load", "store"])
def test_missing_mask_is_caught(kind):
    # Views, so that what the overrun reaches is never another tensor that the allocator put next to them.
    x, y = torch.zeros(256)[:100], torch.zeros(256)[:100]
    _unmasked_kernel[(1,)](x, y, 100, MASK_LOAD=True, MASK_STORE=True, BLOCK=128)
    with pytest.raises(InterpreterError, match=f"{kind}: 28 of 128 addresses"):
        _unmasked_kernel[(1,)](x, y, 100, MASK_LOAD=kind != "load", MASK_STORE=kind != "store", BLOCK=128)


def test_view_of_a_larger_storage_is_checked_by_its_own_extent():
    storage = torch.zeros(256)
    with pytest.raises(InterpreterError, match="load: 28 of 128"):
        _unmasked_kernel[(1,)](storage[:100], torch.zeros(128), 100, MASK_LOAD=False, MASK_STORE=True, BLOCK=128)


def test_bf16_reduction_is_refused():
    with pytest.raises(InterpreterError, match="cannot reduce"):
        _bf16_sum_kernel[(1,)](torch.ones(16).bfloat16(), torch.ones(1).bfloat16(), BLOCK=16)


def test_programs_are_shuffled():
    order = torch.empty(50, dtype=torch.int32)
    with interpreter.shuffled_programs(seed=1):
        _order_kernel[(50,)](torch.zeros(1, dtype=torch.int32), order)
    assert order.tolist() != list(range(50))
    assert sorted(order.tolist()) == list(range(50))
