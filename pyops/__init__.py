"""pyops makes existing PyTorch models faster and smaller with custom kernels."""

from pyops import nn, ops, optim
from pyops._version import __version__
from pyops.info import info
from pyops.report import Report
from pyops.swap import Config, Int8Dynamic, swap_

__all__ = ["Config", "Int8Dynamic", "Report", "__version__", "info", "nn", "ops", "optim", "swap_"]
