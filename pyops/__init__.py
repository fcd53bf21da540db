"""pyops makes existing PyTorch models faster and smaller with custom kernels."""

from pyops import nn, ops, optim, prune
from pyops._version import __version__
from pyops.auto import Auto
from pyops.checkpoints import CheckpointError, empty_weights, load_quantized_, save_quantized
from pyops.fold import fold_batch_norm_, fold_into
from pyops.fuse import Fused, fuse_activations_
from pyops.info import info
from pyops.qat import convert_, prepare_qat_
from pyops.quantize import Fp8Dynamic, Int4Weight, Int8Dynamic, Int8Static, Int8Weight
from pyops.report import Report
from pyops.residual import fuse_residuals_
from pyops.sparse import Sparse
from pyops.swap import Config, swap_

__all__ = [
    "Auto",
    "CheckpointError",
    "Config",
    "Fp8Dynamic",
    "Fused",
    "Int4Weight",
    "Int8Dynamic",
    "Int8Static",
    "Int8Weight",
    "Report",
    "Sparse",
    "__version__",
    "convert_",
    "empty_weights",
    "fold_batch_norm_",
    "fold_into",
    "fuse_activations_",
    "fuse_residuals_",
    "info",
    "load_quantized_",
    "nn",
    "ops",
    "optim",
    "prepare_qat_",
    "prune",
    "save_quantized",
    "swap_",
]
