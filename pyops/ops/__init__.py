"""The ops: contracts with schema, reference, fake kernel and autograd; PyTorch's dispatcher finds the kernel."""

from pyops.ops.adafactor import adafactor_step
from pyops.ops.int8_linear import int8_linear, pack_int8, quantize_int8, unpack_int8
from pyops.ops.optim import optim_step, optim_sum_squares

__all__ = [
    "adafactor_step",
    "int8_linear",
    "optim_step",
    "optim_sum_squares",
    "pack_int8",
    "quantize_int8",
    "unpack_int8",
]
