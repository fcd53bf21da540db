"""Drop-in modules over the ops of pyops."""

from pyops.nn.conv import SparseConv1d, SparseConv2d
from pyops.nn.fp8_linear import Fp8Linear
from pyops.nn.int4_linear import Int4Linear
from pyops.nn.int8_conv import Int8SparseConv2d
from pyops.nn.int8_linear import Int8Linear
from pyops.nn.qat_linear import QatLinear
from pyops.nn.sparse_linear import SparseLinear

__all__ = [
    "Fp8Linear",
    "Int4Linear",
    "Int8Linear",
    "Int8SparseConv2d",
    "QatLinear",
    "SparseConv1d",
    "SparseConv2d",
    "SparseLinear",
]
