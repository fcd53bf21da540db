"""Quantized checkpoints: of other libraries, and our own."""

from pyops.checkpoints.empty import empty_weights
from pyops.checkpoints.errors import CheckpointError
from pyops.checkpoints.load import load_quantized_
from pyops.checkpoints.save import save_quantized

__all__ = ["CheckpointError", "empty_weights", "load_quantized_", "save_quantized"]
