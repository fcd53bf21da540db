"""pyops makes existing PyTorch models faster and smaller with custom kernels."""

from pyops import ops
from pyops._version import __version__


__all__ = ["__version__", "ops"]
