"""Where nvcc, its headers and its inspection tools are, and what a cubin holds."""

from __future__ import annotations

import collections
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess

SHIM = pathlib.Path(__file__).resolve().parent / "shim"


@functools.cache
def find_nvcc() -> str | None:
    """The nvcc of CUDA_HOME, of the PATH or of /usr/local/cuda, or None."""
    if "CUDA_HOME" in os.environ:
        return shutil.which("nvcc", path=os.path.join(os.environ["CUDA_HOME"], "bin"))
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


@functools.cache
def find_cuda_headers() -> str | None:
    """The folder with the headers that come with nvcc, or None."""
    if find_nvcc() is None:
        return None
    # A dry run prints `#$ INCLUDES="-I…/bin/../targets/x86_64-linux/include"`, also where nvcc is a wrapper script.
    command = [find_nvcc(), "--dryrun", "-c", "-x", "cu", os.devnull]
    dry_run = subprocess.run(command, capture_output=True, text=True).stderr
    folders = re.findall(r'-I"?([^"\s]+)', dry_run)
    return next((folder for folder in folders if pathlib.Path(folder, "cuda_fp16.h").is_file()), None)


@functools.cache
def find_cuobjdump() -> str | None:
    """The cuobjdump of the Triton wheel or of the PATH, or None."""
    triton = importlib.util.find_spec("triton")
    if triton is not None:
        tool = pathlib.Path(triton.submodule_search_locations[0], "backends", "nvidia", "bin", "cuobjdump")
        if tool.is_file():
            return str(tool)
    return shutil.which("cuobjdump")


def inspect_cubin(path: str | os.PathLike) -> dict:
    """Resources and instructions in a cubin: the most registers, stack and local bytes of a kernel; opcode counts."""
    usage = subprocess.run([find_cuobjdump(), "-res-usage", path], capture_output=True, text=True, check=True).stdout
    sass = subprocess.run([find_cuobjdump(), "-sass", path], capture_output=True, text=True, check=True).stdout

    def most(field: str) -> int:
        return max(int(value) for value in re.findall(rf"\b{field}:(\d+)", usage))

    # "        /*0010*/              @P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)", sass, re.MULTILINE)
    return {
        "registers": most("REG"),
        "stack_bytes": most("STACK"),
        "local_bytes": most("LOCAL"),
        "opcodes": dict(collections.Counter(opcodes)),
    }
