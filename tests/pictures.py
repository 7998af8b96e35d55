"""Tiny random models that read images or sound beside text, and what they read; no processor is needed."""

from collections.abc import Callable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from qbl_trl.generation import BEFORE_5

TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
PLACE = 99  # the token in whose place a piece of an image stands


def _qwen(kind: str, **tower: Any) -> PreTrainedModel:
    rotary = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3]}
    config = getattr(transformers, f"{kind}Config")(
        text_config={**TEXT, "rope_scaling": rotary},
        vision_config={"depth": 2, "num_heads": 2, "patch_size": 14, **tower},
        image_token_id=PLACE,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def _llava() -> PreTrainedModel:
    text, tower = transformers.LlamaConfig(**TEXT), transformers.CLIPVisionConfig(**TOWER)
    config = transformers.LlavaConfig(text_config=text, vision_config=tower, image_token_index=PLACE)
    return transformers.LlavaForConditionalGeneration(config)


def _gemma3() -> PreTrainedModel:
    config = transformers.Gemma3Config(
        text_config={**TEXT, "sliding_window": 16}, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=PLACE
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def _qwen2_audio() -> PreTrainedModel:
    hearing = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    hearing |= {"num_mel_bins": 16, "max_source_positions": 20}
    text = transformers.Qwen2Config(**TEXT)
    config = transformers.Qwen2AudioConfig(text_config=text, audio_config=hearing, audio_token_index=PLACE)
    return transformers.Qwen2AudioForConditionalGeneration(config)


_MAKERS: dict[str, Callable[[], PreTrainedModel]] = {
    "gemma3": _gemma3,
    "llava": _llava,
    "qwen2_vl": lambda: _qwen("Qwen2VL", embed_dim=32, hidden_size=64, mlp_ratio=2),
    # a layer of its tower has inputs that are no whole groups of 32, as in the published models
    "qwen2_5_vl": lambda: _qwen(
        "Qwen2_5_VL",
        hidden_size=32,
        intermediate_size=60,
        out_hidden_size=64,
        window_size=28,
        fullatt_block_indexes=[1],
    ),
    "qwen2_audio": _qwen2_audio,
}
KINDS = tuple(_MAKERS)


def tiny(kind: str) -> PreTrainedModel:
    """A model of KINDS whose images (or sounds) change its answers, always the same."""
    torch.manual_seed(0)
    model = _MAKERS[kind]().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Two texts with an image (a sound) in each: what the model's forward takes."""
    generator = torch.Generator().manual_seed(seed)
    count = 10 if kind == "qwen2_audio" else 4
    places = torch.full((2, count), PLACE)
    words = torch.randint(3, 90, (2, 5), generator=generator)
    ids = torch.cat([words[:, :1], places, words[:, 1:]], 1)
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if kind == "qwen2_audio":
        found["input_features"] = torch.randn(2, 16, 40, generator=generator)
        found["feature_attention_mask"] = torch.ones(2, 40, dtype=torch.long)
    elif kind.startswith("qwen"):
        found["pixel_values"] = torch.randn(32, 1176, generator=generator)
        found["image_grid_thw"] = torch.tensor([[1, 4, 4]] * 2)
        found |= {} if BEFORE_5 else {"mm_token_type_ids": (ids == PLACE).int()}
    else:
        found["pixel_values"] = torch.randn(2, 3, 28, 28, generator=generator)
    if kind == "gemma3":
        found["token_type_ids"] = (ids == PLACE).long()
    return found


def answers(model: Any, kind: str, seed: int = 0) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(**inputs(kind, seed)).logits
