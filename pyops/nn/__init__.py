"""Drop-in modules over the ops of pyops."""

from pyops.nn.linear import Int8Linear

__all__ = ["Int8Linear"]
