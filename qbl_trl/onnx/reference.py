"""The torch model an exported graph is held against, in float32, without touching the caller's model."""

import torch
from torch import Tensor, nn

from qbl_trl.adapter.bases import BNB4, foreign_kind
from qbl_trl.onnx.layers import Bnb4Base
from qbl_trl.onnx.sources import linear_source
from qbl_trl.quant.embedding import GroupQuantEmbedding
from qbl_trl.quant.modules import copied, plain_forward_
from qbl_trl.quant.packed import PackedWeight


def float32_reference(model: nn.Module) -> nn.Module:
    """The model itself if it computes in float32 already; else a copy that does, sharing the packed weights.

    bitsandbytes layers are always replaced by their dequantized equals: their own eval-mode forward may repack the
    codes on CPUs, and what would be exported afterwards is garbage.
    """
    foreign = {module: name for name, module in model.named_modules() if foreign_kind(module) == BNB4}
    own = getattr(model.config, "_attn_implementation", None)  # flash attention computes in half precision
    elsewhere = own not in (None, "eager", "sdpa", "flex_attention")
    floats = [p for p in [*model.parameters(), *model.buffers()] if p.is_floating_point()]
    packed = {id(buffer) for module in _packed(model) for buffer in [*module.buffers(), *module.parameters()]}
    whole = not foreign and all(p.dtype == torch.float32 or id(p) in packed for p in floats)
    if whole and not elsewhere:
        return model
    others: dict[nn.Module, nn.Module] = {module: _Shared(module) for module in _packed(model)}
    others |= {module: _Dequantized(name, module) for module, name in foreign.items()}
    made = plain_forward_(copied(model, lambda tensor: tensor if whole else None, others))
    if elsewhere:
        made.config._attn_implementation = "eager"  # type: ignore[union-attr]
    # Not `made.float()`: transformers forbids it on a quantized model, whose packed layers are left alone here.
    return nn.Module.float(made).eval()


def _packed(model: nn.Module) -> list[PackedWeight]:
    return [module for module in model.modules() if isinstance(module, PackedWeight)]


class _Shared(nn.Module):
    """Runs another model's packed layer without owning it."""

    def __init__(self, layer: PackedWeight) -> None:
        super().__init__()
        self._run = [layer]  # in a list: not registered, so neither copied nor cast

    @property
    def weight(self) -> Tensor:
        weight: Tensor = self._run[0].weight
        return weight

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = getattr(self._run[0], "bias", None)
        return None if bias is None else bias.float()

    def forward(self, x: Tensor) -> Tensor:
        layer = self._run[0]
        if isinstance(layer, GroupQuantEmbedding):  # its own forward rounds to the dtype of the model
            return layer.look_up(x, torch.float32)
        y: Tensor = layer(x)
        return y


class _Dequantized(nn.Module):
    """A bitsandbytes layer by the definition of its codes: y = codebook[code] * absmax[block] x + bias."""

    def __init__(self, name: str, layer: nn.Module) -> None:
        super().__init__()
        source = linear_source(name, layer)
        self._source = [source]

    @property
    def bias(self) -> Tensor | None:
        source = self._source[0]
        return None if source is None or source.bias is None else source.bias.read().float()

    def forward(self, x: Tensor) -> Tensor:
        source, bias = self._source[0], self.bias
        if source is None or not isinstance(source.base, Bnb4Base):
            raise TypeError("not a 4-bit bitsandbytes layer")
        weight = dequantize_bnb4(source.base, source.out_features, source.in_features)
        return nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def dequantize_bnb4(base: Bnb4Base, rows: int, columns: int) -> Tensor:
    """(N, K) float32: two codes a byte, the first in the high nibble, blocks along the flattened weight."""
    from bitsandbytes.functional import get_4bit_type

    book = get_4bit_type(base.codebook, device="cpu").float()
    codes = torch.stack([base.codes >> 4, base.codes & 15], -1).reshape(-1).long()
    scale = base.absmax.repeat_interleave(base.block_size)[: codes.numel()]
    return (book[codes] * scale).view(rows, columns)
