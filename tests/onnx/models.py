"""Tiny quantized and merged models, and the ways the tests run them."""

from pathlib import Path

import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qbl_trl.quant.affine import min_max
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import tiny_llama

PAD = 2


def quantize(model: PreTrainedModel, p: int | None = 32, e: int = 2, symmetric: bool = False) -> PreTrainedModel:
    """Replace every linear layer but the head by a packed one, with a random merged delta where p is given."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name not in ("lm_head", "embed_out"):
            packed = GroupQuantLinear.from_affine(
                min_max(layer.weight.data * 5, 32, 4, symmetric, torch.float16),
                bits=4,
                group_size=32,
                symmetric=symmetric,
                bias=None if layer.bias is None else layer.bias.data,
            )
            if p is not None:
                delta = torch.randn(packed.out_features // e, packed.in_features // p, generator=generator) * 0.02
                packed.set_delta(delta, p, e)
            model.set_submodule(name, packed)
    return model


def merged_llama(**changes: object) -> LlamaForCausalLM:
    """A Llama as `merge` leaves it: 4-bit codes, an integer zero point, and a block delta of 32 by 2."""
    settings = {"bos_token_id": 1, "eos_token_id": PAD, "pad_token_id": PAD, "tie_word_embeddings": True, **changes}
    return quantize(tiny_llama(**settings))


def padded_batch(vocabulary: int = 100) -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of nine tokens, the first padded on the left by three."""
    ids = torch.randint(3, vocabulary, (2, 9), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[0, :3], ids[0, :3] = 0, PAD
    return ids, mask


def operators(folder: Path, inner: bool = False) -> list[str]:
    """Operators of the graph of a folder, or of a graph's file; `inner`: those of its subgraphs too."""
    import onnx
    import onnx_ir as ir

    file = folder / "model.onnx" if folder.is_dir() else folder
    graph = ir.from_proto(onnx.load(file, load_external_data=False)).graph
    return [node.op_type for node in (graph.all_nodes() if inner else graph)]
