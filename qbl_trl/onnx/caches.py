"""Cache inputs that ORTModelForCausalLM can fill.

Before the first token, ORTModelForCausalLM feeds keys and values of no token whose other sizes it guesses from the
configuration; for some architectures it guesses wrong. Such a tensor holds nothing, so the graph reshapes it to what
the layers need: its declared sizes become symbols, and one Reshape per tensor restores them.
"""

from typing import Any

import onnx_ir as ir

from qbl_trl.onnx.graph import Editor
from qbl_trl.onnx.layer_caches import STATES

# As optimum-onnx 0.1.0 reads configurations (onnxruntime/modeling_decoder.py).
_READS_HEAD_DIM = {"gemma", "gemma3_text", "gpt_oss", "nemotron"}
_READS_KV_HEADS = {
    *("arcee", "deepseek_v3", "cohere", "gemma", "gemma3_text", "glm", "granite", "gpt_oss", "helium", "mistral"),
    *("llama", "nemotron", "qwen2", "qwen3", "qwen3_moe", "smollm3", "stablelm"),
}


def served(config: Any) -> Any:
    """The configuration that ORTModelForCausalLM is given: of most models with vision, that of their text model.

    It looks for a text model's settings at the top, where Gemma 3 and Qwen-VL have them or it knows where else to look.
    """
    known = config.model_type == "gemma3" or getattr(config, "num_attention_heads", None) is not None
    return config if known else config.get_text_config()


def guessed_sizes(config: Any, kind: str) -> tuple[int, int]:
    """(heads, head size) of the empty cache that ORTModelForCausalLM feeds, of kind "key" or "value"."""
    if config.model_type == "gemma3":
        return config.text_config.num_key_value_heads, config.text_config.head_dim
    if config.model_type == "deepseek_v3":
        keys, values = config.qk_rope_head_dim + config.qk_nope_head_dim, config.v_head_dim
        return config.num_key_value_heads, keys if kind == "key" else values
    heads = config.num_attention_heads
    if config.model_type == "falcon":
        many = config.new_decoder_architecture or not config.multi_query
        return (config.num_kv_heads if many else 1), config.hidden_size // heads
    if config.model_type == "gpt_bigcode" and config.multi_query:
        return 1, config.hidden_size // heads
    size = config.head_dim if config.model_type in _READS_HEAD_DIM else config.hidden_size // heads
    return (config.num_key_value_heads if config.model_type in _READS_KV_HEADS else heads), size


def accept_guessed_caches(editor: Editor, config: Any) -> int:
    """Reshape cache inputs where the guess is wrong; returns how many there were."""
    count, targets = 0, dict[tuple[int, int], ir.Value]()
    for value in list(editor.graph.inputs):
        name = value.name or ""
        if not name.startswith("past_key_values") or name.endswith(STATES) or value.shape is None:
            continue
        if len(value.shape) != 4:
            continue
        real = (value.shape[1], value.shape[3])
        guessed = guessed_sizes(config, "key" if name.endswith("key") else "value")
        if real != guessed and all(isinstance(size, int) for size in real):
            _reshape(editor, value, targets)
            count += 1
    return count


def _reshape(editor: Editor, value: ir.Value, targets: dict[tuple[int, int], ir.Value]) -> None:
    """All caches of one size share their target: one mask serves every layer, so all are equally long."""
    shape, users = value.shape, list(value.uses())
    ids = next(item for item in editor.graph.inputs if item.name == "input_ids")
    first = next(iter(editor.graph))
    if shape is None:
        return
    if (shape[1], shape[3]) not in targets:
        parts = [
            editor.add(first, "Shape", [ids], {"start": 0, "end": 1}, name="cache").outputs[0],
            editor.constant([shape[1]]),
            editor.add(first, "Shape", [value], {"start": 2, "end": 3}, name="cache").outputs[0],
            editor.constant([shape[3]]),
        ]
        targets[shape[1], shape[3]] = editor.add(first, "Concat", parts, {"axis": 0}, name="cache").outputs[0]
    target = targets[shape[1], shape[3]]
    restored = editor.add(first, "Reshape", [value, target], {"allowzero": 1}, name=value.name, like=value).outputs[0]
    restored.shape = shape
    for user, index in users:
        user.replace_input_with(index, restored)
    value.shape = ir.Shape([shape[0], "num_key_value_heads", shape[2], "head_size"])
