"""What a packed folder says of itself, before its tensors are loaded into packed layers."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.pytorch_utils import Conv1D

from qbl_trl.config import GroupQuantConfig, LayerFormat
from qbl_trl.errors import CheckpointError
from qbl_trl.json_files import json_if_there, read_json
from qbl_trl.quant.checkpoint import Declared, read_files, read_headers
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.head import output_head
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import empty_model
from qbl_trl.quant.packed import BESIDE_CODES, PackedWeight
from qbl_trl.quant.renaming import names_in_model
from qbl_trl.quant.targets import is_linear

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def folder_of(config: Any) -> Path | None:
    """The folder of a checkpoint, where the configuration names it: of a subfolder it names the one above."""
    folder = Path(getattr(config, "_name_or_path", ""))
    if not (folder / "config.json").is_file():
        return None
    stored = read_json(folder / "config.json")
    own = config.to_dict()
    same = all(stored[key] == own.get(key) for key in ("model_type", "architectures", *_SIZES) if key in stored)
    return folder if same else None


def summarized(formats: dict[str, LayerFormat]) -> tuple[LayerFormat, dict[str, dict[str, Any]]]:
    """The commonest format of a model's layers, and by name how others differ: what a configuration states."""
    common = Counter(formats.values()).most_common(1)[0][0]
    usual = vars(common)
    others = {name: vars(stored) for name, stored in formats.items() if stored != common}
    return common, {name: {key: v for key, v in own.items() if v != usual[key]} for name, own in others.items()}


def with_dtype(config: dict[str, Any], name: str) -> dict[str, Any]:
    """A config.json that states one dtype, under the key that every supported transformers reads first.

    Files of before transformers 4.56 say torch_dtype; beside a dtype it would be ignored. Configurations inside
    (of a text or vision part) that state a dtype follow.
    """
    parts = {key: value for key, value in config.items() if key.endswith("_config") and key != "quantization_config"}
    inner = {
        key: with_dtype(part, name)
        for key, part in parts.items()
        if isinstance(part, dict) and {"dtype", "torch_dtype"} & part.keys()
    }
    return {key: value for key, value in config.items() if key != "torch_dtype"} | inner | {"dtype": name}


def stored_layers(
    model: nn.Module, folder: Path, found: dict[str, Declared], usual: Sequence[str]
) -> tuple[list[str], set[str]]:
    """The layers that a folder holds packed: `usual`, but for those that another version of transformers chose.

    Returns:
        Beside them the names, in the model, of what the folder holds in float.

    Raises:
        CheckpointError: if it holds experts packed one by one, and this model has them in one tensor.
    """
    packed, plain = _held(model, found)
    modules, head = dict(model.named_modules()), output_head(model)
    experts = {name: f"{name.partition('.experts.')[0]}.experts" for name in packed if ".experts." in name}
    lost = min((name for name, around in experts.items() if around in modules and name not in modules), default=None)
    if lost is not None:
        made_with = read_json(folder / "config.json").get("transformers_version")
        raise CheckpointError(
            f"{folder}: {lost!r} is packed by itself, and transformers {transformers_version} holds the experts of a "
            f"layer in one tensor; open this folder with the version it was written with ({made_with or 'before 5'})"
        )
    lacking = set(usual) - packed - plain - _stacked(model, found)
    chosen = packed | (lacking - _of_another_head(model, folder, lacking))  # type: ignore[arg-type]
    layers = [name for name, layer in modules.items() if name in chosen and layer is not head and is_linear(layer)]
    return layers, plain


def _of_another_head(model: PreTrainedModel, folder: Path, lacking: set[str]) -> set[str]:
    """Of the layers that a folder lacks, those that the class of the stored model lacks too: fresh ones, in float.

    None where that class is not known, or this one does all that it does: then the folder is damaged.
    """
    written_by = json_if_there(folder / "config.json").get("architectures") or []
    stored = getattr(transformers, next(iter(written_by), ""), None)
    if not lacking or stored is None or isinstance(model, stored) or not isinstance(model.config, stored.config_class):
        return set()
    names = dict(empty_model(stored, model.config).named_modules())
    prefix, inner = f"{stored.base_model_prefix}.", f"{model.base_model_prefix}."
    return {name for name in lacking if not {name, prefix + name, name.removeprefix(inner)} & names.keys()}


def _stacked(model: nn.Module, found: dict[str, Declared]) -> set[str]:
    """Layers of experts, by now, that a folder holds stacked: whoever wrote it did not quantize them."""
    names = set(names_in_model(model, found).values())  # type: ignore[arg-type]
    experts = [(path, module) for path, module in model.named_modules() if isinstance(module, Experts)]
    return {
        f"{path}.{layer}"
        for path, module in experts
        for tensor in module.parts
        if f"{path}.{tensor}" in names
        for layer in module.layers(tensor)
    }


def packed_in(model: nn.Module, found: dict[str, Declared]) -> set[str]:
    """Names in the model of what the files of a folder hold packed."""
    return _held(model, found)[0]


def _held(model: nn.Module, found: dict[str, Declared]) -> tuple[set[str], set[str]]:
    """Names in the model of the modules whose weight is packed, and of those whose weight is in float."""
    names = names_in_model(model, [name for name in found if name.endswith(".weight")])  # type: ignore[arg-type]
    packed, plain = set[str](), set[str]()
    for origin, name in names.items():
        scaled = f"{origin.removesuffix('.weight')}.scales" in found
        dtype = found[origin].dtype
        if scaled or (dtype is not None and dtype.is_floating_point):
            (packed if scaled else plain).add(name.removesuffix(".weight"))
    return packed, plain


def empty_layer(old: nn.Module, config: GroupQuantConfig, name: str) -> GroupQuantLinear:
    """A packed layer on no device, in the format that a configuration gives it."""
    columns, rows = (old.nx, old.nf) if isinstance(old, Conv1D) else (old.in_features, old.out_features)
    bias = old.bias
    return GroupQuantLinear(
        columns,  # type: ignore[arg-type]
        rows,  # type: ignore[arg-type]
        bias=bias is not None,
        format=config.layer_format(name),
        device="meta",
        dtype=bias.dtype if isinstance(bias, Tensor) else None,
    )


def expected_tensors(model: nn.Module) -> dict[str, tuple[tuple[int, ...], torch.dtype | None]]:
    """Shape and type of every tensor that the packed layers of a model are loaded from; a bias may have any type."""
    return {
        f"{name}.{part}": (tuple(tensor.shape), None if part == "bias" else tensor.dtype)
        for name, layer in model.named_modules()
        if isinstance(layer, PackedWeight) and "scales" not in layer._non_persistent_buffers_set
        for part in ("weight", *BESIDE_CODES, "bias")
        if (tensor := getattr(layer, part, None)) is not None
    }


def files_of(folder: Path | None, files: Sequence[str] | None) -> tuple[Path | None, dict[str, Declared]]:
    """The folder and the tensors that a packed model is loaded from; (None, {}) where they are not in safetensors.

    Args:
        folder: what the configuration names, see `folder_of`.
        files: those that transformers chose, where it says so (5): a variant's, or of a model from the hub.

    Raises:
        CheckpointError: as `read_headers`.
    """
    if files and all(str(file).endswith(".safetensors") for file in files):
        return Path(files[0]).parent, read_files(map(Path, files))
    return folder, {} if folder is None else read_headers(folder)
