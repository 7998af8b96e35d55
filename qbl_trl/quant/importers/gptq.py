"""GPTQ checkpoints (AutoGPTQ, GPTQModel, AutoRound's gptq packing).

| tensor | shape | content |
| --- | --- | --- |
| qweight | (K bits / 32, N) int32 | codes packed along K, little-endian |
| qzeros | (G, N bits / 32) int32 | zero points packed along N; format v1 stores them less one |
| scales | (G, N) float16 | |
| g_idx | (K,) int32 | group of each input; k // group_size unless "act order" permuted the inputs |

Version 1 subtracted one from every packed word, borrows and all; adding the same word back with wrap-around restores
each zero point. Those of 3 bits, which go on from word to word, it lowered one by one. Groups permuted by act order are
not contiguous along K, so no group-wise kernel or fold applies: such a file is refused.

Source: GPTQModel, gptqmodel/utils/model.py (convert_gptq_v1_to_v2_format), its TorchLinear, and dynamic_get.
"""

from typing import Any

import torch

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.folders import (
    CODES_ARE_KEPT,
    FolderReader,
    by_pattern,
    matches,
    refuse_activations,
    refuse_run_time,
)
from qbl_trl.quant.importers.reader import build, split_words
from qbl_trl.quant.linear import GroupQuantLinear


class GPTQReader(FolderReader):
    """Reads GPTQ folders, v1 and v2."""

    kind = "gptq"
    marker, parts, scales = "qweight", ("qweight", "qzeros", "scales", "g_idx"), "scales"

    def check(self) -> None:
        layout = self._layout()
        if layout not in ("gptq", "gptq_v2"):
            raise CheckpointError(
                f"{self.folder}: checkpoint_format={layout!r} reorders codes for one kernel; allowed: gptq, gptq_v2. "
                "Save it in one of these with GPTQModel first"
            )
        width = str(self.quantization.get("pack_dtype") or "int32").removeprefix("torch.")
        if width != "int32":
            raise CheckpointError(f"{self.folder}: pack_dtype={width!r} is not read; allowed: int32")
        refuse_activations(self.folder, int(self.quantization.get("act_bits") or 16) < 16)
        refuse_run_time(self.folder, self.quantization)

    @property
    def stated_group_size(self) -> int:
        return int(self.quantization.get("group_size") or -1)

    def geometry(self, name: str) -> tuple[int, int, int, int]:
        groups, out_features = self.shards.shape(f"{name}.scales")
        bits = self.shards.shape(f"{name}.qzeros")[1] * 32 // out_features
        if bits in (5, 6, 7):
            raise CheckpointError(
                f"{self.folder}: {name} has {bits}-bit codes, which GPTQModel spreads over planes of bits; those of 2, "
                f"3, 4 and 8 are read. {CODES_ARE_KEPT}"
            )
        return bits, out_features, self.shards.shape(f"{name}.qweight")[0] * 32 // max(bits, 1), groups

    def zeros_kind(self, name: str) -> str:
        if self._layout() == "gptq" and self._differs(name):
            raise self._unknown_layout(name)
        return "none" if self._symmetric(name) else "packed"

    def read_layer(self, name: str) -> GroupQuantLinear:
        bits, own_size, size = self.sizes(name)
        codes = split_words(self.part(name, "qweight"), bits, 0).T
        self._check_order(name, codes.shape[1], own_size)
        words, less_one = self.part(name, "qzeros"), self._layout() == "gptq"
        if less_one and 32 % bits == 0:
            words = words + _ones_word(bits)
        scales = self.part(name, "scales").T
        zeros = split_words(words, bits, 1).T[: codes.shape[0]]
        if less_one and 32 % bits:  # every one by itself
            zeros = (zeros + 1) & ((1 << bits) - 1)
        symmetric = self._symmetric(name)
        if symmetric and not bool((zeros == 1 << (bits - 1)).all()):
            if self._differs(name):
                raise self._unknown_layout(name)
            raise CheckpointError(
                f"{self.folder}: the configuration says sym=true, but {name} has zero points other than "
                f"{1 << (bits - 1)}; set sym to false, or checkpoint_format to "
                f"{'gptq_v2' if self._layout() == 'gptq' else 'gptq'}, whichever is true of the file"
            )
        affine = Affine(codes, scales, zeros)
        return build(affine, bits=bits, own_size=own_size, group_size=size, symmetric=symmetric, bias=self.bias(name))

    def _check_order(self, name: str, in_features: int, own_size: int) -> None:
        if f"{name}.g_idx" not in self.shards:
            if self.quantization.get("desc_act"):
                raise CheckpointError(
                    f"{self.folder}: desc_act=true, but {name} has no g_idx: which group an input is in cannot be known"
                )
            return
        index = self.part(name, "g_idx").long()
        if index.shape != (in_features,):
            raise self.misshapen(name)
        if not torch.equal(index, torch.arange(in_features) // own_size):
            raise CheckpointError(
                f"{self.folder}: {name} was quantized with desc_act=true (act order): its groups are scattered over "
                f"the inputs, so they have no shared zero point to fold into. {CODES_ARE_KEPT}, or take a checkpoint "
                "made with desc_act=false or act_group_aware=true"
            )

    def _differs(self, name: str) -> bool:
        """Whether AutoRound gave a layer another symmetry than the rest: some versions then pack it otherwise."""
        own, common = self.own(name).get("sym"), bool(self.quantization.get("sym", False))
        return "packing_format" in self.quantization and own is not None and bool(own) != common

    def _unknown_layout(self, name: str) -> CheckpointError:
        own = self._symmetric(name)
        return CheckpointError(
            f"{self.folder}: {name} has sym={str(own).lower()}, the rest sym={str(not own).lower()}: in "
            f"packing_format={self.quantization['packing_format']!r} it cannot be known whether its zero points are "
            "stored less one. Quantize with one sym for all layers"
        )

    def _layout(self) -> str:
        packing = self.quantization.get("packing_format")
        if packing is not None and not isinstance(packing, str):
            raise CheckpointError(
                f"{self.folder}: packing_format={packing!r} is no name of a packing, such as auto_gptq"
            )
        if packing is not None:  # AutoRound: only its gptq packings subtract one
            return "gptq" if "gptq" in packing and "gptqmodel" not in packing else "gptq_v2"
        return str(self.quantization.get("checkpoint_format") or "gptq")

    def _symmetric(self, name: str) -> bool:
        return bool(self.own(name).get("sym", self.quantization.get("sym", False)))

    def own(self, name: str) -> dict[str, Any]:
        """Settings of one layer: of the first of GPTQModel's `dynamic` patterns that its name begins with."""
        for pattern, own in by_pattern(self.folder, self.quantization, "dynamic").items():
            if not pattern.startswith("-:") and matches(self.folder, "dynamic", pattern.removeprefix("+:"), name):
                return own
        return self.extra(name)


def _ones_word(bits: int) -> int:
    """A 32-bit word with a one in every field of `bits` bits, as a signed integer."""
    return sum(1 << shift for shift in range(0, 32, bits))
