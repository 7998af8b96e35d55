"""QBLoRAModel: the PEFT tuner that places balanced adapters, and its registration.

Everything PEFT does with a LoRA model (naming, saving, several adapters, mixed batches) is inherited; what differs is
which layer is built and how adapters of compressed shape are combined.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.error import NoMatchingPeftModuleError
from peft.utils.peft_types import register_peft_method
from peft.utils.save_and_load import _validate_lora_adapter_state_dict
from torch import Tensor, nn

from qbl_trl.adapter import checkpointing, experts, hotswap, mixed, others, placing
from qbl_trl.adapter.combining import CombiningModel
from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.adapter.merged import describe_merged_, holds_merged_adapters, prepare_merge_
from qbl_trl.adapter.misplaced import check_every_layer_is_here, targeted_in_vain, without_codes
from qbl_trl.config import QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.module_names import name_here
from qbl_trl.peft_type import NAME, QBLORA


class QBLoRAModel(CombiningModel):
    """Balanced low-rank adapters over the linear layers of a model; see QBLoRAConfig."""

    tuner_layer_cls = BalancedLinear

    @staticmethod
    def _create_new_module(lora_config: QBLoRAConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> nn.Module:
        return BalancedLinear(target, adapter_name, config=lora_config, **kwargs)

    def _create_and_replace(
        self, lora_config: QBLoRAConfig, adapter_name: str, target: nn.Module, target_name: str, *args: Any, **kw: Any
    ) -> None:
        mixed.check_one_kind(lora_config, target, target_name)
        super()._create_and_replace(lora_config, adapter_name, target, target_name, *args, **kw)

    def _prepare_adapter_config(self, peft_config: QBLoRAConfig, model_config: Any) -> QBLoRAConfig:
        """PEFT's, and what the base decides."""
        prepared: QBLoRAConfig = super()._prepare_adapter_config(peft_config, model_config)
        placing.prepare_(self, prepared)
        return prepared

    def _add_targets_to_tie(self, peft_config: QBLoRAConfig, tied_weight_keys: list[str]) -> None:
        raise placing.not_tied(tied_weight_keys)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT's; another adapter for each row of a batch (`adapter_names`) is refused where layers see no rows."""
        if kwargs.get("adapter_names") is not None:
            experts.refuse_rows(self.model)
        with super()._enable_peft_forward_hooks(*args, **kwargs):
            yield

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Place an adapter, and write the factors its layers got into its configuration, as PEFT does with targets.

        Raises:
            ConfigError: if it has no layer to act on because experts are none.
        """
        in_vain = targeted_in_vain(self.peft_config[adapter_name], model)  # before PEFT words the targets anew
        with placing.whole_or_not_at_all(self, model, adapter_name):
            try:
                super().inject_adapter(model, adapter_name, *args, **kwargs)
            except NoMatchingPeftModuleError as error:
                if in_vain is None:
                    raise
                raise ConfigError(f"{error} Note: {in_vain}") from error
            if in_vain is not None:
                warnings.warn(in_vain, stacklevel=2)
            placing.finish_(model, adapter_name, self.peft_config[adapter_name])

    def _check_target_module_compatiblity(self, peft_config: QBLoRAConfig, model: nn.Module, target_name: str) -> None:
        """Refuse the layers PEFT refuses for LoRA: a fused kernel (Mamba's) would read their weight, not call them."""
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError as error:
            raise placing.never_called(model, target_name) from error

    @classmethod
    def _get_adapter_state_dict(cls, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """What is saved; PEFT warns of matrices whose shards were not gathered for LoRA alone."""
        state: dict[str, Tensor] = super()._get_adapter_state_dict(*args, **kwargs)
        _validate_lora_adapter_state_dict(state)
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """PEFT's, from the names that modules have in this version of transformers; what finds no layer is refused."""
        own = {cls._remove_adapter_name_from_key(name, adapter_name) for name in model.state_dict()}
        own |= {f"base_model.model.{name}" for name in own}
        named_here = {name_here(name, own): tensor for name, tensor in without_codes(state_dict).items()}
        check_every_layer_is_here(model, adapter_name, named_here)
        here: dict[str, Tensor] = super()._remap_adapter_state_dict_for_load(
            model=model, config=config, adapter_name=adapter_name, state_dict=named_here
        )
        return here

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *_: Any, **__: Any) -> dict[str, Tensor]:
        raise ConfigError(
            "path_initial_model_for_weight_conversion undoes what an initialization wrote into the base weight; "
            "balanced adapters write nothing into it: save without this argument"
        )

    def _check_merge_allowed(self) -> None:
        """Whether a merge is exact depends on each layer and is checked there; replicated layers never are."""
        BaseTuner._check_merge_allowed(self)
        for name, config in self.peft_config.items():
            if getattr(config, "layer_replication", None):
                raise ConfigError(f"adapter {name!r} replicates layers; replicated layers share weights, do not merge")

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """PEFT's merge and unload, after which the model says what it holds: it saves and loads as it computes."""
        if merge:
            prepare_merge_(self.model, adapter_names, safe_merge)
        merged = merge or holds_merged_adapters(self.model)
        plain: nn.Module = super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        if merged:
            describe_merged_(plain)
        return plain

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """PEFT's merge in place; a tied head that is adapted has a weight of its own until it is unmerged."""
        prepare_merge_(self.model, adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)


def register() -> None:
    """Make the method known to PEFT (once)."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    if QBLORA not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name=NAME.lower(),
            config_cls=QBLoRAConfig,
            model_cls=QBLoRAModel,
            prefix=QBLoRAModel.prefix,
            is_mixed_compatible=True,
        )
        hotswap.register()
        mixed.register()
        others.register()
        checkpointing.register()
        experts.register()
