"""What is raised for a checkpoint that cannot be loaded: everything that is wrong with it, at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from pyops.memory import all_finite

SHOWN = 40


class CheckpointError(ValueError):
    """A checkpoint that cannot be loaded; `problems` holds all that was found, one string each."""

    def __init__(self, where: str, problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        lines = [f"  - {problem}" for problem in self.problems[:SHOWN]]
        if len(self.problems) > SHOWN:
            lines.append(f"  … and {len(self.problems) - SHOWN} more, in .problems of this exception")
        count = f"{len(self.problems)} problem{'s' if len(self.problems) != 1 else ''}"
        super().__init__("\n".join([f"{where} cannot be loaded, {count}; nothing was changed:", *lines]))


class Entry:
    """The tensors of one layer of a checkpoint, and what is found wrong with them.

    `tensors` is keyed by what follows the layer's name in the key, such as "qweight". N and K are out_features and
    in_features of the layer in the model.
    """

    def __init__(self, name: str, tensors: Mapping[str, torch.Tensor], N: int, K: int) -> None:
        self.name, self.tensors, self.N, self.K = name, tensors, N, K
        self.problems: list[str] = []

    def key(self, local: str) -> str:
        """The key of one of its tensors."""
        return f"{self.name}.{local}" if self.name else local

    def wrong(self, local: str, problem: str) -> None:
        """Note a problem of one tensor; `problem` goes on after its key."""
        self.problems.append(f"{self.key(local)} {problem}")

    def take(
        self,
        local: str,
        shapes: Iterable[tuple[int, ...]],
        dtypes: tuple[torch.dtype, ...],
        *,
        optional: bool = False,
    ) -> torch.Tensor | None:
        """One tensor if it is there with one of these shapes and dtypes; otherwise None, and the problem is noted."""
        value, shapes = self.tensors.get(local), tuple(shapes)
        if value is None:
            if not optional:
                self.wrong(local, "is missing")
            return None
        if value.dtype not in dtypes:
            self.wrong(local, f"has dtype {value.dtype}; allowed: {', '.join(map(str, dtypes))}")
        elif tuple(value.shape) not in shapes:
            wanted = " or ".join(dict.fromkeys(map(str, shapes)))
            self.wrong(local, f"is {tuple(value.shape)}; a layer of N={self.N} and K={self.K} needs {wanted}")
        else:
            return value
        return None

    def finite(self, local: str, value: torch.Tensor | None) -> torch.Tensor | None:
        """`value` if it is finite throughout, else None, and the problem is noted."""
        if value is not None and not all_finite(value):
            self.wrong(local, "holds NaN or Inf")
            return None
        return value

    def not_understood(self, known: Iterable[str]) -> None:
        """Note each tensor that is not among `known`."""
        for local in sorted(set(self.tensors) - set(known)):
            self.wrong(local, "is not understood")
