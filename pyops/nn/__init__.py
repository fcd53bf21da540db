"""Drop-in modules over the ops of pyops."""

from pyops.nn.conv import SparseConv1d, SparseConv2d
from pyops.nn.int8_conv import Int8SparseConv2d
from pyops.nn.linear import Int8Linear
from pyops.nn.sparse_linear import SparseLinear

__all__ = ["Int8Linear", "Int8SparseConv2d", "SparseConv1d", "SparseConv2d", "SparseLinear"]
