"""One pass from 4-bit codes to float weights on a CPU: `dequantize.c`, built with the machine's C compiler.

Plain torch takes seven passes over the same memory. The library is built on first use (under a second), kept in the
user's cache, and used only after it gave the plain path's bits on a sample. Without a compiler, or on a processor the
source has no path for, everything works as before, slower. QBL_TRL_NATIVE=0 turns it off.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.packing import pack

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("dequantize.c")
_FLAGS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")
_LANES = 32  # codes the kernel takes at a time
_SMALLEST = 1 << 14  # weights; below, calling costs more than it saves


def dequantize_rows(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor | None:
    """s (q - z) of 4-bit codes in one pass, the bits of the plain path.

    Args:
        codes: (N, G * group_size / 2) packed uint8.
        scales: (N, G) float.
        zeros: (N, ceil(G / 2)) packed uint8, (N, G) float, or None (every zero point is 8).

    Returns:
        (N, G * group_size) float32; None where the plain path has to do it.
    """
    rows, groups = scales.shape
    fits = codes.device.type == "cpu" and group_size % _LANES == 0 and rows * groups * group_size >= _SMALLEST
    if not fits or torch.compiler.is_compiling() or type(codes) is not Tensor or not codes.is_contiguous():
        return None
    library = _library()
    return None if library is None else _call(library, codes, scales, zeros, group_size)


def _call(library: ctypes.CDLL, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    rows, groups = scales.shape
    out = torch.empty(rows, groups * group_size, dtype=torch.float32, device=codes.device)
    scales = scales.float().contiguous()
    packed = zeros is not None and not zeros.is_floating_point()
    if zeros is not None:
        zeros = (zeros if packed else zeros.float()).contiguous()
    address = None if zeros is None else zeros.data_ptr()
    library.qbl_dequantize(
        codes.data_ptr(),
        scales.data_ptr(),
        address if packed else None,
        None if packed else address,
        out.data_ptr(),
        rows,
        groups,
        group_size,
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The loaded and checked library, once per process; None where there is none."""
    if os.environ.get("QBL_TRL_NATIVE") == "0" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        library = ctypes.CDLL(str(_built()))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.qbl_dequantize.argtypes = [*[pointer] * 5, *[size] * 3, ctypes.c_int]
        library.qbl_dequantize.restype = None
        return library if library.qbl_supported() and _agrees(library) else None
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("4-bit weights are unpacked by plain torch, a few times slower: %s", error)
        return None


def _built() -> Path:
    """The shared library for this source, from the cache or built now.

    Raises:
        OSError, SubprocessError: if there is no compiler, or it fails.
    """
    name = hashlib.sha256(_SOURCE.read_bytes() + repr(_FLAGS).encode()).hexdigest()[:16] + ".so"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbl_trl" / "kernels"
    if (cache / name).is_file():
        return cache / name
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    folder = cache if os.access(cache, os.W_OK) else Path(tempfile.mkdtemp(prefix="qbl_trl-"))
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        built = Path(draft, name)
        _compile(compiler, built)
        os.replace(built, folder / name)
    return folder / name


def _compile(compiler: str, output: Path) -> None:
    """With OpenMP, which then shares torch's own threads; without it where the compiler has none."""
    command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(output)]
    if subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=60, check=False).returncode != 0:
        subprocess.run(command, capture_output=True, timeout=60, check=True)


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives the plain path's bits, on every code under every kind of zero point."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(16, dtype=torch.uint8, device="cpu").repeat(3, 12)
    scales = torch.rand(3, 6, generator=generator, dtype=torch.float32, device="cpu").half()
    whole = torch.randint(0, 16, (3, 6), generator=generator, dtype=torch.uint8, device="cpu")
    middle = torch.full_like(whole, 8)
    broken = torch.rand(3, 6, generator=generator, dtype=torch.float32, device="cpu") * 15
    cases = ((pack(whole, 4), whole), (broken, broken), (None, middle))
    same = all(
        torch.equal(_call(library, pack(codes, 4), scales, stored, 32), dequantize(codes, scales, zeros, 32))
        for stored, zeros in cases
    )
    if not same:
        logger.warning("the compiled unpacking of 4-bit weights disagrees with torch on this machine; it is not used")
    return same


__all__ = ["dequantize_rows"]
