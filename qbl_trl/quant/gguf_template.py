"""Whether a GGUF file is one of the model that is to be written by it, and has a place for all that the model holds.

What a file does not name is not run: a tensor that it lacks would be lost, and a number of its metadata that differs
would make another model of the same tensors. Compared are those that transformers reads from a file; windows are not.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D

from qbl_trl.errors import ConfigError
from qbl_trl.quant.head import input_table
from qbl_trl.quant.importers.gguf import GGUFReader
from qbl_trl.quant.importers.gguf_config import portable
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stacks import slices_of

HEAD = "output.weight"
_TIED = ("gemma2",)
_NUMBERS = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "num_experts_per_tok", "rope_theta"),
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "partial_rotary_factor"),
    *("attn_logit_softcapping", "final_logit_softcapping"),
)
_STRETCHED = ("default", "linear", "llama3", "yarn", "longrope")  # what files can say of rotary angles
_CLOSE = 1e-4  # files hold numbers in float32


def check_template(
    model: Any,
    state: Mapping[str, Tensor],
    layers: dict[str, GroupQuantLinear],
    source: GGUFReader,
    places: Mapping[str, str],
) -> Tensor | None:
    """The head of a model that was trained away from its embedding, where the file has none; else None.

    Args:
        state: the model's tensors, experts apart.
        places: name in the model -> name in transformers, of every tensor of the file.

    Raises:
        ConfigError: if the file is another model's, or a tensor of this one has no place in it.
    """
    missing = sorted(name for name in layers if f"{name}.weight" not in places)
    if missing:
        raise ConfigError(f"write_checkpoint: {source.path} has no tensor for {missing[0]}; it is another model's file")
    _check_shapes(model, state, layers, source, places)
    _check_numbers(model, source)
    _check_query_scale(model, source)
    lost = _without_place(model, layers, places)
    head = model.get_output_embeddings()
    beyond = [name for name in lost if head is not None and state[name].data_ptr() == head.weight.data_ptr()]
    if beyond and source.architecture in _TIED:
        raise ConfigError(
            f"write_checkpoint: {beyond[0]} differs from the embedding, which llama.cpp reads as the head of "
            f'{source.architecture}, whatever a file holds. Write format="hqq" or export to ONNX'
        )
    lost = [name for name in lost if name not in beyond]
    if lost:
        more = f" and for {len(lost) - 1} others" if len(lost) > 1 else ""
        raise ConfigError(
            f"write_checkpoint: {source.path} has no tensor for {lost[0]}{more}, which the model was given or trained "
            "beyond that file. Make the template from a float model with the same tensors (convert_hf_to_gguf.py of "
            'llama.cpp), or write format="hqq" or export to ONNX'
        )
    return state[beyond[0]] if beyond else None


def _without_place(model: Any, layers: dict[str, GroupQuantLinear], places: Mapping[str, str]) -> list[str]:
    """Tensors that the file does not name: neither packed, nor a stack of experts, nor another name of one it names.

    Zeros change nothing, and a head with the values of the embedding is as good as tied to it.
    """
    held = model.state_dict()
    own = {f"{name}.{part}" for name, layer in layers.items() for part in layer.state_dict() if part != "bias"}
    own |= places.keys()
    known = {held[name].data_ptr() for name in places if name in held}
    known |= {part.untyped_storage().data_ptr() for part in slices_of(model).values()}
    table, head = (getattr(part, "weight", None) for part in (input_table(model), model.get_output_embeddings()))
    if table is not None and head is not None and table.shape == head.shape and torch.equal(table, head):
        known.add(head.data_ptr())
    others = {name: tensor for name, tensor in held.items() if name not in own}
    return [name for name, tensor in others.items() if tensor.data_ptr() not in known and bool(tensor.any())]


def _check_numbers(model: Any, source: GGUFReader) -> None:
    """Numbers of the metadata by which tensors of the same shapes compute something else."""
    settings = source.config()
    theirs = AutoConfig.for_model(settings.pop("model_type"), **settings).get_text_config()
    own = model.config.get_text_config()
    head = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    ours, known = (_numbers(config, head) for config in (own, theirs))
    for name in (name for name in ours if name in known):
        here, there = ours[name], known[name]
        alike = here == there if isinstance(here, str) else math.isclose(here, there, rel_tol=_CLOSE)
        if not alike:
            mine, run = (value if isinstance(value, str) else f"{value:g}" for value in (here, there))
            raise ConfigError(
                f"write_checkpoint: the model has {name}={mine}, and {source.path} would be run with {run}; it is "
                "another model's file"
            )


def _numbers(config: Any, head: int) -> dict[str, Any]:
    """Those that a configuration states, by name, and how it stretches rotary angles.

    Args:
        head: features of a head, which the shapes say; not every file states it where transformers looks.
    """
    settings = portable(config.to_dict())
    found = {name: getattr(config, name, settings.get(name)) for name in _NUMBERS}
    numbers: dict[str, Any] = {name: value for name, value in found.items() if isinstance(value, int | float)}
    if "partial_rotary_factor" in numbers:  # of which a file holds how many features that is
        numbers["rotated features of a head"] = int(numbers.pop("partial_rotary_factor") * head)
    rope = settings.get("rope_scaling") or settings.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind in _STRETCHED and not any(isinstance(value, dict) for value in rope.values()):
        factor = float(rope.get("factor") or 1.0)
        numbers["rotary scaling"] = "default" if kind == "linear" and factor == 1 else kind
        numbers["factor of the rotary scaling"] = factor
    return numbers


def _check_shapes(
    model: nn.Module,
    state: Mapping[str, Tensor],
    layers: dict[str, GroupQuantLinear],
    source: GGUFReader,
    places: Mapping[str, str],
) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    transposed = [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Conv1D)]
    shapes |= {name: shapes[name][::-1] for name in transposed}
    shapes |= {f"{name}.weight": (layer.out_features, layer.in_features) for name, layer in layers.items()}
    for name, known in places.items():
        theirs = tuple(int(size) for size in reversed(source.raw(known).shape))
        if name in shapes and _long(shapes[name]) != _long(theirs):
            raise ConfigError(
                f"write_checkpoint: {source.path} holds {source.raw(known).name} of {theirs}, and {name} is "
                f"{shapes[name]}; it is another model's file"
            )


def _long(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the dimensions of one, which files leave out."""
    return tuple(size for size in shape if size != 1)


def _check_query_scale(model: Any, source: GGUFReader) -> None:
    """Gemma's files have no key for it: llama.cpp derives it from sizes, which a model may not follow."""
    theirs = source.config().get("query_pre_attn_scalar")
    ours = getattr(model.config.get_text_config(), "query_pre_attn_scalar", theirs)
    if ours != theirs:
        raise ConfigError(
            f"write_checkpoint: the model has query_pre_attn_scalar={ours}, and {source.path} would be run "
            f"with {theirs}, which follows from its sizes; GGUF has no place for another. "
            'Write format="hqq" or export to ONNX'
        )
