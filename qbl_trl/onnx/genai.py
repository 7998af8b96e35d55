"""genai_config.json: the same folder runs in ONNX Runtime GenAI."""

import json
import logging
from pathlib import Path
from typing import Any

import onnx

from qbl_trl.onnx.files import GENAI_FILE, MODEL_FILE

logger = logging.getLogger(__name__)

_TYPES = ("gemma", "gemma2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "granite", "olmo", "smollm3")
_BUFFERED = 4096  # tokens of cache that are asked for at once where nobody says how many


def write_genai_config(config: Any, generation: Any, folder: Path, provider: str, shares: bool, length: int) -> None:
    """Describe the graph of `folder` to ONNX Runtime GenAI, where it can be: keys and values of a layer have one size
    there, which from 0.18 on may be another in another layer (Gemma 4).

    A graph that was written for it is kept where it is of use: over a buffer that past and present share.

    Args:
        config, generation: of the transformers model.
        shares: past and present may be one buffer, made at once for `max_length` tokens (GroupQueryAttention).
        length: tokens the graph can read.
    """
    own = folder / GENAI_FILE
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    names = {value.name for value in graph.input}
    caches = [value.type.tensor_type.shape.dim for value in graph.output if value.name.startswith("present.")]
    sizes = [(dims[1].dim_value, dims[3].dim_value) for dims in caches]
    alike = sizes[::2] == sizes[1::2] and all(map(all, sizes))
    if not (shares and alike):
        own.unlink(missing_ok=True)
    if not alike or not (len({*sizes}) == 1 or own.is_file()):
        logger.info("no genai_config.json: ONNX Runtime GenAI does not know caches of the sizes that this graph has")
        return
    heads, width = sizes[0]
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    eos = _first_set(getattr(generation, "eos_token_id", None), config.eos_token_id)
    pad = _first_set(getattr(generation, "pad_token_id", None), config.pad_token_id, eos)
    options = [] if provider == "cpu" else [{"cuda": {"enable_cuda_graph": "0"}}]
    written = {
        "model": {
            "bos_token_id": _first_set(config.bos_token_id, 0),
            "context_length": length,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
                "filename": own.name if own.is_file() else MODEL_FILE,
                "head_size": width,
                "hidden_size": config.hidden_size,
                "inputs": {
                    **inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(caches) // 2,  # those with keys and values of their own: the first
                "num_key_value_heads": heads,
            },
            "eos_token_id": eos,
            "pad_token_id": pad[0] if isinstance(pad, list) else pad,
            "type": config.model_type if config.model_type in _TYPES else "decoder",
            "vocab_size": config.vocab_size,
        },
        "search": {
            "do_sample": bool(getattr(generation, "do_sample", False)),
            "max_length": min(length, _BUFFERED) if shares else length,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": shares,
            "repetition_penalty": float(getattr(generation, "repetition_penalty", None) or 1.0),
            "temperature": float(getattr(generation, "temperature", None) or 1.0),
            "top_k": int(getattr(generation, "top_k", None) or 50),
            "top_p": float(getattr(generation, "top_p", None) or 1.0),
        },
    }
    (folder / "genai_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), 0)
