"""Which layers of a model are quantized: those that multiply by their weight, and whose weight nobody else reads.

Left in float: the output head, heads on top of the base model (a classifier is small and often trained whole), a
pooler, what the model itself wants in float32, and routers: they are small, a rounding error of theirs asks other
experts, and some versions of transformers have them as layers of their own kind.
"""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.base import HfQuantizer

from qbl_trl.allowed import ALLOWED_GROUP_SIZES
from qbl_trl.config import GroupQuantConfig
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.modules import copied, on_meta, same_module_name
from qbl_trl.quant.read_weights import read_by_others
from qbl_trl.random_state import same_random_state

_READ_ELSEWHERE = {  # where no pattern of `read_weights.py` sees it
    "inkling2_text": ("weight_proj",),  # stored under a name that has no place for scales
    "longcat_flash": ("router.classifier",),
    "rwkv": ("attention.output", "feed_forward.value"),  # divided in place for inference
    "wavlm": ("q_proj", "k_proj", "v_proj", "out_proj"),  # by torch's own attention
    "neomme": ("unembedding_projection",),
    **dict.fromkeys(("falcon_mamba", "mamba"), ("dt_proj",)),
}
_READ_BY_KERNELS = {  # of state space models, fused; called where these are not
    **dict.fromkeys(("falcon_mamba", "mamba"), ("x_proj", "out_proj")),
    **dict.fromkeys(("bamba", "falcon_h1", "granitemoehybrid", "zamba2"), ("mamba.out_proj",)),
    **dict.fromkeys(("mamba2", "nemotron_h"), ("out_proj",)),
}


def target_layers(model: nn.Module, config: GroupQuantConfig) -> list[str]:
    """Full names of the linear layers to quantize."""
    skipped = {*HfQuantizer.get_modules_to_not_convert(_without_memory(model), None), *_kept_in_float(model)}
    skipped |= _last_without_head(model)
    skipped |= {*(config.modules_to_not_convert or []), *routers(model)}
    prefix, exactly = _inner_prefix(model), task_head(model) | read_by_others(model)

    def is_skipped(name: str) -> bool:
        return not skipped.isdisjoint(keys_of(name))

    return [
        name
        for name, module in model.named_modules()
        if name.startswith(prefix) and name and is_linear(module) and _is_wide(module)
        if name not in exactly and not is_skipped(name)
    ]


def _last_without_head(model: Any) -> set[str]:
    """The last module of a model without output head, if it has a bias: a pooler, which 4.57 keeps and 5 does not."""
    if model.get_output_embeddings() is not None:
        return set()
    last = [name for name, _ in model.named_parameters()][-1:]
    return {name.removesuffix(".bias") for name in last if name.endswith(".bias")}


def task_head(model: nn.Module) -> set[str]:
    """Full names of the linear layers that a classifier, or what answers questions, has beside its inner model."""
    if not any(task in type(model).__name__ for task in ("Classification", "QuestionAnswering")):
        return set()
    prefix = _inner_prefix(model)
    if not prefix:  # its layers are all its own
        return {name for name, child in model.named_children() if is_linear(child)}
    return {name for name, module in model.named_modules() if is_linear(module) and not name.startswith(prefix)}


def _inner_prefix(model: nn.Module) -> str:
    """What names of modules of the inner model begin with; "" where that is the model itself."""
    inner = getattr(model, "base_model", model)
    return "" if inner is model else same_module_name(model, inner) + "."


def naming_nothing(model: nn.Module, config: GroupQuantConfig) -> list[str]:
    """Entries of modules_to_not_convert that no module of the model answers to."""
    known = set[str]().union(*(keys_of(name) for name, _ in model.named_modules()))
    return [key for key in config.modules_to_not_convert or [] if key not in known]


def is_named(name: str, key: str) -> bool:
    """Whether a key is a module's name, its last parts, or names a module around it."""
    return name == key or name.endswith("." + key) or f".{key}." in f".{name}."


def keys_of(name: str) -> set[str]:
    """Every key by which `is_named` knows a module: a mixture has too many experts to try each key on each name."""
    parts = name.split(".")
    return {".".join(parts[start:end]) for end in range(1, len(parts) + 1) for start in range(end)}


def is_linear(module: nn.Module) -> bool:
    """Whether a module computes W x + b and nothing else. Subclasses are asked, on a few numbers."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    # Attention of torch itself reads the weight of this one instead of calling it.
    if not isinstance(module, nn.Linear) or isinstance(module, NonDynamicallyQuantizableLinear):
        return False
    small: Any = copy.copy(module)
    generator = torch.Generator().manual_seed(0)
    # On the CPU, whatever the default device: a model that is being loaded is on none.
    x, weight, bias = (torch.randn(shape, generator=generator, device="cpu") for shape in ((2, 8), (4, 8), (4,)))
    small._parameters = {
        "weight": nn.Parameter(weight),
        "bias": nn.Parameter(bias) if module.bias is not None else None,
    }
    expected = nn.functional.linear(x, small.weight, small.bias)
    try:
        small.in_features, small.out_features = 8, 4
        with torch.no_grad(), same_random_state():  # a router in training mode may draw some
            y = small(x)
    except Exception:  # whatever it needs beyond a weight and a bias
        return False
    return isinstance(y, torch.Tensor) and y.shape == expected.shape and torch.allclose(y, expected, atol=1e-5)


def routers(model: nn.Module) -> list[str]:
    """Full names of linear layers that choose or weigh the experts of a mixture: beside them, or in a router there."""
    found = []
    for name, module in model.named_modules():
        if _holds_experts(module):
            for kind in ("gate", "router", "shared_expert_gate"):
                inside = module.get_submodule(kind).named_modules(prefix=kind) if kind in module._modules else ()
                found += [f"{name}.{child}" for child, layer in inside if isinstance(layer, nn.Linear)]
    return found


def is_mixture(model: nn.Module) -> bool:
    """Whether a router chooses experts anywhere in a model."""
    return any(map(_holds_experts, model.modules()))


def _holds_experts(module: nn.Module) -> bool:
    return "experts" in module._modules or isinstance(module, Experts)


def _without_memory(model: Any) -> Any:
    """A copy of a model whose tensors hold nothing: transformers 4.57 copies what it looks at, weights included."""
    return copied(model, on_meta)


def _is_wide(module: Any) -> bool:
    return int(module.nx if isinstance(module, Conv1D) else module.in_features) >= min(ALLOWED_GROUP_SIZES)


def _kept_in_float(model: nn.Module) -> set[str]:
    """Modules that a model class declares to need float32, and those that kernels read, or others unseen."""
    lists = [getattr(model, name, None) for name in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")]
    wanted = {name.removesuffix(".weight") for names in lists if isinstance(names, (list, set)) for name in names}
    return wanted | {*read_elsewhere(model), *_of_type(model, _READ_BY_KERNELS), *_in_slices(model)}


def _in_slices(model: nn.Module) -> tuple[str, ...]:
    """Bloom multiplies by slices of a weight where its configuration asks for the sums of its training."""
    config = getattr(model, "config", None)
    sliced = getattr(config, "pretraining_tp", 1) > 1 and getattr(config, "slow_but_exact", False)
    return ("self_attention.dense", "dense_4h_to_h") if sliced else ()


def read_elsewhere(model: nn.Module) -> tuple[str, ...]:
    """Last parts of the names of layers whose weight is read by others, and never called."""
    return _of_type(model, _READ_ELSEWHERE)


def _of_type(model: nn.Module, names: dict[str, tuple[str, ...]]) -> tuple[str, ...]:
    return names.get(str(getattr(getattr(model, "config", None), "model_type", None)), ())
