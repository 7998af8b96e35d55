"""What cannot train, or could not be deployed in the end, said before the first step."""

import importlib
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import DistributedType
from torch import nn
from transformers import Trainer, TrainerState, TrainingArguments

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.adapter.merged import check_weights_of_their_own
from qbl_trl.errors import ConfigError, ExportError, MergeError
from qbl_trl.model_files import check_generation, generation_settings
from qbl_trl.quant.head import check_parting, input_table, output_head
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.trl.layers import active, base_of
from qbl_trl.wrapped import is_decoder, unwrap

logger = logging.getLogger(__name__)

# Modules of trainers that multiply with the output head's weight instead of calling it import one of these.
_READ_THE_HEAD = ("add_fused_lm_head", "_ForwardRedirection")
_GATHERS = "zero_optimization.stage3_gather_16bit_weights_on_model_save"


def check_merges(layers: dict[str, BalancedLinear], wanted: list[str]) -> None:
    """Refuse outputs that need an exact merge where there is none.

    Args:
        layers: every adapted layer by full name.
        wanted: the options that need one, as the user wrote them.

    Raises:
        ConfigError: naming the first layer that does not merge exactly.
    """
    name = next((name for name, layer in layers.items() if not layer.merges_exactly()), None)
    if not wanted or name is None:
        return
    layer = layers[name]
    group = "" if layer.base.group_size is None else f" in groups of {layer.base.group_size}"
    raise ConfigError(
        f"{name}: {' and '.join(wanted)}: outputs that need an exact merge, and there is none into a "
        f"{layer.base.kind} base{group} with in_factor={layer.in_factor[active(layer)[0]]}. Train with "
        "quantization_aware=True over a GroupQuantConfig base, or leave them out and export the adapter beside its base"
    )


def check_head(trainer: Trainer, model: nn.Module) -> None:
    """Refuse a packed or adapted output head in a trainer that multiplies with its weight instead of calling it.

    Raises:
        ConfigError: before the first step, which would fail on shapes, or train no adapter there.
    """
    modules = [vars(sys.modules[cls.__module__]) for cls in type(trainer).__mro__]
    if not any(mark in names for names in modules for mark in _READ_THE_HEAD):
        return
    head = output_head(unwrap(model))
    if isinstance(head, BalancedLinear):
        raise ConfigError(
            f"{type(trainer).__name__} reads the weight of the output head and never calls it, so an adapter on it "
            "would not be trained. Leave the head out of target_modules, or use a trainer that calls it (transformers')"
        )
    if isinstance(head, GroupQuantLinear):
        raise ConfigError(
            f"{type(trainer).__name__} reads the weight of the output head, and quantize_embeddings=True packs it. "
            "Train over a base with quantize_embeddings=False, or with a trainer that calls the head (transformers')"
        )


def check_teacher(args: TrainingArguments) -> None:
    """Refuse a teacher that is a moving average of the adapter: SDPO and SDFT keep it as a second, plain LoRA.

    Raises:
        ConfigError: naming the teachers that work.
    """
    if getattr(args, "teacher_model_kind", None) == "ema":
        raise ConfigError(
            f'{type(args).__name__}: teacher_model_kind="ema" averages the adapter into a second one, and TRL does so '
            'with plain LoRA alone. Set teacher_model_kind="base" (the model without its adapter) or "live" (with it)'
        )


def check_trains(model: nn.Module) -> None:
    """Refuse to train a model of which nothing trains; with gradient checkpointing it would go through without a word.

    Raises:
        ConfigError: if no parameter requires a gradient.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(
            "no parameter of the model requires a gradient, so nothing would be trained. A saved adapter trains on "
            "after PeftModel.from_pretrained(base, folder, is_trainable=True)"
        )


def check_optimizer(trainer: Trainer, model: nn.Module) -> None:
    """Refuse an optimizer that was made before the adapters were there.

    Raises:
        ConfigError: if it holds nothing that trains.
    """
    optimizer = trainer.optimizer
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter.requires_grad and id(parameter) in held for parameter in model.parameters()):
        raise ConfigError(
            "the trainer was given an optimizer (optimizers=) that was made before the adapters were there, so nothing "
            "would be trained. Make it over get_peft_model(model, QBLoRAConfig(...)) and pass that model with "
            "QBLoRACallback(), or choose one by name: optim= of the trainer's arguments"
        )


def check_search(state: TrainerState, merged: Path | None) -> None:
    """Refuse one folder for the merged models of all trials of a search.

    Raises:
        ConfigError: before the first trial.
    """
    if state.is_hyper_param_search and merged is not None:
        raise ConfigError(
            "QBLoRACallback: merged_output_dir would hold the model of the last trial of a hyperparameter_search, not "
            "that of the best. Leave it out; save_merged=True writes a merged model into every trial's checkpoints"
        )


def check_launch(trainer: Trainer, layers: dict[str, BalancedLinear], wanted: list[str]) -> None:
    """Refuse launch settings that cannot hold a packed base, before anything is sharded; warn of unused ones.

    Raises:
        ConfigError: FSDP with activation checkpointing of its own, under which adapters are not saved; FSDP2 with
            cpu_ram_efficient_loading, which takes every buffer for a sharded parameter; outputs
            that need a merge under DeepSpeed ZeRO-3, or ZeRO-3 that does not gather what the trainer saves.
    """
    asked = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")
    if asked and trainer.accelerator.distributed_type != DistributedType.FSDP:
        why = "use_cpu=True" if trainer.args.use_cpu else "there is one process, or no GPU"
        logger.warning("launched with FSDP, but the model is not sharded: %s", why)
    deepspeed = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    stage = deepspeed.zero_stage if deepspeed else 0
    if deepspeed and stage == 3 and not deepspeed.hf_ds_config.get_value(_GATHERS):
        raise ConfigError(
            "QBLoRACallback: under DeepSpeed ZeRO-3 the trainer would save adapter files without tensors; set "
            f"zero3_save_16bit_model: true in the accelerate configuration ({_GATHERS} in DeepSpeed's own), as "
            "recipes/accelerate/deepspeed_zero3.yaml does"
        )
    if stage == 3 and wanted:
        raise ConfigError(
            f"QBLoRACallback: {' and '.join(wanted)} cannot be made under DeepSpeed ZeRO-3. Leave them out and run "
            "`qbl-trl merge ADAPTER OUTPUT` afterwards, or launch with recipes/accelerate/fsdp2.yaml"
        )
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None) if trainer.is_fsdp_enabled else None
    if plugin is not None and plugin.activation_checkpointing:
        raise ConfigError(
            "QBLoRACallback: with fsdp_activation_checkpointing PEFT finds no adapter under the names that modules "
            "then have, and every checkpoint would hold one without tensors; set it to false in the accelerate "
            "configuration, and gradient_checkpointing=True in the trainer's arguments"
        )
    packed = any(isinstance(base_of(layer), GroupQuantLinear) for layer in layers.values())
    if plugin is not None and packed and plugin.fsdp_version == 2 and plugin.cpu_ram_efficient_loading:
        raise ConfigError(
            "Accelerate's FSDP2 with cpu_ram_efficient_loading cannot spread the scales of a 4-bit base (they are "
            "buffers); set fsdp_cpu_ram_efficient_loading: false in the accelerate configuration, as "
            "recipes/accelerate/fsdp2.yaml does"
        )


def check_export(options: Mapping[str, Any]) -> None:
    """Refuse options that `export_onnx` would refuse.

    Raises:
        ConfigError: naming the option, or the packages that an export needs.
    """
    try:
        export_onnx = importlib.import_module("qbl_trl").export_onnx
        call = inspect.signature(export_onnx).bind(None, None, **options)
        call.apply_defaults()
        importlib.import_module("qbl_trl.onnx.asked").Asked.of(call.arguments)
        if options.get("tokenizer") is not None:
            importlib.import_module("qbl_trl.onnx.companions").check_tokenizer(options["tokenizer"])
    except ImportError as error:
        raise ConfigError(f"QBLoRACallback: onnx_output_dir: {error}") from error
    except (TypeError, ExportError) as error:
        raise ConfigError(f"QBLoRACallback: onnx_options: {error}") from error


def check_saves(model: nn.Module, wanted: list[str]) -> None:
    """Refuse outputs that are saved models of a model that cannot be saved.

    Args:
        wanted: the options that need one, as the user wrote them.

    Raises:
        ConfigError: if the model has no `save_pretrained`, or generation settings that are invalid.
    """
    inner = unwrap(model)
    if wanted and not hasattr(inner, "save_pretrained"):
        raise ConfigError(
            f"QBLoRACallback: {' and '.join(wanted)}: a {type(inner).__name__} has no save_pretrained. Leave them "
            "out, and merge after the training: qbl_trl.merge(model)"
        )
    if wanted:
        check_generation(generation_settings(inner))
        reason = why_not_merged(model)
        if reason is not None:
            raise ConfigError(f"QBLoRACallback: {' and '.join(wanted)}: {reason}")


def why_not_merged(model: nn.Module) -> str | None:
    """Why no merged model is made of a model whose layers all merge; None if one is."""
    inner = unwrap(model)
    replicated = getattr(inner, "peft_config", {}).values()
    if any(getattr(config, "layer_replication", None) for config in replicated):
        return "layer_replication: replicated layers share weights and do not merge"
    try:
        check_weights_of_their_own(inner)
    except MergeError as error:
        return str(error)
    return _inseparable_head(inner)


def _inseparable_head(model: nn.Module) -> str | None:
    """Why a model is not saved merged that ties head and embedding, of which one trains; None if it is."""
    table: Any = input_table(model)
    head = output_head(model)
    if table is None or not hasattr(head, "weight"):
        return None
    adapted = isinstance(head, BalancedLinear) and bool(active(head))
    if not adapted and (head.weight is table.weight or type(head.weight) is not nn.Parameter):
        return None
    try:
        check_parting(model)
    except MergeError as error:
        return str(error)
    return None


def check_decoder(model: nn.Module) -> None:
    """Refuse an export of a model that generates no text: a classifier, a reward model, an encoder.

    Raises:
        ConfigError: naming the model's class, or why its architecture has no graph.
    """
    inner = unwrap(model)
    if not is_decoder(inner):
        raise ConfigError(
            f"QBLoRACallback: onnx_output_dir exports decoders that generate text, a {type(inner).__name__} is none; "
            "leave it out: merged_output_dir holds what was trained"
        )
    try:
        importlib.import_module("qbl_trl.onnx.trace").check_supported(inner)
    except ExportError as error:
        raise ConfigError(f"QBLoRACallback: onnx_output_dir: {error}") from error
