"""The Triton kernels. Their sources lie in `kernels/` at the top of the checkout; wheels carry them here."""

import pathlib

_checkout = pathlib.Path(__file__).resolve().parents[2] / "kernels"
__path__ += [str(_checkout)] if (_checkout / "int8_linear.py").is_file() else []
