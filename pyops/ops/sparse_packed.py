"""The packed form of a sparse weight, kept from one call to the next.

The CPU kernels read a weight in a form of their own (`pyops::sparse_conv2d_pack`), tuned for the shape of x and right
for every other. Making it costs as much as a small convolution, so whoever owns a weight keeps those that were made,
for a few shapes, as long as nothing else that they depend on changes.
"""

from __future__ import annotations

import math

import torch

from pyops import backend

PACKED_DTYPES = (torch.float32, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)
MOST_SHAPES = 4
"""That a weight is packed for; x of another shape then gets the form of the one most alike."""


class Blobs:
    """Packed forms of one weight, by the memory format and shape of x.

    Threads may share it: what they race for is set in one piece, and the worst is that one packs in vain.
    """

    __slots__ = ("_state",)

    def __init__(self) -> None:
        # (key, blobs by shape, tensors that are held so that no other can come to lie at their address)
        self._state: tuple[tuple | None, dict[tuple, torch.Tensor], tuple[torch.Tensor, ...]] = (None, {}, ())

    @property
    def by_shape(self) -> dict[tuple, torch.Tensor]:
        """Those that are kept."""
        return self._state[1]

    def find(self, key: tuple, shape: tuple) -> torch.Tensor | None:
        """What was made under this key: for this shape, or if there is no room for more, for one alike."""
        made_for, blobs, _ = self._state
        if key != made_for:
            return None
        blob = blobs.get(shape)
        if blob is None and len(blobs) >= MOST_SHAPES:
            alike = [(abs(_log_pixels(s) - _log_pixels(shape)), b) for s, b in list(blobs.items()) if s[0] == shape[0]]
            blob = min(alike, key=lambda one: one[0])[1] if alike else None
        return blob

    def keep(self, key: tuple, shape: tuple, blob: torch.Tensor, watched: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`blob`, to be found again."""
        made_for, blobs, _ = self._state
        if key != made_for:
            self._state = (key, {shape: blob}, tuple(t.detach() for t in watched))
            return blob
        if len(blobs) >= MOST_SHAPES:
            blobs.pop(next(iter(list(blobs))), None)
        blobs[shape] = blob
        return blob

    def clear(self) -> None:
        """Forget them."""
        self._state = (None, {}, ())


def _log_pixels(shape: tuple) -> float:
    _, N, _, H, W = shape
    return math.log(max(N * H * W, 1))


class PackedCache:
    """The packed forms of one weight. A copy and a pickle of it are empty."""

    __slots__ = ("dx", "forward", "trained")

    def __init__(self) -> None:
        self.forward, self.trained, self.dx = Blobs(), Blobs(), Blobs()  # with values, without, for the gradient of x

    def clear(self) -> None:
        """Forget the blobs."""
        self.forward.clear()
        self.trained.clear()
        self.dx.clear()

    def get(self, x, values, crow, col, shape, block, stride, padding, dilation, groups) -> torch.Tensor | None:
        """The blob for these arguments of `sparse_conv2d`, or None where its kernel has none or has to pack itself.

        Of a weight that autograd follows, or that lies in shared memory, only the structure is kept: the values change
        at every step, and some optimizers write to `.data`, which leaves no trace.
        """
        if torch.compiler.is_compiling() or not packs(x, values):
            return None
        if values.is_inference() or crow.is_inference() or col.is_inference():
            self.forward.clear()
            return None
        window = (stride, padding, dilation, groups)
        structure_key = (crow.data_ptr(), crow._version, col.data_ptr(), col._version, window)
        channels_last = is_channels_last(x)
        seen = (channels_last, *x.shape)
        trained = values.requires_grad and torch.is_grad_enabled()
        if trained:
            self.forward.clear()  # a step follows
        key = (values.data_ptr(), values._version, *structure_key)
        blob = None if trained else self.forward.find(key, seen)
        if blob is None and (trained or values.is_shared()):
            trained, key = True, structure_key
            blob = self.trained.find(key, seen)
        if blob is not None or not has_native(shape, stride, dilation):
            return blob
        weight = (values.detach(), crow, col, shape, block)
        blob = torch.ops.pyops.sparse_conv2d_pack(*weight, *window, x.shape, channels_last, not trained)
        if trained:
            return self.trained.keep(key, seen, blob, (crow, col))
        return self.forward.keep(key, seen, blob, (crow, col, values))

    def get_dx(self, x, values, crow, col, shape, block, stride, padding, dilation, groups) -> torch.Tensor | None:
        """The blob for `sparse_conv2d_dx`, the structure alone, or None where nobody will ask for x's gradient."""
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or not packs(x, values):
            return None
        if crow.is_inference() or col.is_inference():
            return None
        window = (stride, padding, dilation, groups)
        key = (crow.data_ptr(), crow._version, col.data_ptr(), col._version, window)
        channels_last = is_channels_last(x)
        seen = (channels_last, *x.shape)
        blob = self.dx.find(key, seen)
        if blob is not None or not has_native_dx(shape, stride, dilation):
            return blob
        weight = (values.detach(), crow, col, shape, block)
        blob = torch.ops.pyops.sparse_conv2d_pack_dx(*weight, *window, x.shape, channels_last)
        return self.dx.keep(key, seen, blob, (crow, col))

    def __deepcopy__(self, memo: dict) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple:
        return PackedCache, ()


MOST_TAPS = 64
"""In each direction, of a weight that the CPU kernels take."""
MOST_SIZE = 2**24
"""Of a dimension of the weight; strides and dilations may be a sixteenth of it."""
MOST_REACH = 8191
"""Pixels of the window of one output pixel: the CPU kernels number the vectors of 16 such windows, in eights of bytes,
with 16 bits."""


def has_native(weight_shape, stride, dilation) -> bool:
    """True if the CPU kernels take a weight of this shape: its window is not too large."""
    kernel = weight_shape[2:]
    reach = [d * (k - 1) + min(s, k) for k, s, d in zip(kernel, stride, dilation, strict=True)]
    sizes = max(*weight_shape, *(16 * v for v in (*stride, *dilation)))
    return max(kernel) <= MOST_TAPS and reach[0] * reach[1] <= MOST_REACH and sizes < MOST_SIZE


def has_native_dx(weight_shape, stride, dilation) -> bool:
    """True if `sparse_conv2d_dx` has a CPU kernel: a pixel's phase within the stride decides which taps reach it."""
    if not has_native(weight_shape, stride, dilation):
        return False
    reach = [d * (k - 1) // s + 2 for k, s, d in zip(weight_shape[2:], stride, dilation, strict=True)]
    return tuple(stride) == (1, 1) or (stride[0] * stride[1] <= 64 and max(reach) <= 64)


def packs(x: torch.Tensor, values: torch.Tensor) -> bool:
    """True if the kernel that x goes to reads a packed form."""
    return (
        backend.native is not None
        and x.is_cpu
        and x.dtype in PACKED_DTYPES
        and values.dtype in (*PACKED_DTYPES, torch.int8)
        and type(x) in PLAIN
        and type(values) in PLAIN
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None  # a trace would hold on to the blob
        and not torch._C._len_torch_dispatch_stack()  # so would one by dispatch mode
    )


def is_plain(t: torch.Tensor) -> bool:
    """True if what t holds lies as it is at its data_ptr, and nobody else has a say in what is done with it."""
    return type(t) in PLAIN and not t.is_neg() and not t._is_zerotensor()


def is_channels_last(x: torch.Tensor) -> bool:
    """True if x [N, C, H, W] is channels_last and not NCHW too; the result of `sparse_conv2d` has the same format."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
