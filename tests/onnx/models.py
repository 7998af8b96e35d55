"""Tiny quantized and merged models, and the ways the tests run them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM, PreTrainedModel

from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.affine import min_max
from qbl_trl.quant.linear import GroupQuantLinear
from tests.tiny import tiny_llama

PAD = 2


def quantize(model: PreTrainedModel, p: int | None = 32, e: int = 2, symmetric: bool = False) -> PreTrainedModel:
    """Replace every linear layer but the head by a packed one, with a random merged delta where p is given."""
    generator = torch.Generator().manual_seed(1)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear and name not in ("lm_head", "embed_out") and layer.in_features % 32 == 0:
            packed = GroupQuantLinear.from_affine(
                min_max(layer.weight.data * 5, 32, 4, symmetric, torch.float16),
                bits=4,
                group_size=32,
                symmetric=symmetric,
                bias=None if layer.bias is None else layer.bias.data,
            )
            if p is not None and packed.out_features % e == 0:
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


def ort_model(folder: Path, **options: Any) -> Any:
    """The folder in ORTModelForCausalLM; skips the test where transformers is newer than Optimum takes."""
    runtime = pytest.importorskip("optimum.onnxruntime", reason="needs Optimum, which needs transformers 4.57")
    return runtime.ORTModelForCausalLM.from_pretrained(folder, **options)


def greedy(folder: Path, ids: torch.Tensor, mask: torch.Tensor, new: int) -> torch.Tensor:
    """Texts gone on with by the graph alone, `new` tokens each; none ends."""
    from qbl_trl.onnx.session import OnnxLogits

    graph = OnnxLogits(folder)
    added, cache = ids, graph.empty_cache(len(ids))
    for _ in range(new):
        found, cache = graph.step(added, mask, cache)
        found[:, -1, PAD] = -torch.inf
        added = found[:, -1].argmax(-1, keepdim=True)
        ids, mask = torch.cat([ids, added], 1), torch.cat([mask, torch.ones_like(added)], 1)
    return ids


def both_generate(model: PreTrainedModel, folder: Path, **settings: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What torch and the graph make of a padded batch, through ORTModelForCausalLM where there is one."""
    ids, mask = padded_batch()
    wanted = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **settings}
    if BEFORE_5 or settings:
        return model.generate(ids, **wanted), ort_model(folder).generate(ids, **wanted)
    model.generation_config.forced_eos_token_id = None  # Bart's
    return model.generate(ids, **wanted), greedy(folder, ids, mask, 8)
