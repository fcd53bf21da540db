"""The canonical sparse weight: blocks of W [O, Cg, R, S] kept in rows, as every kernel and every state_dict has them.

A block is `bo` output channels × `bc` input channels × one tap (r, s). Block rows are runs of `bo` output channels that
never straddle groups: with OBg = ⌈(O/groups)/bo⌉, row b belongs to group b // OBg and starts at its output channel
(b % OBg) · bo. Blocks of a row are sorted by col = (cb · R + r) · S + s, where cb · bc is the first input channel.

    values        float [B, bo, bc]   B kept blocks; what lies beyond the last channel (padding) is 0. Quantized
                                      (`quantize_sparse`), int8 [B, 1, 4]
    crow_indices  int32 [OB + 1]      row b holds the blocks crow[b] … crow[b+1] - 1; OB = groups · OBg
    col_indices   int32 [B]           strictly increasing within a row, below CB · R · S with CB = ⌈Cg/bc⌉
    block_mask    bool  [B, bo, bc]   the positions that are kept; None if a block keeps all that exist. The others hold
                                      0 (fill-in) and stay 0 in training

The layout is block-compressed-sparse-row as in scipy and torch.sparse_bsr, with the taps of a convolution as columns.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F

from pyops.memory import has_values
from pyops.ops.sparse_packed import PackedCache
from pyops.sizes import ceil_div

PATTERNS: dict[str, tuple[int, int]] = {
    "unstructured": (1, 1),
    "2:4": (1, 1),
    "oc_block4": (4, 1),
    "oc_block8": (8, 1),
    "oc_block16": (16, 1),
    "ic_block4": (1, 4),
    "block16": (16, 16),
    "block32": (32, 32),
    "block64": (64, 64),
}
"""Name of a pattern: its block (output × input channels). "2:4" keeps at most 2 of 4 consecutive input channels."""

BLOCKS = tuple(dict.fromkeys(PATTERNS.values()))
INT32_MAX = 2**31 - 1
Ints = tuple[int, ...] | list[int]


# ------------------------------------------------------------------------------------- between dense and blocks


def block_rows(shape: Ints, block: Ints, groups: int) -> int:
    """OB, the number of block rows of a weight [O, Cg, R, S]."""
    return groups * ceil_div(shape[0] // groups, block[0])


def block_columns(shape: Ints, block: Ints) -> int:
    """CB · R · S, the number of block columns of a weight [O, Cg, R, S]."""
    return ceil_div(shape[1], block[1]) * shape[2] * shape[3]


def block_index(crow: torch.Tensor, col: torch.Tensor, columns: int) -> torch.Tensor:
    """Where each kept block stands among all blocks, row by row: row · columns + col, int64 [B]."""
    rows = torch.arange(crow.numel() - 1, device=crow.device)
    return torch.repeat_interleave(rows, crow.diff(), output_size=col.numel()) * columns + col


def scatter_blocks(
    values: torch.Tensor,  # [B, bo, bc]
    crow: torch.Tensor,  # [OB + 1]
    col: torch.Tensor,  # [B]
    shape: Ints,  # O, Cg, R, S
    block: Ints,  # bo, bc
    groups: int,
) -> torch.Tensor:
    """The dense weight [O, Cg, R, S] of the blocks; differentiable in values, whose padding is not looked at."""
    O, Cg, R, S = shape
    bo, bc = block
    rows, columns = block_rows(shape, block, groups), block_columns(shape, block)
    blocks = values.new_zeros(rows * columns, bo, bc).index_copy(0, block_index(crow, col, columns), values)
    blocks = blocks.view(groups, rows // groups, ceil_div(Cg, bc), R, S, bo, bc).permute(0, 1, 5, 2, 6, 3, 4)
    dense = blocks.reshape(groups, rows // groups * bo, ceil_div(Cg, bc) * bc, R, S)
    return dense[:, : O // groups, :Cg].reshape(O, Cg, R, S)


def all_blocks(dense: torch.Tensor, block: Ints, groups: int) -> torch.Tensor:
    """Every block of a dense weight [O, Cg, R, S], row by row: [OB · CB · R · S, bo, bc], padded with zeros."""
    O, Cg, R, S = dense.shape
    bo, bc = block
    rows, cb = block_rows(dense.shape, block, groups) // groups, ceil_div(Cg, bc)
    padded = dense.reshape(groups, O // groups, Cg, R, S)
    padded = F.pad(padded, (0, 0, 0, 0, 0, cb * bc - Cg, 0, rows * bo - O // groups))
    blocks = padded.view(groups, rows, bo, cb, bc, R, S).permute(0, 1, 3, 5, 6, 2, 4)
    return blocks.reshape(groups * rows * cb * R * S, bo, bc)


def gather_blocks(dense: torch.Tensor, crow: torch.Tensor, col: torch.Tensor, block: Ints, groups: int) -> torch.Tensor:
    """The kept blocks [B, bo, bc] of a dense weight [O, Cg, R, S]; padding is zero."""
    index = block_index(crow, col, block_columns(dense.shape, block))
    return all_blocks(dense, block, groups).index_select(0, index)


# ------------------------------------------------------------------------------------------------- checks


def check_structure(
    values_shape: Ints, crow: torch.Tensor, col: torch.Tensor, shape: Ints, block: Ints, groups: int
) -> None:
    """Raise ValueError, naming the buffer, unless these indices are a structure as this module's head describes it.

    Every buffer that passes can be given to a kernel: nothing that it points to lies outside. O(B), vectorized.
    Tensors without values (meta, fake, while compiling) are checked for shape and dtype only.
    """
    if len(shape) != 4 or min(shape) < 0:
        raise ValueError(f"shape is {tuple(shape)}; expected four sizes (O, C/groups, R, S), none negative")
    if groups < 1 or shape[0] % groups:
        raise ValueError(f"groups is {groups}; it must be positive and divide the {shape[0]} output channels")
    if tuple(block) not in BLOCKS:
        raise ValueError(f"block is {tuple(block)}; allowed: {', '.join(map(str, BLOCKS))}")
    rows, columns = block_rows(shape, block, groups), block_columns(shape, block)
    if max(rows + 1, columns) > INT32_MAX:
        raise ValueError(
            f"shape {tuple(shape)} has {rows} block rows and {columns} block columns; int32 cannot count them"
        )
    for name, t in (("crow_indices", crow), ("col_indices", col)):
        if not isinstance(t, torch.Tensor):
            raise ValueError(f"{name} must be a tensor, got {type(t).__name__}")
        if t.dtype != torch.int32:
            raise ValueError(f"{name} has dtype {t.dtype}, expected torch.int32")
        if t.layout != torch.strided or t.dim() != 1:
            raise ValueError(f"{name} has shape {tuple(t.shape)}, expected one dimension")
    if crow.shape[0] != rows + 1:
        raise ValueError(f"crow_indices has {crow.shape[0]} elements; {rows} block rows need {rows + 1}")
    if len(values_shape) != 3 or tuple(values_shape[1:]) != tuple(block):
        raise ValueError(f"values has shape {tuple(values_shape)}, expected [B, {block[0]}, {block[1]}]")
    if col.shape[0] != values_shape[0]:
        raise ValueError(f"col_indices has {col.shape[0]} elements, values {values_shape[0]} blocks; they must agree")
    if crow.device != col.device:
        raise ValueError(f"crow_indices is on {crow.device}, col_indices on {col.device}")
    if has_values(crow) and has_values(col):
        _check_indices(crow, col, columns)


def _check_indices(crow: torch.Tensor, col: torch.Tensor, columns: int) -> None:
    B = col.shape[0]
    first, last = int(crow[0]), int(crow[-1])
    if first != 0:
        raise ValueError(f"crow_indices starts with {first}, expected 0")
    if last != B:
        raise ValueError(f"crow_indices ends with {last}, expected {B}, the number of blocks")
    if bool((crow[1:] < crow[:-1]).any()):  # compared, not subtracted: a difference can overflow
        raise ValueError("crow_indices decreases; it must be non-decreasing")
    if not B:
        return
    low, high = (int(bound) for bound in col.aminmax())
    if low < 0 or high >= columns:
        raise ValueError(f"col_indices holds {low if low < 0 else high}; allowed: 0 to {columns - 1}")
    ordered = torch.ones(B + 1, dtype=torch.bool, device=col.device)
    ordered[1:-1] = col[1:] > col[:-1]
    ordered[crow.long()] = True  # a row's first block follows nothing
    if not bool(ordered.all()):
        raise ValueError("col_indices is not strictly increasing within every block row")


def check_pattern(pattern: str) -> None:
    """Raise ValueError for a name that is not in PATTERNS."""
    if pattern not in PATTERNS:
        raise ValueError(f"pattern={pattern!r} is not one of {', '.join(PATTERNS)}")


def is_2_4(mask: torch.Tensor) -> bool:
    """True if mask [O, Cg, R, S] keeps at most 2 of every 4 consecutive input channels, the last may be fewer."""
    O, Cg, R, S = mask.shape
    padded = F.pad(mask, (0, 0, 0, 0, 0, -Cg % 4)).view(O, ceil_div(Cg, 4), 4, R, S)
    return bool((padded.sum(2) <= 2).all())


# ------------------------------------------------------------------------------------------------- the class


@dataclasses.dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight [O, C/groups, R, S] of which the blocks in `values` are kept; see this module's head for the fields.

    `values` may be a leaf that requires grad, such as a Parameter: `sparse_conv2d` gives it its gradient.
    `pattern` is a name of PATTERNS; by default the one of the block. Everything is checked when it is made.

    Raises ValueError or TypeError naming the field.
    """

    values: torch.Tensor
    crow_indices: torch.Tensor
    col_indices: torch.Tensor
    shape: tuple[int, int, int, int]
    block: tuple[int, int] = (1, 1)
    groups: int = 1
    block_mask: torch.Tensor | None = None
    pattern: str = ""
    packed: PackedCache = dataclasses.field(default_factory=PackedCache, init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "shape", tuple(self.shape))
        object.__setattr__(self, "block", tuple(self.block))
        if not self.pattern:
            named = next((name for name, block in PATTERNS.items() if block == self.block), "unstructured")
            object.__setattr__(self, "pattern", named)
        self.validate()

    @classmethod
    def from_dense(
        cls, w: torch.Tensor, mask: torch.Tensor | None = None, *, pattern: str = "unstructured", groups: int = 1
    ) -> SparseWeight:
        """Keep the blocks of w [O, C/groups, R, S] (or [O, K] of a linear layer) that `mask` reaches into.

        Args:
            w: floating-point weight; what the mask does not keep is read as 0, whatever stands there.
            mask: of w's shape, bool or nonzero where kept. A kept weight may be 0. Default: w != 0.
            pattern: a name of PATTERNS. Blocks with a kept position are stored whole, with fill-in.
            groups: of the convolution.

        Raises TypeError or ValueError for arguments that do not fit, and for a mask that pattern "2:4" does not allow.
        """
        check_pattern(pattern)
        if not isinstance(w, torch.Tensor) or not w.is_floating_point():
            raise TypeError(f"w must be a floating-point tensor, got {getattr(w, 'dtype', type(w).__name__)}")
        if w.dim() not in (2, 4):
            raise ValueError(f"w must be [O, C/groups, R, S] or [O, K], got shape {tuple(w.shape)}")
        if groups < 1 or w.shape[0] % groups:
            raise ValueError(f"groups is {groups}; it must be positive and divide the {w.shape[0]} output channels")
        if mask is not None and not isinstance(mask, torch.Tensor):
            raise TypeError(f"mask must be a tensor, got {type(mask).__name__}")
        if mask is not None and mask.shape != w.shape:
            raise ValueError(f"mask is {tuple(mask.shape)}; w needs {tuple(w.shape)}")
        w = w.detach()
        keep = (w if mask is None else mask.detach().to(w.device)) != 0
        if w.dim() == 2:
            w, keep = w[:, :, None, None], keep[:, :, None, None]
        if pattern == "2:4" and not is_2_4(keep):
            raise ValueError('pattern="2:4" allows 2 of 4 consecutive input channels; the mask keeps more somewhere')
        block = PATTERNS[pattern]
        kept_blocks = all_blocks(keep, block, groups)
        index = kept_blocks.any(dim=(1, 2)).nonzero().view(-1)
        columns = block_columns(w.shape, block)
        rows = torch.bincount(index // max(columns, 1), minlength=block_rows(w.shape, block, groups))
        crow = F.pad(rows.cumsum(0), (1, 0)).to(torch.int32)
        col = (index % max(columns, 1)).to(torch.int32)
        values = all_blocks(torch.where(keep, w, 0), block, groups).index_select(0, index)
        block_mask = kept_blocks.index_select(0, index)
        if torch.equal(block_mask, kept_positions(crow, col, None, w.shape, block, groups)):
            block_mask = None
        return cls(values, crow, col, tuple(w.shape), block, groups, block_mask, pattern)

    def validate(self) -> None:
        """Raise ValueError or TypeError, naming the field, if this is no sparse weight."""
        values, mask = self.values, self.block_mask
        quantized = getattr(values, "dtype", None) == torch.int8 and self.block == (1, 4)
        if not isinstance(values, torch.Tensor) or not (values.is_floating_point() or quantized):
            raise TypeError(
                "values must be a floating-point tensor, or int8 in blocks of (1, 4), got "
                f"{getattr(values, 'dtype', type(values).__name__)}"
            )
        check_pattern(self.pattern)
        check_structure(values.shape, self.crow_indices, self.col_indices, self.shape, self.block, self.groups)
        if PATTERNS[self.pattern] != self.block:
            raise ValueError(f"pattern={self.pattern!r} has blocks of {PATTERNS[self.pattern]}, block is {self.block}")
        if self.crow_indices.device != values.device:
            raise ValueError(f"crow_indices is on {self.crow_indices.device}, values on {values.device}")
        check_block_mask(values, self.crow_indices, self.col_indices, mask, self.shape, self.block, self.groups)
        if self.pattern == "2:4" and has_values(self.col_indices) and not is_2_4(self.mask()):
            raise ValueError('col_indices keeps more than 2 of 4 consecutive input channels; pattern is "2:4"')

    def to_dense(self) -> torch.Tensor:
        """The weight [O, C/groups, R, S] with its zeros; differentiable in values."""
        return scatter_blocks(
            self.masked_values(), self.crow_indices, self.col_indices, self.shape, self.block, self.groups
        )

    def masked_values(self) -> torch.Tensor:
        """values, with a gradient that is zero where block_mask keeps nothing."""
        return self.values if self.block_mask is None else self.values * self.block_mask

    def mask(self) -> torch.Tensor:
        """The kept positions, bool [O, C/groups, R, S]."""
        kept = torch.ones_like(self.values, dtype=torch.bool) if self.block_mask is None else self.block_mask
        return scatter_blocks(kept, self.crow_indices, self.col_indices, self.shape, self.block, self.groups)

    def to(self, *args: object, **kwargs: object) -> SparseWeight:
        """As `torch.Tensor.to`: a dtype changes the values only, a device everything."""
        values = self.values.to(*args, **kwargs)
        crow, col = self.crow_indices.to(values.device), self.col_indices.to(values.device)
        mask = None if self.block_mask is None else self.block_mask.to(values.device)
        return dataclasses.replace(self, values=values, crow_indices=crow, col_indices=col, block_mask=mask)

    @property
    def nnz(self) -> int:
        """The number of kept weights, zeros among them included."""
        return int(
            kept_positions(
                self.crow_indices, self.col_indices, self.block_mask, self.shape, self.block, self.groups
            ).sum()
        )

    @property
    def sparsity(self) -> float:
        """The fraction of the dense weight that is not kept."""
        O, Cg, R, S = self.shape
        return 1 - self.nnz / max(O * Cg * R * S, 1)

    @property
    def waste(self) -> float:
        """The fraction of the stored values that is fill-in or padding."""
        return 1 - self.nnz / self.values.numel() if self.values.numel() else 0.0


def kept_positions(
    crow: torch.Tensor, col: torch.Tensor, block_mask: torch.Tensor | None, shape: Ints, block: Ints, groups: int
) -> torch.Tensor:
    """The positions of the blocks that are neither fill-in nor padding, bool [B, bo, bc]."""
    if block_mask is not None:
        return block_mask
    ones = torch.ones(tuple(shape), dtype=torch.bool, device=col.device)
    return gather_blocks(ones, crow, col, block, groups)


def full_structure(
    shape: Ints, groups: int, pattern: str, device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """crow and col of a weight that keeps what its pattern allows: every block, of "2:4" the first 2 of 4 channels."""
    block, taps = PATTERNS[pattern], shape[2] * shape[3]
    rows, kept = block_rows(shape, block, groups), block_columns(shape, block)
    if pattern == "2:4":
        kept = (shape[1] // 4 * 2 + min(shape[1] % 4, 2)) * taps
    crow = torch.arange(rows + 1, device=device, dtype=torch.int32) * kept
    col = torch.arange(kept, device=device, dtype=torch.int32)
    if pattern == "2:4":
        channel = col // taps
        col = (channel // 2 * 4 + channel % 2) * taps + col % taps
    return crow, col.repeat(rows)


def check_block_mask(
    values: torch.Tensor,
    crow: torch.Tensor,
    col: torch.Tensor,
    block_mask: torch.Tensor | None,
    shape: Ints,
    block: Ints,
    groups: int,
) -> None:
    """Raise ValueError unless block_mask fits the values and they are 0 at all positions that are not kept."""
    if block_mask is not None:
        if not isinstance(block_mask, torch.Tensor) or block_mask.dtype != torch.bool:
            raise ValueError(
                f"block_mask must be a bool tensor, got {getattr(block_mask, 'dtype', type(block_mask).__name__)}"
            )
        if block_mask.shape != values.shape:
            raise ValueError(f"block_mask is {tuple(block_mask.shape)}; values needs {tuple(values.shape)}")
        if block_mask.device != values.device:
            raise ValueError(f"block_mask is on {block_mask.device}, values on {values.device}")
    if tuple(block) == (1, 1) and block_mask is None:
        return  # nothing is padding
    if not (has_values(values.detach()) and has_values(col)):
        return
    existing = kept_positions(crow, col, None, shape, block, groups)
    if block_mask is not None and bool((block_mask & ~existing).any()):
        raise ValueError("block_mask keeps positions beyond the last channel")
    dropped = ~(existing if block_mask is None else block_mask)
    if bool((values.detach()[dropped] != 0).any()):
        raise ValueError("values is not 0 at positions that block_mask drops or that lie beyond the last channel")
