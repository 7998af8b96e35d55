"""Placing adapters on the model of a trainer that is being built, as if they had come by `peft_config=`.

A callback's `on_init_end` is handed a model, not the trainer. Adapters injected into that model alone would train, but
every checkpoint would hold the whole model and none could be resumed from, because the trainer would not know that its
model is a PeftModel. So the trainer is found and given the PeftModel.
"""

import copy
import logging
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers import Trainer

from qbl_trl.adapter.checkpointing import let_towers_require_grad
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.quant.head import output_head
from qbl_trl.quant.modules import replace, same_module_name
from qbl_trl.random_state import same_random_state
from qbl_trl.wrapped import unwrap

logger = logging.getLogger(__name__)

# These load a reference model of their own unless the model was a PeftModel before their __init__ ran.
_NEED_ADAPTERS_FIRST = ("GRPOTrainer", "RLOOTrainer")
_WRITE = "write {trainer}(..., peft_config=QBLoRAConfig(...), callbacks=[QBLoRACallback()])"


def find_trainer(model: nn.Module) -> Trainer | None:
    """The trainer that is calling: the nearest `self` up the stack that is a Trainer of this very model.

    Events carry no reference to the trainer; the stack is the only place where it can be met at `on_init_end`.
    """
    callers = (frame.f_locals["self"] for frame in _methods())
    return next((c for c in callers if isinstance(c, Trainer) and getattr(c, "model", None) is model), None)


def _methods() -> Iterator[FrameType]:
    """The methods that are running, the nearest first, as far as they still have their `self`.

    Looking at the variables of a frame keeps them alive until it returns (before Python 3.13): those of a script's
    functions, which may want to let go of a model, are not looked at.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self" and "self" in frame.f_locals:
            yield frame
        frame = frame.f_back


def variables_of(trainer: Trainer | None) -> Iterator[dict[str, Any]]:
    """Variables of the methods of a trainer that are running, the nearest first."""
    return (frame.f_locals for frame in _methods() if frame.f_locals["self"] is trainer is not None)


def is_adapted(model: nn.Module) -> bool:
    """Whether a model has adapters of any method."""
    return isinstance(model, PeftModel) or any(isinstance(module, BaseTunerLayer) for module in model.modules())


def place_(trainer: Trainer | None, model: nn.Module, config: QBLoRAConfig) -> nn.Module:
    """Wrap the trainer's model in place; saving, resuming and loading the best model then work as with peft_config.

    The given configuration is not changed.

    Raises:
        ConfigError: if the model has adapters already, the trainer cannot take them now, or the factors do not fit.
    """
    if is_adapted(model):
        raise ConfigError(
            "QBLoRACallback was given a config, but the model already has adapters (from peft_config= or "
            "get_peft_model, or from an earlier trainer, which adapts its model in place). Give the adapter once: "
            "QBLoRACallback() without a config watches those that are there, also of another trainer's trainer.model; "
            "for a new adapter load the base anew"
        )
    if trainer is None:
        raise ConfigError(
            "QBLoRACallback found no Trainer that is being built around this model; pass it in callbacks=[...] of the "
            "trainer, or " + _WRITE.format(trainer="SFTTrainer")
        )
    _check_trainer(trainer)
    config = copy.deepcopy(config)
    if any(cls.__module__.startswith("sentence_transformers.") for cls in type(model).__mro__):
        with same_random_state():
            model.add_adapter(config)  # type: ignore[operator]  # it saves more than a PeftModel around it would
        return model
    task = getattr(config.task_type, "value", config.task_type)
    if task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and not hasattr(unwrap(model), "prepare_inputs_for_generation"):
        raise ConfigError(
            f'QBLoRAConfig: task_type="{task}" is for models that generate text, and a {type(model).__name__} is none; '
            'leave it out, or set the task of its head ("SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS"), which then trains, too'
        )
    _train_added_tokens_(config, model, trainer)
    with same_random_state():  # the trainer has set its seed; adapters placed before that draw nothing from it either
        peft_model = get_peft_model(model, config)  # type: ignore[arg-type]
    if trainer.args.gradient_checkpointing and hasattr(model, "enable_input_require_grads"):
        peft_model.enable_input_require_grads()
        let_towers_require_grad(model)
    if getattr(trainer.args, "disable_dropout", False):
        _disable_dropout_(peft_model)
    _let_go_of_copied_reference_(trainer)
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = peft_model
    return peft_model


class Unadapted:
    """A model as it was before `place_`, for whoever is refused and tries again.

    Args:
        model: without adapters.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._trains = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        self._hooks = {id(module): set(module._forward_hooks) for module in model.modules()}

    def restore_(self) -> None:
        """Take adapters and hooks away again, those of a placing that failed half-way too; nothing else trains."""
        model = self._model
        for name, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                replace(model, name, module.unload_and_optionally_merge_module(False, False, None))
            elif isinstance(module, BaseTunerLayer) and name:
                replace(model, name, module.get_base_layer())  # type: ignore[no-untyped-call]
        vars(model).pop("peft_config", None)
        for module in model.modules():
            for hook in set(module._forward_hooks) - self._hooks.get(id(module), set()):
                del module._forward_hooks[hook]
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(self._trains.get(name, parameter.requires_grad))


def _train_added_tokens_(config: QBLoRAConfig, model: nn.Module, trainer: Trainer) -> None:
    """What a trainer does to a peft_config when a chat template brings new tokens: their rows and the head train, too.

    SFTTrainer and RewardTrainer keep the new ids in a variable of their constructor, which is running now. They call
    the two layers "embed_tokens" and "lm_head"; here they have the names that the model gives them.
    """
    named = (variables.get("added_tokens") for variables in variables_of(trainer))
    added = next((found for found in named if isinstance(found, list) and found), None)
    if added is None:
        return
    rows = config.trainable_token_indices
    inner: Any = unwrap(model)
    table, head = (
        None if layer is None else same_module_name(inner, layer).rpartition(".")[2]
        for layer in (inner.get_input_embeddings(), output_head(inner))
    )
    if rows is None or isinstance(rows, list):
        config.trainable_token_indices = {table: [*(rows or []), *added]}
    else:
        config.trainable_token_indices = {**rows, table: [*rows.get(table, []), *added]}
    if head is not None and head not in (config.modules_to_save or ()):
        config.modules_to_save = [*(config.modules_to_save or ()), head]
        logger.warning(
            "the chat template brought %d new tokens: their embeddings and the output head train beside the adapter",
            len(added),
        )


def _disable_dropout_(model: nn.Module) -> None:
    """What some trainers (Reward, ORPO, CPO, OnlineDPO) did to their model before the adapters were there."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def _let_go_of_copied_reference_(trainer: Trainer) -> None:
    """What OnlineDPO does with a peft_config: its reference is the model with the adapters off, not a second model.

    Without one it has copied its model by now, unless it was given a reference: that is a variable of its constructor,
    which is running now.
    """
    if not any(cls.__name__ == "OnlineDPOTrainer" for cls in type(trainer).__mro__):
        return
    given = (names["ref_model"] for names in variables_of(trainer) if "ref_model" in names)
    if next(given, trainer.ref_model) is None:
        trainer.ref_model = None


def _check_trainer(trainer: Trainer) -> None:
    name = next((cls.__name__ for cls in type(trainer).__mro__ if cls.__name__ in _NEED_ADAPTERS_FIRST), None)
    if name and getattr(trainer.args, "beta", 0.0) != 0.0:
        raise ConfigError(
            f"{name} with beta={trainer.args.beta} loads a second, unquantized reference model unless the adapters are "
            f"there before it starts; {_WRITE.format(trainer=name)}, or set beta=0.0"
        )
    if getattr(trainer, "model_init", None) is not None:
        raise ConfigError(
            "QBLoRACallback(config) adapts the model it sees, and model_init makes another one when training starts. "
            "Return get_peft_model(model, QBLoRAConfig(...)) from model_init, and pass QBLoRACallback()"
        )
