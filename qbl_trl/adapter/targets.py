"""What target_modules="all-linear" names: PEFT's own choice, and what PEFT cannot know of this method's bases."""

import copy
import warnings
from collections.abc import Iterable

from peft.tuners.tuners_utils import _maybe_include_all_linear_layers, check_target_module_exists
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from transformers import PreTrainedModel

from qbl_trl.adapter.bases import describe, foreign_kind
from qbl_trl.config import QBLoRAConfig
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.targets import routers, task_head

# PeftModelFor... of PEFT names them once the adapter is placed; those of "SEQ_CLS" are in modules_to_save by then
_HEADS = {"SEQ_CLS": (), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


def resolve_all_linear(config: QBLoRAConfig, model: nn.Module) -> set[str] | None:
    """Full names of the layers; None where PEFT's own choice is right (or another target_modules was given).

    - PEFT counts subclasses of nn.Linear: layers of HQQ, GPTQ and AWQ are added.
    - quantization_aware: only layers over affine groups, where there are any; a merge has to be exact. Layers beside
      the text model (towers that see or hear) whose inputs are no whole groups are left out with a warning: no factor
      fits them.
    - Routers keep choosing the experts that the model was trained with; transformers 5 has no linear layer there.
    - What torch's own attention reads and never calls gets none.
    - What trains whole needs no adapter, and PEFT cannot wrap a layer that has one: modules_to_save, and the heads that
      PEFT adds to it for some tasks once the adapter is placed.
    - Heads of classifiers that no task_type tells PEFT of are left out with a warning: they stay as they are.
    - layers_to_transform: PEFT heeds layer numbers for parts of names, not for full ones; they are heeded here.
    """
    if config.target_modules != "all-linear":
        return None
    plain: set[str] = _maybe_include_all_linear_layers(copy.copy(config), model).target_modules
    foreign = {
        name
        for name, module in model.named_modules()
        if foreign_kind(module) and not isinstance(module, nn.Linear) and not name.endswith(".base_layer")
    }
    task = str(getattr(config.task_type, "value", config.task_type))
    whole = {*(config.modules_to_save or ()), *_HEADS.get(task, ())}
    chosen = {name for name in plain | foreign if not _trains_whole(name, whole)}.difference(routers(model))
    chosen = {name for name in chosen if not isinstance(_base(model, name), NonDynamicallyQuantizableLinear)}
    chosen -= _frozen_head(chosen, model, task)
    if config.quantization_aware:
        grouped = {name for name in chosen if _has_groups(_base(model, name))}
        chosen = (grouped - _misfits_of_towers(grouped, model)) or grouped or chosen
    if config.layers_to_transform is not None:
        by_part = copy.copy(config)
        by_part.target_modules = [name.rpartition(".")[2] for name in chosen]
        chosen = {name for name in chosen if check_target_module_exists(by_part, name)}
    return None if chosen == plain else chosen


def _frozen_head(names: set[str], model: nn.Module, task: str) -> set[str]:
    """The layers of a classifier's head among those that would be adapted, which are warned of."""
    head = names & task_head(model)
    if head:
        tasks = 'set task_type="SEQ_CLS" (or "TOKEN_CLS", "QUESTION_ANS"), or '
        warnings.warn(
            f"{', '.join(sorted(head))} of {type(model).__name__} gets no adapter and stays as it is. To train it "
            f"whole beside the adapters, as a new head needs, {'' if task in _HEADS else tasks}name it in "
            "modules_to_save",
            stacklevel=2,
        )
    return head


def _trains_whole(name: str, keys: Iterable[str]) -> bool:
    """Whether a key names a layer or a module around it; PEFT compares the ends of names."""
    parts = name.split(".")
    around = [".".join(parts[:count]) for count in range(1, len(parts) + 1)]
    return any(outer.endswith(key) for outer in around for key in keys)


def _has_groups(layer: nn.Module) -> bool:
    known = isinstance(layer, GroupQuantLinear) or foreign_kind(layer) is not None
    return known and describe(layer).group_size is not None


def _misfits_of_towers(names: set[str], model: nn.Module) -> set[str]:
    """The layers beside the text model whose inputs do not fill their last group, which are warned of."""
    if not isinstance(model, PreTrainedModel) or model.config.get_text_config() is model.config:
        return set()
    decoder = model.get_decoder()
    text = set() if decoder is None else set(decoder.modules())
    bases = {name: _base(model, name) for name in names}
    described = {name: describe(layer) for name, layer in bases.items() if layer not in text}
    misfits = {name: base for name, base in described.items() if base.in_features % (base.group_size or 1)}
    if misfits:
        name, base = min(misfits.items())
        warnings.warn(
            f"{len(misfits)} layers get no adapter ({name}, ...): their inputs ({base.in_features}) are no whole "
            f"quantization groups of {base.group_size}. They stay as they are; name target_modules to choose yourself",
            stacklevel=2,
        )
    return set(misfits)


def _base(model: nn.Module, name: str) -> nn.Module:
    module = model.get_submodule(name)
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module  # type: ignore[operator]
