"""A packed model as a GGUF file: Q4_1 for linear layers, everything else as a template file has it.

    w = d q + m,      d = scales (float16, as stored),      m = D - s z, rounded to float16

Metadata, tokenizer, tensor names and the order of q and k rows come from the template, a GGUF file of the same model
in any type (gguf_template.py). Tensors that are not packed are copied byte for byte where the model still holds the
same values, and written as float32 where it does not (trained norms or embeddings, a trained head that the file ties).
Experts of a mixture, which are layers of their own here, are stacked as the template stacks them.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from qbl_trl.errors import ConfigError
from qbl_trl.folders import new_file
from qbl_trl.module_names import name_here
from qbl_trl.quant.float_offsets import folded, packed_layers
from qbl_trl.quant.gguf_template import HEAD, check_template
from qbl_trl.quant.importers.gguf import GGUFReader
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.stacks import slices_of

_GROUP = 32


def q4_1_blocks(layer: GroupQuantLinear, name: str) -> tuple[Tensor, float]:
    """Q4_1 bytes of one layer, rows in the layer's order.

    Returns:
        (N, K / 32 * 20) uint8, and the largest change that rounding m to float16 makes to a weight.

    Raises:
        ConfigError: if the layer is not 4-bit in groups of 32 times a power of two with float16 scales.
    """
    if (
        layer.bits != 4
        or layer.group_size % _GROUP
        or layer.scales.dtype != torch.float16
        or layer.in_features % _GROUP
    ):
        raise ConfigError(
            f"write_checkpoint: {name} has {layer.bits} bits, groups of {layer.group_size}, {layer.scales.dtype} "
            "scales; GGUF Q4_1 holds 4 bits in groups of 32 (or 64, 128, 256, repeated) with float16 scales"
        )
    codes, scales, zeros = (part.cpu() for part in folded(layer))
    repeats = layer.group_size // _GROUP
    groups = layer.in_features // _GROUP
    scales, zeros = (part.repeat_interleave(repeats, 1)[:, :groups] for part in (scales, zeros))
    exact = -(scales.double() * zeros.double())
    offsets = exact.half()
    rounding = float((offsets.double() - exact).abs().max())
    nibbles = codes.reshape(len(codes), groups, 2, _GROUP // 2)
    body = nibbles[:, :, 0] | (nibbles[:, :, 1] << 4)
    head = torch.stack([scales, offsets], dim=-1).contiguous().view(torch.uint8)
    return torch.cat([head, body], dim=-1).flatten(1), rounding


def write_gguf(model: nn.Module, path: Path, template: Path) -> tuple[int, float]:
    """Write the file; returns the number of packed layers and the largest rounding of a weight.

    Raises:
        ConfigError: if the template is another model's, a tensor has no place in it, or a layer does not fit Q4_1.
        CheckpointError: if the template cannot be read.
    """
    import gguf

    layers, source = packed_layers(model), GGUFReader(template)
    state = model.state_dict() | slices_of(model)
    places = {name_here(name, state): name for name in source.sources()}
    head = check_template(model, state, layers, source, places)
    held = _held(source, places)
    _check_stacks(layers, held)
    path = path.resolve()  # what lies behind a link is written
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as partial:
        largest = _write(state, layers, source, held, head, gguf.GGUFWriter(partial, source.architecture))
    return len(layers), largest


def _held(source: GGUFReader, places: dict[str, str]) -> dict[str, list[tuple[str, str]]]:
    """Tensor of the file -> what it holds, as names in this model and in files; of a stack each expert in order."""
    found: dict[str, list[tuple[str, str]]] = {}
    tensors = source.sources()
    for name, known in places.items():
        found.setdefault(tensors[known], []).append((name, known))
    return found


def _check_stacks(layers: dict[str, GroupQuantLinear], held: dict[str, list[tuple[str, str]]]) -> None:
    for place, names in held.items():
        packed = [name.removesuffix(".weight") for name, _ in names if name.removesuffix(".weight") in layers]
        if packed and len(packed) < len(names):
            plain = next(name for name, _ in names if name.removesuffix(".weight") not in packed)
            raise ConfigError(
                f"write_checkpoint: GGUF holds all experts of a layer in one tensor of one type ({place}), and "
                f"{packed[0]} is packed while {plain.removesuffix('.weight')} is in float; quantize all of them or none"
            )


def _write(
    state: Mapping[str, Tensor],
    layers: dict[str, GroupQuantLinear],
    source: GGUFReader,
    held: dict[str, list[tuple[str, str]]],
    head: Tensor | None,
    writer: Any,
) -> float:
    """The file, with a head that the template lacks; returns the largest rounding of an offset."""
    import gguf

    _copy_metadata(writer, source, gguf)
    largest = 0.0
    for place, names in held.items():
        raw = source.whole(place)
        if names[0][0].removesuffix(".weight") in layers:
            parts = []
            for name, known in names:
                module = name.removesuffix(".weight")
                blocks, rounding = q4_1_blocks(layers[module], module)
                parts.append(blocks[source.row_order(known, len(blocks)).argsort()].numpy())
                largest = max(largest, rounding)
            writer.add_tensor(place, _joined(parts, raw), raw_dtype=gguf.GGMLQuantizationType.Q4_1)
        elif any(_differs(state.get(name), source, known) for name, known in names):
            values = [source.as_stored(known, state[name].detach().float().cpu()).numpy() for name, known in names]
            writer.add_tensor(place, _joined(values, raw))
        else:
            writer.add_tensor(place, np.array(raw.data), raw_dtype=raw.tensor_type)
    if head is not None:
        writer.add_tensor(HEAD, head.detach().float().cpu().numpy())
    for factors in source.rope_factors():
        writer.add_tensor(factors.name, np.array(factors.data), raw_dtype=factors.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return largest


def _joined(parts: list[Any], raw: Any) -> Any:
    """The experts of a stack as one array; any other tensor as it is."""
    return np.stack(parts) if len(raw.shape) > parts[0].ndim else parts[0]


def _differs(value: Tensor | None, source: GGUFReader, known: str) -> bool:
    return value is not None and not torch.equal(value.float().cpu(), source.tensor(known))


def _copy_metadata(writer: Any, source: GGUFReader, gguf: Any) -> None:
    """Every key of the template; the file type becomes "mostly Q4_1"."""
    own = ("general.architecture", "general.file_type", "general.quantization_version")
    for field in source.fields():
        if field.name not in own and not field.name.startswith("GGUF."):
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
