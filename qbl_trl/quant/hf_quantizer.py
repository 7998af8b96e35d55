"""GroupQuantizer: the plugin that lets `from_pretrained` quantize while it loads, and reload what was saved.

A float checkpoint is quantized layer by layer as its tensors arrive, so the float model never exists as a whole. A
packed checkpoint is loaded into packed layers, after its headers were checked. Both generations of the loading code
are served: transformers 4.57 calls `create_quantized_param`, transformers 5 runs the operation of `get_quantize_ops`.
"""

import inspect
import re
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from qbl_trl.allowed import ALLOWED_GROUP_SIZES
from qbl_trl.config import QUANT_METHOD, GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError, QblError
from qbl_trl.generation import BEFORE_5
from qbl_trl.older_names import restore_settings_
from qbl_trl.progress import progress
from qbl_trl.quant.apply import finish_, quantize_layer_
from qbl_trl.quant.arriving import arrived, not_arrived, nothing_arrived, nothing_loaded_, widen_
from qbl_trl.quant.checkpoint import Declared, check_tensors, read_headers
from qbl_trl.quant.dequantizing import dequantize_model_
from qbl_trl.quant.device_map import bytes_per_weight, counted_types, refuse_disk, room_for_codes
from qbl_trl.quant.head import empty_embeddings_, tie_again_, to_pack
from qbl_trl.quant.intact import check_present, check_types
from qbl_trl.quant.kept_dtypes import keep_stored_dtypes
from qbl_trl.quant.modules import replace
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.precision import Precision, as_precise
from qbl_trl.quant.renaming import keep_packed_names_, layers_in_model, names_in_model, without_packed
from qbl_trl.quant.requested import requested, warn_of_unknown
from qbl_trl.quant.resizing import refuse_resizing
from qbl_trl.quant.resolved import check_chosen_files
from qbl_trl.quant.stacks import keep_unstacked, separate_, take_out_, unstack_
from qbl_trl.quant.stored import (
    empty_layer,
    expected_tensors,
    files_of,
    folder_of,
    packed_in,
    stored_layers,
    summarized,
)
from qbl_trl.quant.targets import target_layers

_AROUND = re.compile(r"^((_orig_mod|module)\.)+")  # what compiling and distributing a model put before its names
_SOON = 1.0  # seconds: what is done by then needs no bar


class GroupQuantizer(HfQuantizer):
    """Affine group quantization of linear layers, on load or from packed files; see GroupQuantConfig."""

    requires_calibration = False
    requires_parameters_quantization = True

    quantization_config: GroupQuantConfig
    missing: frozenset[str] = frozenset()
    targets: Sequence[str] = ()
    failure: QblError | None = None
    loads_as: Any = None
    precision: Precision
    _bar: Any = None
    _arriving: nn.Module | None = None

    def update_tp_plan(self, config: Any) -> Any:
        """The first sight of the configuration in transformers 4.57: the files are checked before any is opened."""
        restore_settings_(config)
        folder = folder_of(config) if self.pre_quantized else None
        if folder is not None:
            read_headers(folder)
        return config

    update_attn_implementation = update_tp_plan  # the same in transformers 5

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Called with the map that was asked for, and again with the one that "auto" became."""
        refuse_disk(device_map)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes of a weight as it will be, for device_map="auto" (transformers 5)."""
        quantized = self.param_needs_quantization(model, param_name)
        return bytes_per_weight(self.quantization_config) if quantized else param.element_size()

    def get_special_dtypes_update(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """The same in transformers 4.57, which counts codes only; their scales have room by `adjust_max_memory`."""
        names = [name for name, _ in model.named_parameters() if self.param_needs_quantization(model, name)]
        return counted_types(names, self.quantization_config)

    def adjust_max_memory(self, max_memory: dict[str, Any]) -> dict[str, Any]:
        """Room for scales and zero points beside the codes, where these are not counted."""
        counted = self.pre_quantized or not BEFORE_5 or self.quantization_config.algorithm == "gptq"
        return max_memory if counted else room_for_codes(max_memory, self.quantization_config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._arriving = model
        if not self.pre_quantized:
            self.quantization_config, self.loads_as = requested(model, self.quantization_config), model.dtype
            self.precision = Precision()
            stacked = self.choose_(model)
            keep_unstacked(model, stacked, ())  # the tensors of the files arrive stacked
            nothing_loaded_(model)
            return model
        folder, found = files_of(folder_of(model.config), kwargs.get("checkpoint_files"))
        self.choose_(model, folder, found)
        self.quantization_config.layers = layers_in_model(model, self.quantization_config.layers, found)  # type: ignore[arg-type]
        for name in self.targets:
            replace(model, name, empty_layer(model.get_submodule(name), self.quantization_config, name))
        if self.quantization_config.quantize_embeddings:
            empty_embeddings_(model, self.quantization_config, packed_in(model, found))
        if folder is not None:
            stored = {name: found[origin] for origin, name in names_in_model(model, found).items()}  # type: ignore[arg-type]
            check_tensors(folder, stored, expected_tensors(model))
        return model

    def choose_(
        self, model: nn.Module, folder: Path | None = None, found: dict[str, Declared] | None = None
    ) -> dict[str, nn.Module]:
        """Choose the layers to quantize, experts as layers of their own among them, as a packed folder says if any.

        Raises:
            ConfigError: if there are none.
        """
        stacked, held = unstack_(model), None
        if not (self.pre_quantized or self.targets):  # once, for GPTQ chooses again
            warn_of_unknown(model, self.quantization_config)
        self.targets = target_layers(model, self.quantization_config)
        if folder is not None:
            self.targets, held = stored_layers(model, folder, found or {}, self.targets)
        if not self.targets:
            keep_unstacked(model, stacked, ())
            if folder is not None:
                raise CheckpointError(
                    f"{folder}: no layer of a {type(model).__name__} is packed in these files, although the "
                    "configuration says so; if they are those of a float model, take quantization_config out of it "
                    "(config.json, or what is given as config=)"
                )
            raise ConfigError(
                f"{type(model).__name__} has no linear layer to quantize once its head, layers with fewer inputs than "
                f"{min(ALLOWED_GROUP_SIZES)} and modules_to_not_convert="
                f"{self.quantization_config.modules_to_not_convert} are left out"
            )
        self.chosen = frozenset(self.targets)
        self.stacks = keep_unstacked(model, stacked, self.targets, held)
        return stacked

    def update_weight_conversions(self, weight_conversions: list[Any], *model: nn.Module) -> list[Any]:
        """What is packed is neither joined nor split (transformers 5, which says of which model from 5.21 on)."""
        conversions: list[Any] = super().update_weight_conversions(weight_conversions, *model)
        arriving = model[0] if model else self._arriving
        return conversions if arriving is None else without_packed(conversions, arriving)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """transformers 4.57 would hand over memory that nothing was loaded into: such layers are drawn instead.

        Raises:
            CheckpointError: if they are packed; where the folder is known, this was said before.
        """
        self.missing = frozenset(missing_keys)
        lost = sorted(self.missing & expected_tensors(model).keys()) if self.pre_quantized else []
        if lost:
            raise CheckpointError(
                f"tensor {lost[0]!r} of a packed layer is not in the files ({len(lost)} such tensors)"
            )
        return missing_keys

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        layer, _, kind = param_name.rpartition(".")
        later = self.quantization_config.algorithm == "gptq"  # needs the float model whole
        if self.pre_quantized or later or param_name in self.missing:
            return False
        return (kind == "weight" and layer in self.chosen) or param_name in self.stacks

    def create_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, target_device: Any, **kwargs: Any
    ) -> None:
        """Quantize one weight as it arrives and put the packed layer in its place (transformers 4.57).

        That generation shows the progress of files, not of weights as its successor does: the bar is ours.
        """
        if self._bar is None:
            self._bar = progress(len(self.targets), "quantizing", "layer", delay=_SOON)
        self._bar.update(self.quantize_arrived_(model, param_name, param_value.to(target_device)))

    def quantize_arrived_(self, model: nn.Module, name: str, weight: Tensor) -> int:
        """Quantize the weight of one layer, or of all experts that it stacks; returns the number of layers."""
        weight = arrived(model, name, weight)
        stacked = name in self.stacks
        layers = separate_(model, name, weight, self.stacks[name]) if stacked else [name.rpartition(".")[0]]
        chosen = [layer for layer in layers if layer in self.chosen]
        for layer in chosen:
            value: Any = model.get_submodule(layer).weight.data if stacked else weight
            self.quantize_(model, layer, value)
        take_out_(model, [layer for layer in layers if stacked and layer not in self.chosen])
        return len(chosen)

    def quantize_(self, model: nn.Module, layer: str, weight: Tensor) -> None:
        """Quantize one layer, and note how precise its weight was."""
        weight = as_precise(weight, self.quantization_config)
        self.precision.see(weight)
        quantize_layer_(model, layer, weight, self.quantization_config)

    def finish_(self, model: nn.Module, fresh: Collection[str] = ()) -> None:
        """What is left once the layers are there, and a note of how precise all weights were: another base can tell."""
        config = self.quantization_config
        again = config.algorithm != "gptq"  # nobody makes a calibrated one again
        for table in to_pack(model, config) if again and config.quantize_embeddings else ():
            if table is not None:
                self.precision.see(as_precise(table.weight.detach(), config))
        finish_(model, config, self.targets, fresh)
        if again:
            config.noted_dtype = self.precision.dtype

    def get_quantize_ops(self) -> Any:
        """The same as an operation of transformers 5's loading pipeline."""
        from qbl_trl.quant.hf_conversion import GroupQuantize

        return GroupQuantize(self)

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._arriving = None  # the model keeps its quantizer, and is copied with it
        if self.failure is not None:
            raise self.failure
        if self.pre_quantized:
            tie_again_(model)
        else:
            missing = self.missing if BEFORE_5 else None
            fresh = not_arrived(model, self.targets, self.quantization_config.algorithm == "gptq", missing)
            if len(fresh) == len(self.targets):
                raise nothing_arrived(model, self.targets, *files_of(folder_of(model.config), None))
            widen_(model, self.loads_as)
            if self.quantization_config.algorithm == "gptq":
                self.choose_(model)
            self.finish_(model, fresh)
            model.config.quantization_config = self.quantization_config  # type: ignore[union-attr]  # the model has a copy
        if not BEFORE_5:
            keep_packed_names_(model)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Packed tensors are checked against the headers of safetensors files, which a pickle has not."""
        if safe_serialization is False:
            raise ConfigError(
                "save_pretrained: safe_serialization=False would write files that no packed model loads from; leave it "
                "out, and safetensors are written"
            )
        return True

    def get_state_dict_and_metadata(self, model: nn.Module, *args: Any) -> tuple[dict[str, Tensor] | None, dict]:
        """What `save_pretrained` writes: the state it was given, if any, which it forgets where a model is quantized.

        Raises:
            ConfigError: if adapters wrap layers, whose names no model would load; if the state is none of this model;
                if scales were cast, or layers are offloaded that transformers cannot bring back (before 5, buffers).
        """
        adapter_alone = getattr(model, "_hf_peft_config_loaded", False)  # is saved by transformers then
        if not adapter_alone:
            check_types(model)
            lost = BEFORE_5 and any(m.scales.is_meta for m in model.modules() if isinstance(m, PackedWeight))
            if lost or not hasattr(model, "hf_device_map"):  # by which it finds what was dispatched
                check_present(model, "save_pretrained")
            wrapped = next((name for name, m in model.named_modules() if "base_layer" in m._modules), None)
            if wrapped is not None:
                raise ConfigError(
                    f"save_pretrained: an adapter sits on {wrapped}, and nothing would load such a base; save the "
                    "PeftModel (its adapter), merge(model), or model.unload()"
                )
        caller = inspect.currentframe()
        caller = None if caller is None else caller.f_back
        called = {} if caller is None or caller.f_code.co_name != "save_pretrained" else caller.f_locals
        given = called.get("state_dict")
        if not given or adapter_alone or not called.get("is_main_process", True):
            return given or None, {}  # nothing of it, or no base, is written
        given = {_AROUND.sub("", name): tensor for name, tensor in given.items()}
        lacking = next((name for name in expected_tensors(model) if name not in given), None)
        if lacking is not None:
            raise ConfigError(f"save_pretrained: state_dict lacks {lacking!r}, a tensor of this packed model")
        return given, {}

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """True, so that a trainer accepts the base before a callback has placed adapters on it."""
        return True

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> Any:
        """The float model in the dtype of this one, not (as transformers 5 has it) in that of its configuration."""
        return super().dequantize(model, **({} if BEFORE_5 else {"dtype": dtype or model.dtype}))

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        dequantize_model_(model, dtype or model.dtype)  # type: ignore[arg-type]
        for part in model.modules():
            own = vars(part.config) if isinstance(part, PreTrainedModel) and part is not model else {}
            if own is not vars(model.config):  # type: ignore[arg-type]  # transformers 4.57 clears that one alone
                own.pop("_pre_quantization_dtype", None)
        return model


def quantize_model_(model: PreTrainedModel, config: GroupQuantConfig) -> PreTrainedModel:
    """Quantize a float model that is already in memory, in place, as loading it with `config` would have.

    Returns:
        The same model, its linear layers packed and frozen.

    Raises:
        ConfigError: if the model has no layer to quantize, or is none of transformers.
    """
    if not isinstance(model, PreTrainedModel) or not isinstance(config, GroupQuantConfig):
        raise ConfigError(
            f"quantize_model_ takes a model of transformers and a GroupQuantConfig, not a {type(model).__name__} and a "
            f"{type(config).__name__}"
        )
    quantizer = GroupQuantizer(config, pre_quantized=False)
    quantizer.quantization_config = config = requested(model, config)
    quantizer.precision = Precision()
    quantizer.choose_(model)
    if config.algorithm != "gptq":
        with progress(len(quantizer.targets), "quantizing", "layer", delay=_SOON) as bar:
            for name in quantizer.targets:
                quantizer.quantize_(model, name, model.get_submodule(name).weight.data)  # type: ignore[arg-type]
                bar.update()
    quantizer.finish_(model)
    attach_(model, quantizer)
    return model


def attach_(model: PreTrainedModel, quantizer: GroupQuantizer) -> None:
    """Mark a model as quantized, the way `from_pretrained` marks it."""
    model.hf_quantizer = quantizer
    if not BEFORE_5:
        keep_packed_names_(model)
        for part in model.modules():
            if isinstance(part, PreTrainedModel):  # Jamba and FalconMamba call layers then that they read otherwise
                part.config._is_quantized = True
    model.is_quantized = True
    model.quantization_method = QUANT_METHOD
    model.config.quantization_config = quantizer.quantization_config
    if BEFORE_5 and not hasattr(model.config, "_pre_quantization_dtype"):  # `model.dequantize()` takes it away again
        model.config._pre_quantization_dtype = model.dtype


def describe_stored_(model: nn.Module, settings: GroupQuantConfig) -> None:
    """Write the stored formats into the configuration, so that the checkpoint says how to load it."""
    formats = {name: m.format for name, m in model.named_modules() if isinstance(m, PackedWeight)}
    if not formats:
        return
    common, layers = summarized(formats)
    stated = {**vars(common), "symmetric": common.zeros == "none", "layers": layers}
    config = GroupQuantConfig(**{**settings.to_dict(), **stated})
    attach_(model, GroupQuantizer(config, pre_quantized=True))


def register() -> None:
    """Make `quant_method: group_quant` known to transformers (once)."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(GroupQuantConfig)
        register_quantizer(QUANT_METHOD)(GroupQuantizer)
        check_chosen_files()
        refuse_resizing()
    if BEFORE_5:
        keep_stored_dtypes()
