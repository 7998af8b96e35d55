"""PackedWeight: what a layer over packed affine codes stores, and the float weight it stands for.

    W[n, k] = scales[n, j] * (codes[n, k] - zeros[n, j]) + delta[n // e, k // p],      j = k // group_size

`delta` is the block change of a merged adapter (absent on a fresh base); where p is a multiple of the group it is
exactly a shift of the zero points, see `qbl_trl.quant.blocks`.

Storage is what the artifact holds: `weight` is a uint8 parameter (so that FSDP2 shards it), scales, zeros and delta
are buffers that keep their dtype when the model around them is cast: casting would change the weights silently.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from qbl_trl.config import SCALE_DTYPES, LayerFormat
from qbl_trl.errors import CheckpointError, ConfigError
from qbl_trl.quant import gpu, native
from qbl_trl.quant.affine import Affine, group_count
from qbl_trl.quant.packing import pack, unpack

Rows = slice | Tensor
Stored = tuple[Tensor, Tensor, Tensor | None]  # codes, scales, zeros
ALL_ROWS = slice(None)
BESIDE_CODES = ("scales", "zeros", "delta")


class PackedWeight(nn.Module):
    """A frozen (N, K) matrix at 2, 4 or 8 bits; the mixin of GroupQuantLinear and GroupQuantEmbedding.

    Attributes:
        weight: (N, G * group_size * bits / 8) uint8 parameter, codes packed as MatMulNBits packs them.
        scales: (N, G) float buffer, weight units per code.
        zeros: (N, ceil(G * bits / 8)) packed uint8, (N, G) float, or None (every zero point is 2**(bits-1)).
        delta: (N / out_factor, K / in_factor) float, weight units, or None.
        format: LayerFormat.
    """

    weight: nn.Parameter
    scales: Tensor
    zeros: Tensor | None
    delta: Tensor | None
    in_features: int
    out_features: int

    def _allocate(self, format: LayerFormat, device: torch.device | str | None) -> None:
        """Register empty storage; in_features and out_features are set by then."""
        self.format = format
        row_bytes = self.groups * self.group_size * self.bits // 8
        codes = torch.empty(self.out_features, row_bytes, dtype=torch.uint8, device=device)
        self.weight = nn.Parameter(codes, requires_grad=False)
        scale_dtype = SCALE_DTYPES[format.scale_dtype]
        self.register_buffer("scales", torch.empty(self.out_features, self.groups, dtype=scale_dtype, device=device))
        self.register_buffer("zeros", self._empty_zeros(device))
        self.register_buffer("delta", self._empty_delta(device))
        self._is_hf_initialized = True  # transformers must never re-initialize packed codes

    @classmethod
    def _empty(cls, in_features: int, out_features: int, format: LayerFormat, **kwargs: Any) -> Self:
        raise NotImplementedError

    @property
    def bits(self) -> int:
        return self.format.bits

    @property
    def group_size(self) -> int:
        return self.format.group_size

    @property
    def stored(self) -> Stored:
        """Codes, scales and zeros as they are held."""
        return self.weight, self.scales, self.zeros

    @property
    def groups(self) -> int:
        """G, the number of groups of one row."""
        return group_count(self.in_features, self.group_size)

    @classmethod
    def from_affine(cls, affine: Affine, *, bits: int, group_size: int, symmetric: bool = False, **kwargs: Any) -> Self:
        """Pack codes, scales and zeros as they are.

        Args:
            affine: codes (N, K) uint8, scales (N, G) float, zeros (N, G) uint8 (stored packed) or float (stored so).
            symmetric: every zero point is 2**(bits-1); zeros are then not stored.
            kwargs: what the class adds: `bias` of a linear layer, `dtype` and `padding_idx` of an embedding.

        Raises:
            ConfigError: if shapes or dtypes do not fit each other.
        """
        codes, scales, zeros = affine
        out_features, in_features = codes.shape
        groups = group_count(in_features, group_size)
        if scales.shape != (out_features, groups) or zeros.shape != (out_features, groups):
            raise ConfigError(
                f"codes {tuple(codes.shape)} in groups of {group_size} need scales and zeros of "
                f"{(out_features, groups)}, got {tuple(scales.shape)} and {tuple(zeros.shape)}"
            )
        if symmetric and not bool((zeros == 1 << (bits - 1)).all()):
            raise ConfigError(f"symmetric {bits}-bit codes have every zero point at {1 << (bits - 1)}")
        names = {dtype: name for name, dtype in SCALE_DTYPES.items()}
        if scales.dtype not in names:
            raise ConfigError(f"scales of {scales.dtype}: allowed are {', '.join(SCALE_DTYPES)}")
        kind = "none" if symmetric else names.get(zeros.dtype, "packed")
        stored = LayerFormat(bits, group_size, kind, names[scales.dtype])
        layer = cls._empty(in_features, out_features, stored, **kwargs)
        filled = torch.nn.functional.pad(codes, (0, groups * group_size - in_features))
        layer.weight = nn.Parameter(pack(filled, bits), requires_grad=False)
        layer.scales = scales.contiguous()
        if kind != "none":
            layer.zeros = pack(zeros, bits) if kind == "packed" else zeros.contiguous()
        return layer

    def affine(self) -> Affine:
        """Codes (N, K) uint8, scales (N, G) as stored, zeros (N, G) uint8 or float: unpacked, without the delta."""
        codes = unpack(self.weight.data, self.bits, self.groups * self.group_size)[:, : self.in_features]
        return Affine(codes, self.scales, self.zero_points())

    def zero_points(self, rows: Rows = ALL_ROWS, stored: Stored | None = None) -> Tensor:
        """(N, G) zeros in code units: uint8 where they are integers, the stored float dtype otherwise."""
        _, scales, zeros = stored or self.stored
        if zeros is None:
            return torch.full_like(scales[rows], 1 << (self.bits - 1), dtype=torch.uint8)
        return unpack(zeros[rows], self.bits, self.groups) if self.format.zeros == "packed" else zeros[rows]

    def dequantize(self, start: int = 0, stop: int | None = None) -> Tensor:
        """W, the weight this layer stands for, delta included.

        Args:
            start, stop: rows to return; where there is a delta, multiples of its out_factor.

        Returns:
            (stop - start, in_features) float32.
        """
        weight = self.dequantize_rows(slice(start, stop))
        if self.delta is not None:
            p, e = self.format.in_factor or 1, self.format.out_factor or 1
            delta = self.delta[start // e : None if stop is None else stop // e]
            blocks = weight.unflatten(0, (-1, e)).unflatten(-1, (-1, p))
            blocks += delta.float()[:, None, :, None]
        return weight

    def dequantize_rows(self, rows: Rows, dtype: torch.dtype = torch.float32, stored: Stored | None = None) -> Tensor:
        """Some rows of s (q - z), without a delta: a slice or (T,) indices -> (T, in_features).

        Computed in float32 and rounded once to `dtype`, by whichever path is fastest here; all give the same bits.

        Args:
            stored: codes, scales and zeros to read in place of the layer's own.
        """
        weight, scales, zeros = stored or self.stored
        groups, size = self.groups, self.group_size
        if isinstance(rows, slice):
            some = weight.data[rows], scales[rows], None if zeros is None else zeros[rows]
            fused = gpu.dequantize_rows(*some, self.bits, size, self.in_features, dtype)
            if fused is None and self.bits == 4:
                fused = native.dequantize_rows(*some, size)
            if fused is not None:
                return fused[:, : self.in_features].to(dtype)
        codes = unpack(weight.data[rows], self.bits, groups * size).view(-1, groups, size)
        scales, zeros = scales[rows].float().unsqueeze(-1), self.zero_points(rows, (weight, scales, zeros))
        if zeros.is_floating_point():
            weight = codes.float().sub_(zeros.float().unsqueeze(-1)).mul_(scales)
        elif self.bits == 8:
            weight = codes.float().sub_(zeros.unsqueeze(-1)).mul_(scales)
        else:  # the difference of two codes fits into a byte: four times less memory to stream than float
            weight = codes.view(torch.int8).sub(zeros.view(torch.int8).unsqueeze(-1)).float().mul_(scales)
        return weight.flatten(1)[:, : self.in_features].to(dtype)

    def multiply(self, x: Tensor, out: Tensor) -> bool:
        """out = x W^T for a few tokens (T, in_features), straight from the codes, without a delta.

        The weights are those of `dequantize_rows`; only the order in which their products are summed is its own.

        Returns:
            Whether it was done; False where a matrix product is faster, and `out` (T, out_features) is untouched.
        """
        codes, scales, zeros = self.stored
        if gpu.multiply(x, codes.data, scales, zeros, self.bits, self.group_size, out):
            return True
        return self.bits == 4 and native.multiply(x, codes.data, scales, zeros, self.group_size, out)

    def set_delta(self, delta: Tensor | None, in_factor: int | None = None, out_factor: int | None = None) -> None:
        """Replace the merged block delta in place (None removes it); codes, scales and zeros stay as they are.

        Raises:
            ConfigError: if delta is not (out_features / out_factor, in_features / in_factor).
        """
        if delta is None:
            in_factor = out_factor = None
        else:
            p, e = in_factor or 1, out_factor or 1
            if delta.shape[0] * e != self.out_features or delta.shape[1] * p != self.in_features:
                raise ConfigError(
                    f"a delta of {tuple(delta.shape)} with in_factor={p}, out_factor={e} does not cover a layer of "
                    f"({self.out_features}, {self.in_features})"
                )
            in_factor, out_factor = p, e
        dtype = self.format.delta_dtype if delta is None else str(delta.dtype).removeprefix("torch.")
        stored = self.format
        self.format = LayerFormat(
            stored.bits, stored.group_size, stored.zeros, stored.scale_dtype, in_factor, out_factor, dtype
        )
        self.delta = delta

    def _empty_zeros(self, device: torch.device | str | None) -> Tensor | None:
        if self.format.zeros == "none":
            return None
        if self.format.zeros == "packed":
            width = -(-self.groups * self.bits // 8)
            return torch.empty(self.out_features, width, dtype=torch.uint8, device=device)
        return torch.empty(self.out_features, self.groups, dtype=SCALE_DTYPES[self.format.zeros], device=device)

    def _empty_delta(self, device: torch.device | str | None) -> Tensor | None:
        p, e = self.format.in_factor, self.format.out_factor
        if p is None or e is None:
            return None
        if self.in_features % p or self.out_features % e:
            raise ConfigError(
                f"a merged delta with in_factor={p}, out_factor={e} does not fit a layer of "
                f"({self.out_features}, {self.in_features})"
            )
        shape = (self.out_features // e, self.in_features // p)
        return torch.empty(shape, dtype=SCALE_DTYPES[self.format.delta_dtype], device=device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: buffer for name in BESIDE_CODES if (buffer := self._buffers[name]) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            if after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("weight", *BESIDE_CODES):
            given, own = state_dict.get(prefix + name), getattr(self, name)
            if given is not None and own is not None and given.dtype != own.dtype:
                raise CheckpointError(
                    f"{prefix}{name}: stored as {given.dtype}, this layer holds {own.dtype}; "
                    "the file belongs to another format"
                )
        super()._load_from_state_dict(state_dict, prefix, *args)
