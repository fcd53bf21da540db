"""The ops: contracts with schema, reference, fake kernel and autograd; PyTorch's dispatcher finds the kernel."""

from pyops.ops.adafactor import adafactor_step
from pyops.ops.fp8_linear import dequantize_fp8, fp8_linear, quantize_fp8
from pyops.ops.int4_linear import int4_linear
from pyops.ops.int4_quantize import quantize_int4
from pyops.ops.int4_weight import dequantize_int4, pack_int4, unpack_int4
from pyops.ops.int8_linear import int8_linear, pack_int8, quantize_int8, unpack_int8
from pyops.ops.int8_sparse_conv2d import int8_sparse_conv2d, quantize_sparse
from pyops.ops.int8_weight_linear import int8_weight_linear
from pyops.ops.optim import optim_step, optim_sum_squares
from pyops.ops.sparse_conv2d import sparse_conv2d, sparse_linear
from pyops.ops.sparse_weight import SparseWeight

__all__ = [
    "SparseWeight",
    "adafactor_step",
    "dequantize_fp8",
    "dequantize_int4",
    "fp8_linear",
    "int4_linear",
    "int8_linear",
    "int8_sparse_conv2d",
    "int8_weight_linear",
    "optim_step",
    "optim_sum_squares",
    "pack_int4",
    "pack_int8",
    "quantize_fp8",
    "quantize_int4",
    "quantize_int8",
    "quantize_sparse",
    "sparse_conv2d",
    "sparse_linear",
    "unpack_int4",
    "unpack_int8",
]
