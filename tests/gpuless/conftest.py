"""Tests of GPU kernels on a machine without a GPU.

| file                       | what runs                                              | what it shows                  |
|----------------------------|--------------------------------------------------------|--------------------------------|
| test_triton_interpreter.py | interpreted_*.py in processes with TRITON_INTERPRET=1  | numbers, masks, program order  |
| test_triton_compile.py     | compile_only.py, one process for each GPU target       | spills, instructions, widths   |
| test_cuda_shim.py          | a .cu file as host C++ over shim/, plain and with ASan | numbers, barriers, overruns    |
| test_nvcc.py               | nvcc on the same file                                  | spills, instructions           |

No test here needs a GPU. What they cannot show: time, memory ordering, races between blocks.
"""

import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
CHECKOUT = HERE.parents[1]
for path in (HERE, CHECKOUT):
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))
