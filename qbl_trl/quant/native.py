"""4-bit codes to float weights, or to a product with a few tokens, in one pass on a CPU: `native.c`, built with the
machine's C compiler.

Plain torch takes seven passes over the same memory, and a generating model pays them for every token. The library is
built on first use (under a second), kept in the user's cache, and used only after it gave the plain path's bits on a
sample. Without a compiler, or on a processor that the source has no path for, everything works as before, slower.
QBL_TRL_NATIVE=0 turns it off.
"""

import atexit
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
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from qbl_trl.quant.affine import dequantize
from qbl_trl.quant.packing import pack

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("native.c")
_FLAGS = ("-O3", "-shared", "-fPIC", "-ffp-contract=off")
_LANES = 32  # codes the kernel takes at a time
_SMALLEST = 1 << 14  # weights; below, calling costs more than it saves
_MOST_TOKENS = 16  # above, writing the weights out for a matrix product is faster


def dequantize_rows(codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor | None:
    """s (q - z) of 4-bit codes in one pass, the bits of the plain path.

    Args:
        codes: (N, G * group_size / 2) packed uint8.
        scales: (N, G) float.
        zeros: (N, ceil(G / 2)) packed uint8, (N, G) float, or None (every zero point is 8).

    Returns:
        (N, G * group_size) float32; None where the plain path has to do it.
    """
    if not _fits(codes, scales, group_size):
        return None
    library = _library()
    return None if library is None else _dequantize(library, codes, scales, zeros, group_size)


def multiply(x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int, out: Tensor) -> bool:
    """x W^T for a few tokens, without W in memory; its weights are those of `dequantize_rows`, summed in float32.

    Args:
        x: (T, K) float32, K up to G * group_size.
        codes, scales, zeros: as for `dequantize_rows`.
        out: (T, N) float32, contiguous; where the product goes.

    Returns:
        Whether it was done. It is not where a matrix product is faster or has to do it; `out` is then untouched.
    """
    tokens, columns = x.shape
    if not 0 < tokens <= _MOST_TOKENS or not _fits(codes, scales, group_size) or type(x) is not Tensor:
        return False
    fits = columns <= scales.shape[1] * group_size and out.shape == (tokens, scales.shape[0]) and out.is_contiguous()
    plain = all(t.dtype == torch.float32 and t.device.type == "cpu" for t in (x, out))
    if not fits or not plain:
        return False
    library = _library()
    if library is not None:
        _multiply(library, x, codes, scales, zeros, group_size, out)
    return library is not None


def _fits(codes: Tensor, scales: Tensor, group_size: int) -> bool:
    if codes.device.type != "cpu" or group_size % _LANES or scales.numel() * group_size < _SMALLEST:
        return False
    return not torch.compiler.is_compiling() and type(codes) is Tensor and codes.is_contiguous()


def _dequantize(library: ctypes.CDLL, codes: Tensor, scales: Tensor, zeros: Tensor | None, group_size: int) -> Tensor:
    rows, groups = scales.shape
    out = torch.empty(rows, groups * group_size, dtype=torch.float32, device=codes.device)
    with _addresses(codes, scales, zeros) as stored:
        library.qbl_dequantize(*stored, out.data_ptr(), rows, groups, group_size, torch.get_num_threads())
    return out


def _multiply(
    library: ctypes.CDLL,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    group_size: int,
    out: Tensor,
) -> None:
    rows, groups = scales.shape
    filled = torch.nn.functional.pad(x, (0, groups * group_size - x.shape[1])).contiguous()
    sizes = x.shape[0], rows, groups, group_size, torch.get_num_threads()
    with _addresses(codes, scales, zeros) as stored:
        library.qbl_multiply(*stored, filled.data_ptr(), out.data_ptr(), *sizes)


@contextlib.contextmanager
def _addresses(codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Iterator[tuple[int | None, ...]]:
    """Where codes, float scales, packed zeros and float zeros lie, as long as the block lasts."""
    wide = scales.float().contiguous()
    packed = zeros is not None and not zeros.is_floating_point()
    points = None if zeros is None else (zeros if packed else zeros.float()).contiguous()
    address = None if points is None else points.data_ptr()
    yield codes.data_ptr(), wide.data_ptr(), address if packed else None, None if packed else address


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The loaded and checked library, once per process; None where there is none."""
    if os.environ.get("QBL_TRL_NATIVE") == "0" or platform.machine().lower() not in ("x86_64", "amd64"):
        return None
    try:
        library = ctypes.CDLL(str(_built()))
        pointer, size = ctypes.c_void_p, ctypes.c_int64
        library.qbl_dequantize.argtypes = [*[pointer] * 5, *[size] * 3, ctypes.c_int]
        library.qbl_multiply.argtypes = [*[pointer] * 6, *[size] * 4, ctypes.c_int]
        library.qbl_dequantize.restype = library.qbl_multiply.restype = None
        return library if library.qbl_supported() and _agrees(library) else None
    except (OSError, RuntimeError, AttributeError, subprocess.SubprocessError) as error:
        logger.info("4-bit weights are unpacked by plain torch, a few times slower: %s", error)
        return None


def _built() -> Path:
    """The shared library for this source, from the cache or built now.

    Raises:
        OSError, SubprocessError: if there is no compiler, or it fails.
    """
    source = _digest(_SOURCE.read_bytes() + repr(_FLAGS).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qbl_trl" / "kernels"
    for file in sorted(cache.glob(f"{source}-*.so")):
        if file.is_file() and file.stem == f"{source}-{_digest(file.read_bytes())}":  # a damaged one ends the process
            return file
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("cc", "gcc", "clang")), None)
    if compiler is None:
        raise OSError("no C compiler was found")
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    folder = cache
    if not os.access(cache, os.W_OK):
        folder = Path(tempfile.mkdtemp(prefix="qbl_trl-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=folder) as draft:
        built = Path(draft, "built.so")
        _compile(compiler, built)
        library = folder / f"{source}-{_digest(built.read_bytes())}.so"
        os.replace(built, library)
    for old in (file for file in folder.glob(f"{source}-*.so") if file != library):
        if _digest(old.read_bytes()) != old.stem.partition("-")[2]:
            old.unlink(missing_ok=True)
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _compile(compiler: str, output: Path) -> None:
    """With OpenMP, which then shares torch's own threads; without it where the compiler has none."""
    command = [*compiler.split(), *_FLAGS, str(_SOURCE), "-o", str(output)]
    if subprocess.run([*command, "-fopenmp"], capture_output=True, timeout=60, check=False).returncode != 0:
        subprocess.run(command, capture_output=True, timeout=60, check=True)


def _agrees(library: ctypes.CDLL) -> bool:
    """Whether the library gives the plain path's bits, on every code under every kind of zero point.

    Products are asked for on whole numbers and scales that are powers of two: no order of summation rounds them.
    """
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(16, dtype=torch.uint8, device="cpu").repeat(3, 12)
    scales = torch.rand(3, 6, generator=generator, dtype=torch.float32, device="cpu").half()
    whole = torch.randint(0, 16, (3, 6), generator=generator, dtype=torch.uint8, device="cpu")
    middle = torch.full_like(whole, 8)
    broken = torch.rand(3, 6, generator=generator, dtype=torch.float32, device="cpu") * 15
    cases = ((pack(whole, 4), whole), (broken, broken), (None, middle))
    same = all(
        torch.equal(_dequantize(library, pack(codes, 4), scales, stored, 32), dequantize(codes, scales, zeros, 32))
        for stored, zeros in cases
    )
    powers = torch.exp2(whole.float() - 8)
    for tokens in range(1, 6):
        x = torch.randint(-9, 9, (tokens, 192), generator=generator, device="cpu").float()
        for stored, zeros in ((pack(whole, 4), whole), (whole.float(), whole), (None, middle)):
            found = torch.empty(tokens, 3, dtype=torch.float32, device="cpu")
            _multiply(library, x, pack(codes, 4), powers, stored, 32, found)
            same = same and torch.equal(found, x @ dequantize(codes, powers, zeros, 32).T)
    if not same:
        logger.warning("the compiled kernels for 4-bit weights disagree with torch on this machine; they are not used")
    return same
