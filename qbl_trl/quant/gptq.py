"""GPTQ over a whole model: calibrate and quantize its layers in the order in which they run.

Every layer is quantized on the inputs that the *already quantized* layers before it produce. Layers that read the
same tensor (q, k, v; gate, up) are one stage and share one Hessian; a stage is replayed only up to its first layer.

    peak memory  ~  model + hidden states of the calibration set + one Hessian (K, K) + one layer

Left out: offloaded models, and padding (pack the calibration text instead).
"""

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig, LayerFormat
from qbl_trl.errors import ConfigError
from qbl_trl.progress import progress
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.calibration import Call, Stop, calibrating, calibration_calls, run, walk
from qbl_trl.quant.linear import GroupQuantLinear


def gptq_model_(model: nn.Module, config: GroupQuantConfig, targets: Sequence[str]) -> None:
    """Replace float layers by GPTQ-quantized GroupQuantLinear layers, in place.

    Args:
        model: float model on one device.
        config: bits, group_size, symmetric and scale_dtype of each layer, and `calibration`: batches, each
            (batch, tokens) integer ids or a mapping of the model's arguments, without padding.
        targets: full names of nn.Linear or Conv1D layers.

    Raises:
        ConfigError: if a target is not a linear layer, calibration is empty or padded, or a Hessian cannot be used.

    Source: GPTQ, arXiv:2210.17323, section 3.
    """
    for name in targets:
        kind = type(model.get_submodule(name))
        if not issubclass(kind, nn.Linear | Conv1D) or issubclass(kind, GroupQuantLinear):
            raise ConfigError(f"gptq: {name} is a {kind.__name__}; targets are float nn.Linear or Conv1D layers")
    unseen: list[str] = []
    with calibrating(model), progress(len(targets), "quantizing by GPTQ", "layer") as bar:
        for piece in walk(model, targets, config.calibration or ()):
            for stage in stages(piece.scope, piece.names, piece.calls):
                hessian = collect_hessian(piece.scope.get_submodule(stage[0]), piece.calls)
                unseen += [] if hessian.any() else [f"{piece.prefix}{name}" for name in stage]
                for name in stage:
                    full = f"{piece.prefix}{name}"
                    layer = piece.scope.get_submodule(name)
                    try:
                        quantized = quantize_layer(layer, hessian, config.layer_format(full), config.symmetric)
                    except ConfigError as error:
                        raise ConfigError(f"{full}: {error}") from error
                    piece.scope.set_submodule(name, quantized.train(layer.training))
                    bar.update()
    if unseen:
        warnings.warn(
            f"no batch of the calibration reaches {len(unseen)} of {len(targets)} layers ({unseen[0]}, ...): they are "
            "rounded to nearest. Batches may be mappings of all that the model takes, images and sound too",
            stacklevel=2,
        )


def calibrated_head_hessian(model: nn.Module, config: GroupQuantConfig) -> Tensor | None:
    """`head_hessian` over the calibration batches, of a model whose other layers are quantized; None without a head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, nn.Linear):
        return None
    with calibrating(model):
        return head_hessian(head, calibration_calls(model, config.calibration or ()))


def head_hessian(head: nn.Module, calls: Sequence[Call]) -> Tensor:
    """H + m I of an output head, (K, K) float32: what to round it, and an embedding that is one table with it, for.

    m, the median of H's diagonal, stands for the rows that are looked up, where every feature counts the same, and for
    text that was not seen: a few features of what heads read are far larger than the rest.
    """
    found = collect_hessian(head, calls)
    found.diagonal().add_(found.diagonal().median())
    return found


def quantize_layer(layer: nn.Module, hessian: Tensor, stored: LayerFormat, symmetric: bool) -> GroupQuantLinear:
    """One nn.Linear or Conv1D and the Hessian of its inputs, (K, K) float -> GroupQuantLinear."""
    weight: Tensor = layer.weight.data.T if isinstance(layer, Conv1D) else layer.weight.data  # type: ignore[assignment]
    affine = quantize(
        weight,
        bits=stored.bits,
        group_size=stored.group_size,
        symmetric=symmetric,
        algorithm="gptq",
        scale_dtype=SCALE_DTYPES[stored.scale_dtype],
        hessian=hessian,
    )
    bias: Tensor | None = layer.bias  # type: ignore[assignment]
    return GroupQuantLinear.from_affine(
        affine, bits=stored.bits, group_size=stored.group_size, bias=bias, symmetric=symmetric
    )


def stages(scope: nn.Module, names: Sequence[str], calls: Sequence[Call]) -> list[list[str]]:
    """Group layers that read the same tensor, in the order of their first call.

    Layers that no batch reaches (unused experts) form single stages at the end.
    """
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, inputs[0])
            if len(seen) == len(names):
                raise Stop

        return hook

    hooks = [scope.get_submodule(name).register_forward_pre_hook(look(name)) for name in names]
    run(calls, hooks, enough=lambda: len(seen) == len(names))
    grouped: list[list[str]] = []
    for name, x in seen.items():
        if grouped and seen[grouped[-1][0]] is x:
            grouped[-1].append(name)
        else:
            grouped.append([name])
    return grouped + [[name] for name in names if name not in seen]


def collect_hessian(layer: nn.Module, calls: Sequence[Call]) -> Tensor:
    """Mean of x x^T over all tokens that reach a layer: (K, K) float32, zeros if none does."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    width = weight.shape[0] if isinstance(layer, Conv1D) else weight.shape[1]
    total, tokens = torch.zeros(width, width, device=weight.device), 0

    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        nonlocal tokens
        x = inputs[0].reshape(-1, width).float()
        total.addmm_(x.T, x)
        tokens += len(x)
        raise Stop

    run(calls, [layer.register_forward_pre_hook(hook)])
    return total / max(tokens, 1)
