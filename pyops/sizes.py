"""Arithmetic of sizes."""

from __future__ import annotations


def ceil_div(x: int, y: int) -> int:
    """⌈x / y⌉ for x ≥ 0 and y > 0, also of torch.compile's symbols, which divide negative numbers otherwise."""
    return (x + y - 1) // y
