"""The ops: contracts with schema, reference, fake kernel and autograd; PyTorch's dispatcher finds the kernel."""

from pyops.ops.adafactor import adafactor_step
from pyops.ops.int8_linear import int8_linear, pack_int8, quantize_int8, unpack_int8
from pyops.ops.int8_sparse_conv2d import int8_sparse_conv2d, quantize_sparse
from pyops.ops.optim import optim_step, optim_sum_squares
from pyops.ops.sparse_conv2d import sparse_conv2d, sparse_linear
from pyops.ops.sparse_weight import SparseWeight

__all__ = [
    "SparseWeight",
    "adafactor_step",
    "int8_linear",
    "int8_sparse_conv2d",
    "optim_step",
    "optim_sum_squares",
    "pack_int8",
    "quantize_int8",
    "quantize_sparse",
    "sparse_conv2d",
    "sparse_linear",
    "unpack_int8",
]
