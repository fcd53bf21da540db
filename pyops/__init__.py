"""pyops makes existing PyTorch models faster and smaller with custom kernels."""

from pyops import nn, ops, optim, prune
from pyops._version import __version__
from pyops.fold import fold_batch_norm_, fold_into
from pyops.fuse import Fused, fuse_activations_
from pyops.info import info
from pyops.report import Report
from pyops.residual import fuse_residuals_
from pyops.sparse import Sparse
from pyops.swap import Config, Int8Dynamic, swap_

__all__ = [
    "Config",
    "Fused",
    "Int8Dynamic",
    "Report",
    "Sparse",
    "__version__",
    "fold_batch_norm_",
    "fold_into",
    "fuse_activations_",
    "fuse_residuals_",
    "info",
    "nn",
    "ops",
    "optim",
    "prune",
    "swap_",
]
