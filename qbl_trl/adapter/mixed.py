"""Balanced adapters beside other methods in a PeftMixedModel.

PEFT's mixed model asks a closed list of types and takes a QBLoRAConfig, a LoraConfig by birth, for plain LoRA; so the
type is put on its list, and its two steps that place a layer are told which layer to build. Its merge is ours in what
it says of tied heads and of packed layers.
"""

from typing import Any

from peft import AdaLoraConfig, LoraConfig
from peft.tuners import mixed
from peft.tuners.adalora import AdaLoraLayer
from peft.tuners.lora import LoraLayer
from peft.tuners.mixed import model as mixed_model
from peft.tuners.tuners_utils import _maybe_include_all_linear_layers
from torch import nn

from qbl_trl.adapter import placing
from qbl_trl.adapter.layer import BalancedLinear, two_kinds
from qbl_trl.adapter.merged import describe_merged_, holds_merged_adapters, prepare_merge_
from qbl_trl.config import QBLoRAConfig
from qbl_trl.peft_type import QBLORA


def register() -> None:
    """Make the method known to PEFT's mixed model (once)."""
    if QBLORA in mixed_model.COMPATIBLE_TUNER_TYPES:
        return
    mixed_model.COMPATIBLE_TUNER_TYPES = (*mixed_model.COMPATIBLE_TUNER_TYPES, QBLORA)
    mixed.COMPATIBLE_TUNER_TYPES = mixed_model.COMPATIBLE_TUNER_TYPES
    cls: Any = mixed_model.MixedModel
    create, place = cls._create_new_module, cls._create_and_replace

    def create_new_module(config: Any, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        if isinstance(config, QBLoRAConfig):
            return BalancedLinear(target, adapter_name, config=config, **kwargs)
        return create(config, adapter_name, target, **kwargs)

    def create_and_replace(self: Any, config: Any, adapter_name: str, target: nn.Module, *args: Any, **kw: Any) -> None:
        check_one_kind(config, target, args[0] if args else "")
        place(self, config, adapter_name, target, *args, **kw)

    inject, prepare = cls.inject_adapter, cls._prepare_adapter_config
    tie = cls._add_targets_to_tie

    def inject_adapter(self: Any, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        if not isinstance(self.peft_config[adapter_name], QBLoRAConfig):
            inject(self, model, adapter_name, *args, **kwargs)
            return
        with placing.whole_or_not_at_all(self, model, adapter_name):
            inject(self, model, adapter_name, *args, **kwargs)
            placing.finish_(model, adapter_name, self.peft_config[adapter_name])

    def prepare_adapter_config(self: Any, config: Any, model_config: Any) -> Any:
        prepared = prepare(config, model_config)
        if isinstance(prepared, QBLoRAConfig):
            placing.prepare_(self, prepared)
            if prepared.target_modules == "all-linear":
                # PEFT would look at the wrapper around the model, which has no output head to leave out.
                prepared = _maybe_include_all_linear_layers(prepared, self.model)
        return prepared

    def add_targets_to_tie(self: Any, config: Any, tied: list[str]) -> None:
        if isinstance(config, QBLoRAConfig):
            raise placing.not_tied(tied)
        tie(self, config, tied)

    def check_target_module(self: Any, config: Any, model: nn.Module, target_name: str) -> None:
        ours = isinstance(config, QBLoRAConfig)
        try:
            super(cls, self)._check_target_module_compatiblity(LoraConfig() if ours else config, model, target_name)
        except ValueError as error:
            if not ours:
                raise
            raise placing.never_called(model, target_name) from error

    merge_in_place, unload = cls.merge_adapter, cls._unload_and_optionally_merge

    def merge_adapter(self: Any, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        prepare_merge_(self.model, adapter_names, safe_merge)
        merge_in_place(self, adapter_names, safe_merge)

    def unload_and_optionally_merge(
        self: Any,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> Any:
        if merge:
            prepare_merge_(self.model, adapter_names, safe_merge)
        merged = merge or holds_merged_adapters(self.model)
        plain = unload(self, merge, progressbar, safe_merge, adapter_names)
        if merged:
            describe_merged_(plain)
        return plain

    cls.merge_adapter, cls._unload_and_optionally_merge = merge_adapter, unload_and_optionally_merge
    cls.inject_adapter, cls._prepare_adapter_config = inject_adapter, prepare_adapter_config
    cls._add_targets_to_tie, cls._check_target_module_compatiblity = add_targets_to_tie, check_target_module
    cls._create_new_module = staticmethod(create_new_module)
    cls._create_and_replace = create_and_replace


def check_one_kind(config: Any, target: nn.Module, name: str) -> None:
    """PEFT adds a second LoRA to the LoRA layer that is there, whatever the two configurations are."""
    low_rank = isinstance(config, LoraConfig) and not isinstance(config, AdaLoraConfig)
    held = isinstance(target, LoraLayer) and not isinstance(target, AdaLoraLayer)
    if low_rank and held and isinstance(config, QBLoRAConfig) != isinstance(target, BalancedLinear):
        raise two_kinds(name)
