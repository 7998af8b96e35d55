"""What a GGUF file says of its model and transformers' own reader leaves out, as settings of transformers.

| what | where |
| --- | --- |
| stretched rotary angles | `rope.scaling.*`, or tensors of factors: one in Llama 3.1 and later, two in long Phi 3 |
| angles for a part of a head | `rope.dimension_count` over the size of a head: Phi 3, StableLM, Nemotron |
| size of a head | `attention.key_length`, or hidden size over heads: Qwen 3, Gemma 2 and 3 |
| scale of the queries | no key: Gemma 2 and 3 have one for a head, and their 27B for hidden size over heads |
| windows, rotary bases, caps of logits, positions | the keys in `_KEYS` |
| sizes of experts, their number; of Qwen2-MoE everything (4.57) | `expert_*`, the keys in `_MIXTURE` |
| whether the weights of the experts chosen sum to 1 | no key: in Qwen3-MoE, not in Qwen2-MoE |

Source: llama.cpp, conversion/*.py (what is written), src/models/gemma2.cpp and gemma3.cpp (the scale of the queries),
qwen2moe.cpp and qwen3moe.cpp (sizes that are not stated, the weights of experts).
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qbl_trl.errors import CheckpointError

FACTORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
Field = Callable[[str], Any]  # a key of the architecture -> number or word, None where the file has none

_KEYS = {
    "gemma2": {
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    "gemma3": {"final_logit_softcapping": "final_logit_softcapping", "rope.freq_base_swa": "rope_local_base_freq"},
    "gpt2": {"context_length": "n_positions"},
    "nemotron": {"attention.layer_norm_epsilon": "norm_eps"},
    "phi3": {"attention.sliding_window": "sliding_window"},
    "stablelm": {"rope.freq_base": "rope_theta"},
    "starcoder2": {"rope.freq_base": "rope_theta", "attention.sliding_window": "sliding_window"},
}
_MIXTURE = {
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "expert_used_count": "num_experts_per_tok",
    "feed_forward_length": "intermediate_size",
    "rope.freq_base": "rope_theta",
}
_PARTIAL = ("nemotron", "phi3", "stablelm")
_OWN_HEADS = ("gemma2", "gemma3", "qwen3", "qwen3moe")
_LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}


def stated_settings(architecture: str, field: Field) -> dict[str, Any]:
    """Settings of transformers that follow from the metadata of a file, beside those that transformers reads."""
    found = {ours: field(key) for key, ours in _KEYS.get(architecture, {}).items()}
    settings = {name: value for name, value in found.items() if value is not None}
    if settings.get("sliding_window") == 0:  # how a file says that there is none
        settings["sliding_window"] = None
    if architecture in (*_PARTIAL, *_OWN_HEADS):
        even = int(field("embedding_length")) // int(field("attention.head_count"))
        size = int(field("attention.key_length") or even)
        rotated = field("rope.dimension_count")
        if architecture in _PARTIAL and rotated:
            settings["partial_rotary_factor"] = int(rotated) / size
        if architecture in _OWN_HEADS:
            settings["head_dim"] = size
        if architecture in _LAYERS_OF_27B:
            large = field("block_count") == _LAYERS_OF_27B[architecture]
            settings["query_pre_attn_scalar"] = even if large else size
    return settings


def mixture_settings(model_type: str, field: Field) -> dict[str, Any]:
    """Settings of a mixture of experts, by the names that both versions of transformers read."""
    found = {ours: field(key) for key, ours in _MIXTURE.items()}
    settings = {name: value for name, value in found.items() if value is not None} | {"model_type": model_type}
    qwen = model_type in ("qwen2_moe", "qwen3_moe")
    settings["num_experts" if qwen else "num_local_experts"] = field("expert_count")
    if qwen:
        inner, used = int(field("feed_forward_length") or 0), int(field("expert_used_count") or 1)
        settings["moe_intermediate_size"] = field("expert_feed_forward_length") or inner // used
        settings["norm_topk_prob"] = model_type == "qwen3_moe"
    if model_type == "qwen2_moe":
        settings["shared_expert_intermediate_size"] = field("expert_shared_feed_forward_length") or inner
    return settings


def rope_scaling(path: Path, field: Field, factors: dict[str, Tensor]) -> dict[str, Any]:
    """Settings of transformers for what stretches the rotary angles; none where nothing does.

    Args:
        factors: those of FACTORS that the file has, (half of a head,) float64.

    Raises:
        CheckpointError: if it is none of linear, yarn, and the factors that Llama 3.1 and later or Phi 3 have.
    """
    long, short = (factors.get(name) for name in FACTORS[1:])
    length = field("rope.scaling.original_context_length")
    if long is not None and short is not None and length:
        listed = {"long_factor": long.tolist(), "short_factor": short.tolist()}
        return {"rope_scaling": {"type": "longrope", **listed}, "original_max_position_embeddings": int(length)}
    if long is not None or short is not None:
        raise CheckpointError(
            f"{path}: of {', '.join(FACTORS[1:])} and rope.scaling.original_context_length one is missing"
        )
    scaling = _of_one_kind(path, field, factors.get(FACTORS[0]))
    return {"rope_scaling": scaling} if scaling else {}


def _of_one_kind(path: Path, field: Field, factors: Tensor | None) -> dict[str, Any] | None:
    if factors is not None:
        return _llama3(path, float(field("rope.freq_base") or 10000.0), factors)
    kind = field("rope.scaling.type")
    factor = field("rope.scaling.factor") or field("rope.scale_linear") or 1.0
    if kind == "yarn" and not field("rope.scaling.attn_factor"):
        length = field("rope.scaling.original_context_length")
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    if kind in (None, "none", "linear"):
        return {"rope_type": "linear", "factor": factor} if factor != 1 and kind != "none" else None
    raise CheckpointError(f"{path}: rope.scaling.type={kind!r} as it is set here is not read")


def _llama3(path: Path, base: float, factors: Tensor) -> dict[str, Any] | None:
    """The settings by which llama.cpp's converter makes the factors of a file, if they make these."""
    largest = float(factors.max())
    if bool((factors == 1).all()):
        return None
    length, low, high = 8192, 1.0, 4.0
    waves = 2 * math.pi * base ** (torch.arange(len(factors), dtype=torch.float64) / len(factors))
    smooth = (length / waves - low) / (high - low)
    between = 1 / ((1 - smooth) / largest + smooth)
    made = torch.where(waves < length / high, 1.0, torch.where(waves > length / low, largest, between))
    if not torch.allclose(made, factors, rtol=1e-3):
        raise CheckpointError(
            f"{path}: rope_freqs.weight stretches the rotary angles in a way that a configuration of transformers "
            "cannot say"
        )
    settings = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": length}
    return {"rope_type": "llama3", "factor": round(largest, 4), **settings}


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 both read: 5 moved the rotary settings, 4 looks for them at the top."""
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                config.setdefault(key, rope[key])
    dropped = ("quantization_config", "_name_or_path", "_model_name_or_path")
    return {key: value for key, value in config.items() if key not in dropped}
