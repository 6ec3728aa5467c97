"""What this installation is made of, and why a part of it is not in use. Plain data, printed by `gradops info`."""
import os
import platform
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch

Row = tuple[str, str]


def rows() -> Iterator[Row]:
    yield "gradops", _version("gradops")
    yield "torch", torch.__version__
    yield "Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    yield from _cpu()
    yield from _cuda()
    yield "emulator", "built in (CUDA kernels on the CPU, for tests)" if _has("_C_emu") else "not built"
    yield "NumPy", _door("_numpy", "numpy")
    yield "JAX", _door("_jax", "jax")


def _has(library: str) -> bool:
    return find_spec(f"gradops.{library}") is not None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu() -> Iterator[Row]:
    try:
        level = torch.ops.gradops.isa()
    except RuntimeError as error:
        yield "CPU kernels", f"error: {error}"
        level = ""
    levels = torch.ops.gradops.isa_levels().split()
    if level:
        forced = os.environ.get("GRADOPS_ISA")
        why = f"forced by GRADOPS_ISA={forced}" if forced else "the best this machine has"
        yield "CPU kernels", f"level {level}, {why}"
    yield "CPU levels", " ".join(levels)
    yield "AMX", _amx(levels)
    yield "CPU threads", f"{torch.get_num_threads()} of {os.cpu_count()}"


def _amx(levels: list[str]) -> str:
    if "amx" in levels:
        return "available"
    try:
        with open("/proc/cpuinfo") as lines:
            flags = next((line for line in lines if line.startswith("flags")), "").split()
    except OSError:
        return "not available"
    if "amx_bf16" not in flags:
        return "not available: the processor has no amx_bf16"
    return "not available: the processor has it, the operating system does not grant it"


def _cuda() -> Iterator[Row]:
    if not _has("_C_cuda"):
        yield "CUDA kernels", "not built (needs nvcc: GRADOPS_CUDA=ON)"
    elif not torch.version.cuda:
        yield "CUDA kernels", "built, not loaded: this torch has no CUDA"
    elif not torch.cuda.is_available():
        yield "CUDA kernels", "loaded, not in use: torch finds no GPU"
    else:
        yield "CUDA kernels", f"loaded, CUDA {torch.version.cuda}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for i in range(count):
        major, minor = torch.cuda.get_device_capability(i)
        yield f"GPU {i}", f"{torch.cuda.get_device_name(i)}, sm_{major}{minor}"
    if not count:
        yield "GPUs", "none"


def _door(library: str, package: str) -> str:
    if not _has(library):
        return "not built"
    return f"available, {package} {version(package)}" if find_spec(package) else f"built, but {package} is missing"
