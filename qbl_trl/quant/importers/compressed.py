"""compressed-tensors checkpoints, format "pack-quantized" (llm-compressor, and what vLLM serves).

| tensor | shape | content |
| --- | --- | --- |
| weight_packed | (N, ceil(K bits / 32)) int32 | q + 2**(bits-1) along K, little-endian |
| weight_scale | (N, G) float | |
| weight_zero_point | (ceil(N bits / 32), G) int32 | z + 2**(bits-1) along N; absent if symmetric |
| weight_shape | (2,) int64 | N, K |
| weight_g_idx | (K,) int32 | only with actorder="group": refused unless trivial |

Codes of 3, 5, 6 and 7 bits go on from word to word; older files held whole ones alone in a word, 32 // bits of them.

Source: compressed-tensors, compressors/pack_quantized.
"""

from typing import Any

import torch

from qbl_trl.allowed import ALLOWED_BITS
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.folders import (
    CODES_ARE_KEPT,
    FolderReader,
    matches,
    refuse_activations,
    refuse_rotations,
)
from qbl_trl.quant.importers.reader import build, split_words
from qbl_trl.quant.linear import GroupQuantLinear


class CompressedReader(FolderReader):
    """Reads compressed-tensors folders."""

    kind = "compressed-tensors"
    marker, scales = "weight_packed", "weight_scale"
    parts = ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    def check(self) -> None:
        named = self.quantization.get("config_groups")
        if not isinstance(named, dict) or not all(map(_is_group, named.values())):
            raise CheckpointError(f"{self.folder}: quantization_config names no config_groups; the file is damaged")
        transforms = self.quantization.get("transform_config") or {}
        inner = transforms.get("config_groups") if isinstance(transforms, dict) else transforms
        refuse_rotations(self.folder, transform_config=inner)
        refuse_activations(self.folder, bool(self.quantization.get("kv_cache_scheme")))
        groups = named.values()
        layouts = {group.get("format") or self.quantization.get("format") for group in groups}
        if layouts != {"pack-quantized"}:
            raise CheckpointError(
                f"{self.folder}: compressed-tensors format {', '.join(sorted(map(str, layouts))) or 'none'} is not "
                f"read; allowed: pack-quantized. {CODES_ARE_KEPT}"
            )
        if any("Embedding" in (group.get("targets") or ()) for group in groups):
            raise CheckpointError(
                f"{self.folder}: embeddings are quantized too (target Embedding), and only linear layers are read; "
                'quantize the model again with targets="Linear"'
            )
        for group in groups:
            refuse_activations(self.folder, any(group.get(f"{side}_activations") for side in ("input", "output")))
            weights = group.get("weights") or {}
            if (weights.get("type") or "int") != "int":
                raise CheckpointError(f"{self.folder}: codes of type {weights['type']!r} are not read; allowed: int")
            strategy = weights.get("strategy")
            if strategy not in ("group", "channel"):
                raise CheckpointError(f"{self.folder}: strategy={strategy!r} is not read; allowed: group, channel")

    @property
    def stated_group_size(self) -> int:
        sizes = {(group["weights"].get("group_size") or -1) for group in self.quantization["config_groups"].values()}
        return int(sizes.pop()) if len(sizes) == 1 else -1

    def geometry(self, name: str) -> tuple[int, int, int, int]:
        out_features, in_features = self.part(name, "weight_shape").tolist()
        words = self.shards.shape(f"{name}.weight_packed")[1]
        fitting = [bits for bits in range(1, 9) if words in (_dense(in_features, bits), _whole(in_features, bits))]
        stated = {weights.get("num_bits") for weights in self._told(name)}
        told = [bits for bits in fitting if bits in stated] + [bits for bits in fitting if bits in ALLOWED_BITS]
        if not told:
            raise self.misshapen(name, f" (num_bits={', '.join(map(str, stated))})")
        bits = told[0]
        return bits, out_features, in_features, self.shards.shape(f"{name}.weight_scale")[1]

    def own(self, name: str) -> dict[str, Any]:
        """Settings of one layer's weights: of the group that names it, or of the one for all linear layers."""
        groups = list(self.quantization["config_groups"].values())
        targets = [(target, group) for group in groups for target in group.get("targets") or ()]
        named = [group for target, group in targets if self._names(target, name)]
        named += [group for target, group in targets if target == "Linear"]
        return dict((named + groups)[0].get("weights") or {}) if named or len(groups) == 1 else {}

    def zeros_kind(self, name: str) -> str:
        stored = f"{name}.weight_zero_point" in self.shards
        if not stored and not any(weights.get("symmetric", True) for weights in self._told(name)):
            raise CheckpointError(f"{self.folder}: symmetric=false, but {name} has no weight_zero_point")
        return "packed" if stored else "none"

    def read_layer(self, name: str) -> GroupQuantLinear:
        bits, own_size, size = self.sizes(name)
        rows, columns = self.part(name, "weight_shape").tolist()
        packed = self.part(name, "weight_packed")
        whole = packed.shape[1] != _dense(columns, bits)
        codes = split_words(packed, bits, 1, whole=whole)[:, :columns]
        scales = self.part(name, "weight_scale")
        if f"{name}.weight_g_idx" in self.shards:
            index = self.part(name, "weight_g_idx").long()
            if not (index == -1).all() and not torch.equal(index, torch.arange(columns) // own_size):
                raise CheckpointError(
                    f"{self.folder}: {name} was quantized with actorder=group: its groups are scattered over the "
                    f"inputs. {CODES_ARE_KEPT}, or take a checkpoint made with actorder=static or none"
                )
        symmetric = self.zeros_kind(name) == "none"
        if symmetric:
            zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.uint8)
        else:
            zeros = self.part(name, "weight_zero_point")
            if zeros.dtype == torch.int8:  # before 0.9.4: signed, a byte each
                zeros = (zeros.short() + (1 << (bits - 1))).to(torch.uint8)
            else:
                zeros = split_words(zeros, bits, 0, whole=whole)[:rows]
        affine = Affine(codes, scales, zeros)
        return build(affine, bits=bits, own_size=own_size, group_size=size, symmetric=symmetric, bias=self.bias(name))

    def _told(self, name: str) -> list[dict[str, Any]]:
        """Settings of a layer's weights; where no group names it, those of every group."""
        own = self.own(name)
        return [own] if own else [group.get("weights") or {} for group in self.quantization["config_groups"].values()]

    def _names(self, target: str, name: str) -> bool:
        """Whether a target of a group is this layer: by name, or by a regular expression behind `re:`."""
        pattern = target.removeprefix("re:")
        return target == name or (pattern != target and matches(self.folder, "targets", pattern, name))


def _is_group(stated: Any) -> bool:
    """Whether this is what a group of layers is described by."""
    if not isinstance(stated, dict) or not isinstance(stated.get("weights") or {}, dict):
        return False
    targets = stated.get("targets") or ()
    return isinstance(targets, list | tuple) and all(isinstance(target, str) for target in targets)


def _dense(count: int, bits: int) -> int:
    """Words of so many codes that go on from word to word."""
    return -(-count * bits // 32)


def _whole(count: int, bits: int) -> int:
    """Words of so many codes, each in one word."""
    return -(-count // (32 // bits))
