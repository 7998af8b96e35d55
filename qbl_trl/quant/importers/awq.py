"""AWQ checkpoints (AutoAWQ's GEMM and GEMV layouts, AutoRound's awq packing); 4 bits, asymmetric.

| tensor | GEMM | GEMV |
| --- | --- | --- |
| qweight | (K, N / 8) int32, along N, interleaved | (N, K / 8) int32, along K, in order |
| qzeros | (G, N / 8) int32, interleaved | (N, Z) int32, in order, Z padded |
| scales | (G, N) float16 | (N, 8 Z) float16, padded |

Interleaved: field i of a word holds column (0, 2, 4, 6, 1, 3, 5, 7)[i] of its eight.

Source: AutoAWQ, awq/modules/linear/gemm.py and gemv.py.
"""

from typing import Any

from torch import Tensor

from qbl_trl.errors import CheckpointError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.importers.folders import CODES_ARE_KEPT, FolderReader, refuse_run_time
from qbl_trl.quant.importers.reader import build, split_words
from qbl_trl.quant.linear import GroupQuantLinear

_FIELD_OF_COLUMN = (0, 4, 1, 5, 2, 6, 3, 7)
_BITS = 4


class AWQReader(FolderReader):
    """Reads AWQ folders."""

    kind = "awq"
    marker, parts, scales = "qweight", ("qweight", "qzeros", "scales"), "scales"

    def check(self) -> None:
        refuse_run_time(self.folder, self.quantization)
        version = self._version()
        if version not in ("gemm", "gemv"):
            raise CheckpointError(
                f"{self.folder}: AWQ version {version!r} is not read; allowed: gemm, gemv. Save it as gemm with AutoAWQ"
            )
        bits = self.quantization.get("bits", self.quantization.get("w_bit", _BITS))
        if bits != _BITS:
            raise CheckpointError(f"{self.folder}: AWQ with {bits} bits; this layout is defined for 4")
        scaled = [name for name in self.shards.names() if name.endswith(".scales")]
        alone = [name for name in scaled if name.removesuffix("scales") + self.marker not in self.shards]
        if alone:
            raise CheckpointError(
                f"{self.folder}: {alone[0]} scales an activation while the model runs (AutoAWQ does so in Falcon, "
                f"StarCoder 2, MPT, GPT-NeoX, GPT-J, Bloom and GPT-BigCode), which is not done here. {CODES_ARE_KEPT}"
            )
        if version == "gemv" and not {"group_size", "q_group_size"} & self.quantization.keys():
            raise CheckpointError(f"{self.folder}: no group_size is stated, and the padded scales do not tell it")

    @property
    def stated_group_size(self) -> int:
        return int(self.quantization.get("group_size", self.quantization.get("q_group_size", -1)) or -1)

    def own(self, name: str) -> dict[str, Any]:
        return self.extra(name)

    def geometry(self, name: str) -> tuple[int, int, int, int]:
        bits = self.own(name).get("bits", _BITS)
        if bits != _BITS:
            raise CheckpointError(
                f"{self.folder}: {name} has {bits}-bit codes; the AWQ layout is defined for 4. {CODES_ARE_KEPT}"
            )
        rows, columns = self.shards.shape(f"{name}.qweight")
        if self._version() == "gemm":
            groups, out_features = self.shards.shape(f"{name}.scales")
            return _BITS, out_features, rows, groups
        in_features = columns * 8
        return _BITS, rows, in_features, -(-in_features // self.stated_group_size) if self.stated_group_size > 0 else 1

    def read_layer(self, name: str) -> GroupQuantLinear:
        bits, own_size, size = self.sizes(name)
        words, zero_words, scales = (self.part(name, part) for part in self.parts)
        if self._version() == "gemm":
            codes, zeros, scales = _interleaved(words).T, _interleaved(zero_words).T, scales.T
        else:
            groups = self.geometry(name)[3]
            codes = split_words(words, bits, 1)
            zeros, scales = split_words(zero_words, bits, 1)[:, :groups], scales[:, :groups]
        affine = Affine(codes, scales, zeros)
        return build(affine, bits=bits, own_size=own_size, group_size=size, symmetric=False, bias=self.bias(name))

    def _version(self) -> str:
        return str(self.quantization.get("version") or "gemm").lower()


def _interleaved(words: Tensor) -> Tensor:
    """(R, N / 8) int32 -> (R, N) codes in the order of the columns."""
    fields = split_words(words, _BITS, 1).reshape(len(words), -1, 8)
    return fields[:, :, list(_FIELD_OF_COLUMN)].flatten(1)
