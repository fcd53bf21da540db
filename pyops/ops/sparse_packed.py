"""The packed form of a sparse weight, kept from one call to the next.

The CPU kernels read a weight in a form of their own (`pyops::sparse_conv2d_pack`). Making it costs as much as a small
convolution, so whoever owns a weight keeps the last one that was made, as long as nothing that it depends on changes.
"""

from __future__ import annotations

import torch

from pyops import backend

PACKED_DTYPES = (torch.float32, torch.bfloat16)
PLAIN = (torch.Tensor, torch.nn.Parameter)


class PackedCache:
    """The last packed blob of one weight. A copy and a pickle of it are empty."""

    __slots__ = ("_dx", "_held")

    def __init__(self) -> None:
        # (key, blob, tensors): they are held so that no other tensor can come to lie at their address.
        self._held: tuple[tuple, torch.Tensor, tuple[torch.Tensor, ...]] | None = None
        self._dx: tuple[tuple, torch.Tensor, tuple[torch.Tensor, ...]] | None = None  # for the gradient of x

    def clear(self) -> None:
        """Forget the blobs."""
        self._held = self._dx = None

    def get(self, x, values, crow, col, shape, block, stride, padding, dilation, groups) -> torch.Tensor | None:
        """The blob for these arguments of `sparse_conv2d`, or None where its kernel has none or has to pack itself.

        Of a weight that autograd follows only the structure is kept: the values change at every step, and some
        optimizers write to `.data`, which leaves no trace.
        """
        if torch.compiler.is_compiling() or not packs(x, values):
            return None
        if values.is_inference() or crow.is_inference() or col.is_inference():
            self._held = None
            return None
        trained = values.requires_grad and torch.is_grad_enabled()
        watched = (crow, col) if trained else (crow, col, values)
        channels_last = is_channels_last(x)
        key = _key(watched, stride, padding, dilation, groups, x.shape, channels_last)
        if self._held is not None and self._held[0] == key:
            return self._held[1]
        blob = torch.ops.pyops.sparse_conv2d_pack(
            values.detach(),
            crow,
            col,
            shape,
            block,
            stride,
            padding,
            dilation,
            groups,
            x.shape,
            channels_last,
            not trained,
        )
        self._held = (key, blob, tuple(t.detach() for t in watched))
        return blob

    def get_dx(self, x, values, crow, col, shape, block, stride, padding, dilation, groups) -> torch.Tensor | None:
        """The blob for `sparse_conv2d_dx`, the structure alone, or None where nobody will ask for x's gradient."""
        if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling() or not packs(x, values):
            return None
        if crow.is_inference() or col.is_inference() or not has_native_dx(shape, stride, dilation):
            return None
        channels_last = is_channels_last(x)
        key = _key((crow, col), stride, padding, dilation, groups, x.shape, channels_last)
        if self._dx is None or self._dx[0] != key:
            window = (stride, padding, dilation, groups)
            weight = (values.detach(), crow, col, shape, block)
            blob = torch.ops.pyops.sparse_conv2d_pack_dx(*weight, *window, x.shape, channels_last)
            self._dx = (key, blob, (crow.detach(), col.detach()))
        return self._dx[1]

    def __deepcopy__(self, memo: dict) -> PackedCache:
        return PackedCache()

    def __reduce__(self) -> tuple:
        return PackedCache, ()


def _key(watched, stride, padding, dilation, groups, x_shape, channels_last) -> tuple:
    versions = [v for t in watched for v in (t.data_ptr(), t._version)]
    return (*versions, *stride, *padding, *dilation, groups, *x_shape, channels_last)


def has_native_dx(weight_shape, stride, dilation) -> bool:
    """True if `sparse_conv2d_dx` has a CPU kernel: a pixel's phase within the stride decides which taps reach it."""
    reach = [d * (k - 1) // s + 2 for k, s, d in zip(weight_shape[2:], stride, dilation, strict=True)]
    return tuple(stride) == (1, 1) or (stride[0] * stride[1] <= 64 and max(reach) <= 64)


def packs(x: torch.Tensor, values: torch.Tensor) -> bool:
    """True if the kernel that x goes to reads a packed form."""
    return (
        backend.native is not None
        and x.device.type == "cpu"
        and x.dtype in PACKED_DTYPES
        and values.dtype in (*PACKED_DTYPES, torch.int8)
        and type(x) in PLAIN
        and type(values) in PLAIN
        and not torch._C._are_functorch_transforms_active()
        and torch._C._get_tracing_state() is None  # a trace would hold on to the blob
    )


def is_channels_last(x: torch.Tensor) -> bool:
    """True if x [N, C, H, W] is channels_last and not NCHW too; the result of `sparse_conv2d` has the same format."""
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
