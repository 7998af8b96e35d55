"""genai_config.json: the same folder runs in ONNX Runtime GenAI."""

import json
import logging
from pathlib import Path
from typing import Any

import onnx

from qbl_trl.onnx.files import GENAI_FILE, MODEL_FILE
from qbl_trl.onnx.layer_caches import STATES

logger = logging.getLogger(__name__)

_TYPES = ("gemma", "gemma2", "llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "granite", "olmo", "smollm3")
_BUFFERED = 4096  # tokens of cache that are asked for at once where nobody says how many


def write_genai_config(config: Any, generation: Any, folder: Path, provider: str, shares: bool, length: int) -> None:
    """Describe the graph of `folder` to ONNX Runtime GenAI, where it can be: keys and values of a layer have one size
    there, which from 0.18 on may be another in another layer (Gemma 4). States of convolutions and recurrences it knows
    in pairs, alike in all layers that have them; convolutions alone as those of LFM2.

    A graph that was written for it is kept where it is of use: over a buffer that past and present share.

    Args:
        config, generation: of the transformers model.
        shares: past and present may be one buffer, made at once for `max_length` tokens (GroupQueryAttention).
        length: tokens the graph can read.
    """
    own = folder / GENAI_FILE
    graph = onnx.load(folder / MODEL_FILE, load_external_data=False).graph
    made = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.output}
    caches = [sizes for name, sizes in made.items() if name.endswith((".key", ".value"))]
    sizes = [(heads, width) for _, heads, _, width in caches]
    alike = bool(sizes) and sizes[::2] == sizes[1::2] and all(map(all, sizes))
    states = _type_with_states(made)
    if not (shares and alike) or states is None:
        own.unlink(missing_ok=True)
    if not alike or states is None or not (len({*sizes}) == 1 or own.is_file()):
        # ORTModelForCausalLM knows keys and values of any size, but no states.
        by = "" if states == "" else ", nor does ORTModelForCausalLM"
        logger.warning("no genai_config.json: ONNX Runtime GenAI does not know a cache such as this graph's%s", by)
        return
    heads, width = sizes[0]
    names = {value.name for value in graph.input}
    inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in names}
    options = [] if provider == "cpu" else [{"cuda": {"enable_cuda_graph": "0"}}]
    model = {
        "context_length": length,
        "decoder": {
            "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
            "filename": own.name if own.is_file() else MODEL_FILE,
            "head_size": width,
            "hidden_size": config.hidden_size,
            "inputs": {**inputs, **_named("past", "past_key_values", states)},
            "outputs": {"logits": "logits", **_named("present", "present", states)},
            "num_attention_heads": config.num_attention_heads,
            "num_hidden_layers": len(caches) // 2,  # with keys and values of their own: GenAI finds which
            "num_key_value_heads": heads,
            **(_layers(made) if states == "lfm2" else {}),
        },
        "type": states or (config.model_type if config.model_type in _TYPES else "decoder"),
        "vocab_size": config.vocab_size,
        **_tokens(config, generation),
    }
    written = {"model": dict(sorted(model.items())), "search": _search(generation, shares, length)}
    (folder / "genai_config.json").write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def _tokens(config: Any, generation: Any) -> dict[str, Any]:
    """Where a text begins and ends, and what fills a batch."""
    bos, eos, pad = (  # transformers 5 gives a configuration those alone that its class has
        [getattr(source, f"{kind}_token_id", None) for source in (generation, config)] for kind in ("bos", "eos", "pad")
    )
    ends = _first_set(*eos, [])  # 0 would be a token
    fill = _first_set(*pad, ends or 0)
    return {
        "bos_token_id": _first_set(*bos, 0),
        "eos_token_id": ends,
        "pad_token_id": fill[0] if isinstance(fill, list) else fill,
    }


def _search(generation: Any, shares: bool, length: int) -> dict[str, Any]:
    """How to choose tokens where a program does not say: as the model's generation settings do."""

    def told(name: str, usual: float) -> Any:
        return _first_set(getattr(generation, name, None), usual)

    top_p = float(told("top_p", 1.0))
    return {
        "do_sample": bool(told("do_sample", False)),
        "max_length": min(length, _BUFFERED) if shares else length,
        "min_length": int(told("min_length", 0)),
        "num_beams": 1,
        "num_return_sequences": 1,
        "past_present_share_buffer": shares,
        "repetition_penalty": float(told("repetition_penalty", 1.0) or 1.0),
        "temperature": float(told("temperature", 1.0) or 1.0),
        "top_k": 1 if top_p == 0 else int(told("top_k", 50)),
        "top_p": top_p or 1.0,  # 0 leaves the best token in transformers, and all of them in GenAI
    }


def _type_with_states(made: dict[str, list[int]]) -> str | None:
    """The type of model whose states ONNX Runtime GenAI has a place for: "" without states, None where it has none."""
    states = {name: sizes for name, sizes in made.items() if name.endswith(STATES)}
    kinds = [{tuple(sizes) for name, sizes in states.items() if name.endswith(kind)} for kind in STATES]
    if all(len(kind) == 1 for kind in kinds) and 2 * len({_layer(name) for name in states}) == len(states):
        return "decoder"
    convolutions, recurrences = kinds
    if len(convolutions) == 1 and not recurrences and len({_layer(name) for name in made} - {None}) == _count(made):
        return "lfm2"
    return None if states else ""


def _layer(name: str) -> int | None:
    """The layer whose cache an output is."""
    _, *place = name.split(".")
    return int(place[0]) if place else None


def _count(made: dict[str, list[int]]) -> int:
    return 1 + max(layer for name in made if (layer := _layer(name)) is not None)


def _named(time: str, prefix: str, states: str | None) -> dict[str, str]:
    """What inputs or outputs are called."""
    kinds = {"key": "key", "value": "value", **({"conv": "conv_state"} if states else {})}
    if states == "decoder":
        kinds["recurrent"] = "recurrent_state"
    return {f"{time}_{kind}_names": f"{prefix}.%d.{name}" for kind, name in kinds.items()}


def _layers(made: dict[str, list[int]]) -> dict[str, Any]:
    """Of all layers, which attend and which convolve."""
    attend = {_layer(name) for name in made if name.endswith(".key")}
    types = ["full_attention" if layer in attend else "conv" for layer in range(_count(made))]
    return {"num_hidden_layers": len(types), "layer_types": types}


def _first_set(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)
