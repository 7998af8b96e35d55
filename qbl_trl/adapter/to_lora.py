"""to_lora: a balanced adapter as plain LoRA files, which stock PEFT, vLLM or llama.cpp's converter read.

    A' [r, k] = A [r, k // p]          B' [n, r] = (alpha / r) pool_scale(p) B [n // e, r]          dW = B' A'

Exact: repeated columns and rows compute what pooling and expansion compute. Layers of smaller rank are filled with
zeros up to the largest, because few engines read a rank per layer; scaling is 1 (lora_alpha = r). A block adapter
(QA-HiRA) becomes D times an identity, of rank min(N / e, K / p). Weights are written in float32.
"""

import math
import os
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

from qbl_trl.adapter.balance import matched_rank, pool_scale
from qbl_trl.adapter.factors import by_pattern, recorded_factors
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.adapter.misplaced import without_codes
from qbl_trl.arithmetic import plain_defaults
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.folders import check_apart, check_free, new_folder
from qbl_trl.loading import adapter_weights, saved_adapter
from qbl_trl.wrapped import unwrap

PREFIX = "base_model.model."
_MATRICES = ("lora_A", "lora_B", "lora_block")


@plain_defaults()
def to_lora(
    peft_model_or_dir: nn.Module | str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    adapter_name: str | None = None,
    *,
    overwrite: bool = False,
) -> Path:
    """Write an adapter as plain LoRA: adapter_config.json of type LORA and adapter_model.safetensors.

    Args:
        peft_model_or_dir: a model with balanced adapters, or a folder an adapter was saved to; no base model is
            loaded for the latter.
        output_dir: a new or empty folder; it appears whole or not at all.
        adapter_name: which adapter of the model; the active one by default. A folder holds one.
        overwrite: replace a folder that is not empty.

    Returns:
        The folder.

    Raises:
        ConfigError: if there is no balanced adapter, the name is unknown or ambiguous, the folder is not empty, or the
            adapter is not finite.
        CheckpointError: if the files of a folder are damaged.
    """
    if not isinstance(peft_model_or_dir, nn.Module | str | os.PathLike):
        raise ConfigError(
            f"to_lora takes a model with balanced adapters or the folder of a saved one, not {peft_model_or_dir!r}"
        )
    check_free(output_dir, overwrite)
    if isinstance(peft_model_or_dir, nn.Module):
        config, state, gains = _from_model(peft_model_or_dir, adapter_name)
    else:
        check_apart(output_dir, peft_model_or_dir)
        config, state = _from_folder(Path(peft_model_or_dir))
        gains = {}
    if config.layer_replication:
        raise ConfigError("to_lora: the adapter replicates layers, and plain LoRA files would name the wrong ones")
    layers: dict[str, dict[str, Tensor]] = {}
    others: dict[str, Tensor] = {}
    for key, tensor in state.items():
        layer, matrix = _split(key)
        if matrix:
            layers.setdefault(layer, {})[matrix] = tensor.detach().cpu().float()
        else:
            others[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)  # may be shared
    if not layers:
        raise ConfigError(f"to_lora: {peft_model_or_dir} holds no tensor of a balanced adapter")
    if not gains:
        _check_all_here(config, [layer.removeprefix(PREFIX) for layer in layers])
    factors = {}
    for layer, held in layers.items():
        name = layer.removeprefix(PREFIX)
        factors[layer] = plain_factors(config, name, held, gains.get(name))
    rank = max(down.shape[0] for down, _ in factors.values())
    for layer, (down, up) in factors.items():
        missing = rank - down.shape[0]
        others[f"{layer}.lora_A.weight"] = nn.functional.pad(down, (0, 0, 0, missing)).contiguous()
        others[f"{layer}.lora_B.weight"] = nn.functional.pad(up, (0, missing)).contiguous()
    with new_folder(output_dir, overwrite) as draft:
        save_file(others, draft / "adapter_model.safetensors", metadata={"format": "pt"})
        _plain_config(config, rank, [layer.removeprefix(PREFIX) for layer in factors]).save_pretrained(str(draft))
    return Path(output_dir)


def plain_factors(
    config: QBLoRAConfig, layer: str, matrices: dict[str, Tensor], gain: float | None = None
) -> tuple[Tensor, Tensor]:
    """A' and B' of one layer, gain included in B'.

    Args:
        config: with every factor written down, as it is once an adapter was placed.
        layer: full name, as the patterns of the configuration name it.
        matrices: "lora_A" (R, K / p) and "lora_B" (N / e, R), or "lora_block" (N / e, K / p), float32.
        gain: what the layer multiplies by, where its scale was changed; by default what the configuration says.

    Returns:
        (R, K) and (N, R) float32.

    Raises:
        ConfigError: if in_factor was never written down, or a matrix is missing, holds no numbers or does not
            fit the other.
    """
    p, e = recorded_factors(config, layer)
    r = by_pattern(config.rank_pattern, layer, config.r)
    alpha = by_pattern(config.alpha_pattern, layer, config.lora_alpha)
    if p is None or e is None or r is None or alpha is None:
        raise ConfigError(
            f"{layer}: adapter_config.json does not say in_factor or out_factor; set them to the factors the adapter "
            "was trained with (in_factor: the quantization group of its base)"
        )
    whole = gain is not None  # of a loaded model; what a file holds is compared with its configuration
    if gain is None:
        gain = alpha / (math.sqrt(r) if config.use_rslora else r) * pool_scale(config.pooling, p)
    if "lora_block" in matrices:
        block = matrices["lora_block"]
        down, up = (block, torch.eye(len(block))) if len(block) < block.shape[1] else (torch.eye(block.shape[1]), block)
    else:
        lacking = {"lora_A", "lora_B"} - matrices.keys()
        if lacking:
            raise ConfigError(f"{layer}: {lacking.pop()} is missing; the adapter file is damaged")
        down, up = matrices["lora_A"], matrices["lora_B"]
        if down.dim() != 2 or up.dim() != 2 or down.shape[0] != up.shape[1]:
            shapes = f"lora_A {tuple(down.shape)} and lora_B {tuple(up.shape)}"
            raise ConfigError(f"{layer}: {shapes} are no two factors of one rank; the adapter file is damaged")
        rank = matched_rank(r, down.shape[1] * p, up.shape[0] * e, p, e)
        padded = down.shape[0] > rank and not down[rank:].any()  # to be swapped
        if not whole and down.shape[0] != rank and not padded:
            raise ConfigError(
                f"{layer}: the adapter file holds a rank of {down.shape[0]}, and r={r} with in_factor={p} and "
                f"out_factor={e} is {rank} here; adapter_config.json is not that of this file"
            )
    if not (down.isfinite().all() and up.isfinite().all()):
        raise ConfigError(f"{layer}: the adapter holds NaN or infinite values; take a checkpoint from before they came")
    return down.repeat_interleave(p, dim=1), up.repeat_interleave(e, dim=0) * gain


def _check_all_here(config: QBLoRAConfig, layers: list[str]) -> None:
    """Refuse a file that lacks a layer which its configuration names.

    Raises:
        ConfigError: naming it.
    """
    targets = config.target_modules
    by_part = config.layers_to_transform is None and config.exclude_modules is None
    names = sorted(targets) if by_part and isinstance(targets, set | list) else []
    # A part of a name may be meant for other models; whole ones were written down for the layers that were there.
    lacking = [name for name in names if "." in name and not any(f".{layer}".endswith(f".{name}") for layer in layers)]
    if lacking:
        raise ConfigError(f"{lacking[0]}: the adapter file holds no tensor of it; it is damaged, or of another adapter")
    unnamed = [layer for layer in layers if names and not any(f".{layer}".endswith(f".{name}") for name in names)]
    if unnamed:
        raise ConfigError(
            f"{unnamed[0]}: adapter_config.json does not name it in target_modules; it is of another adapter"
        )


def _split(key: str) -> tuple[str, str | None]:
    """A key of the saved state as layer and matrix; matrix None for what is no adapter matrix (trained modules)."""
    layer, _, matrix = key.removesuffix(".weight").rpartition(".")
    return (layer, matrix) if matrix in _MATRICES else (key, None)


def _from_model(model: nn.Module, adapter_name: str | None) -> tuple[QBLoRAConfig, dict[str, Tensor], dict[str, float]]:
    source = unwrap(model)
    layers = adapter_layers(source)
    names = sorted({name for layer in layers.values() for name in layer.rank})
    active = sorted({name for layer in layers.values() for name in layer.active_adapters if name in layer.rank})
    if adapter_name is None and len(active) != 1:
        raise ConfigError(f"to_lora: {len(active)} adapters are active; name one of: {', '.join(names)}")
    chosen = active[0] if adapter_name is None else adapter_name
    if chosen not in names:
        raise ConfigError(f"to_lora: there is no balanced adapter {chosen!r}; adapters here: {', '.join(names)}")
    state = get_peft_model_state_dict(source, adapter_name=chosen, save_embedding_layers=False)
    named = {key if key.startswith(PREFIX) else PREFIX + key: tensor for key, tensor in state.items()}
    gains = {name: layer.gain(chosen) for name, layer in layers.items() if chosen in layer.rank}
    return source.peft_config[chosen], named, gains  # type: ignore[index, union-attr, return-value]


def _from_folder(folder: Path) -> tuple[QBLoRAConfig, dict[str, Tensor]]:
    config = saved_adapter(folder)
    if not isinstance(config, QBLoRAConfig):
        raise ConfigError(f"{folder} holds an adapter of type {config.peft_type}; to_lora converts type QBLORA only")
    return config, without_codes(adapter_weights(folder))


def _plain_config(config: QBLoRAConfig, rank: int, layers: list[str]) -> LoraConfig:
    by_part = config.layers_to_transform is None and config.exclude_modules is None
    listed = by_part and isinstance(config.target_modules, (set, list))
    return LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=sorted(config.target_modules or ()) if listed else sorted(layers),
        lora_dropout=config.lora_dropout,
        bias=config.bias,
        modules_to_save=config.modules_to_save,
        trainable_token_indices=config.trainable_token_indices,
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
