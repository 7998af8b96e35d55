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

from qbl_trl.adapter import checkpointing, experts, hotswap, mixed, others
from qbl_trl.adapter.balance import largest_useful_r
from qbl_trl.adapter.bnb_packed import keep_order_
from qbl_trl.adapter.checkpointing import is_checkpointing, let_inputs_require_grad
from qbl_trl.adapter.combining import CombiningModel
from qbl_trl.adapter.layer import BalancedLinear, record_placed_
from qbl_trl.adapter.merged import describe_merged_, holds_merged_adapters, prepare_merge_
from qbl_trl.adapter.misplaced import check_every_layer_is_here, targeted_in_vain, without_codes
from qbl_trl.adapter.recorded import quantization, record_base_, record_layers_
from qbl_trl.adapter.targets import resolve_all_linear
from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.module_names import name_here, pattern_here
from qbl_trl.peft_type import NAME, QBLORA
from qbl_trl.quant.head import input_table, output_head
from qbl_trl.quant.modules import same_module_name
from qbl_trl.quant.packed import PackedWeight


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
        """Write down what the base decides, so that the saved adapter says it: its format, and the pooled group."""
        prepared: QBLoRAConfig = super()._prepare_adapter_config(peft_config, model_config)
        _refuse_packed(prepared, self.model)
        modules = dict(self.model.named_modules())
        for key in ("target_modules", "exclude_modules"):
            names = getattr(prepared, key)
            if isinstance(names, set | list):
                setattr(prepared, key, {name_here(name, modules) for name in names})
        for key in ("rank_pattern", "alpha_pattern", "in_factor_pattern", "out_factor_pattern"):
            setattr(prepared, key, pattern_here(getattr(prepared, key), modules))
        chosen = resolve_all_linear(prepared, self.model)
        if chosen is not None:
            prepared.target_modules = chosen  # type: ignore[assignment]  # a set, as PEFT's own
        self._refuse_rows_of_tied_head(prepared)
        record_base_(prepared, self.model)
        if isinstance(quantization(self.model), GroupQuantConfig):
            record_layers_(prepared, self.model)
        return prepared

    def _refuse_rows_of_tied_head(self, config: QBLoRAConfig) -> None:
        """Rows that train make PEFT compute a tied head by itself, from the embedding: without adapter and bias.

        Raises:
            ConfigError: if the head has one of the two.
        """
        rows = config.trainable_token_indices
        table, head = input_table(self.model), output_head(self.model)
        if not rows or table is None or getattr(head, "weight", None) is not table.weight:
            return
        name, embedding = same_module_name(self.model, head), same_module_name(self.model, table)
        if isinstance(rows, dict) and not any(embedding.endswith(key) for key in rows):
            return
        if any(name.endswith(whole) for whole in config.modules_to_save or ()):
            return
        adapted = self._check_target_module_exists(config, name)
        if adapted or getattr(head, "bias", None) is not None:
            raise ConfigError(
                f"trainable_token_indices: {name} is one table with the embedding, and where rows of it train PEFT "
                f"computes it without its {'adapter' if adapted else 'bias'}. "
                + (f"Leave {name} out of target_modules, or train" if adapted else "Train")
                + f' the embedding and it whole: modules_to_save=["{embedding}", "{name}"]'
            )

    def _add_targets_to_tie(self, peft_config: QBLoRAConfig, tied_weight_keys: list[str]) -> None:
        """PEFT would move the adapter of a tied head to the embedding, which is no linear layer, and share it."""
        raise ConfigError(
            f"ensure_weight_tying: {', '.join(sorted(tied_weight_keys))} and the embedding are one table, and only a "
            "linear layer can hold a balanced adapter. Leave ensure_weight_tying off: the head is then adapted alone, "
            "and a merge gives it a weight of its own"
        )

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
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except NoMatchingPeftModuleError as error:
            if in_vain is None:
                raise
            raise ConfigError(f"{error} Note: {in_vain}") from error
        if in_vain is not None:
            warnings.warn(in_vain, stacklevel=2)
        keep_order_(model)
        if is_checkpointing(model):
            let_inputs_require_grad(model)  # also where no PeftModel is put around it
        layers = record_placed_(model, adapter_name, self.peft_config[adapter_name])
        if layers and not self.peft_config[adapter_name].inference_mode:
            _warn_of_surplus_rank(adapter_name, layers)

    def _check_target_module_compatiblity(self, peft_config: QBLoRAConfig, model: nn.Module, target_name: str) -> None:
        """Refuse the layers PEFT refuses for LoRA: a fused kernel (Mamba's) would read their weight, not call them."""
        try:
            super()._check_target_module_compatiblity(LoraConfig(), model, target_name)
        except ValueError as error:
            kind = getattr(getattr(model, "config", None), "model_type", None)
            raise ConfigError(
                f"{target_name}: the kernels of a {kind} model read this layer's weight without calling it, so no "
                f'adapter can act there; leave it out with exclude_modules=["{target_name}"]'
            ) from error

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


def _refuse_packed(config: QBLoRAConfig, model: nn.Module) -> None:
    """Codes have no gradient: what is packed cannot be trained whole, nor row by row.

    Raises:
        ConfigError: naming the layer.
    """
    rows = config.trainable_token_indices
    named = [(name, "modules_to_save") for name in config.modules_to_save or ()]
    named += [(name, "trainable_token_indices") for name in (rows if isinstance(rows, dict) else {})]
    found = [
        (layer, option)
        for layer, module in model.named_modules()
        for name, option in named
        if layer.endswith(name) and any(isinstance(part, PackedWeight) for part in module.modules())
    ]
    if rows and not isinstance(rows, dict) and isinstance(model.get_input_embeddings(), PackedWeight):  # type: ignore[operator]
        found.append(("the input embedding", "trainable_token_indices"))
    if found:
        layer, option = found[0]
        raise ConfigError(
            f"{option}: {layer} holds packed codes, which have no gradient; leave it out, or keep it in float with "
            "GroupQuantConfig(modules_to_not_convert=[...]) or quantize_embeddings=False"
        )


def _warn_of_surplus_rank(adapter_name: str, layers: dict[str, BalancedLinear]) -> None:
    """One warning if trained parameters go into ranks beyond the full rank of the block matrices."""
    useful: dict[str, float] = {}
    for name, layer in layers.items():
        p, e = layer.in_factor[adapter_name], layer.out_factor[adapter_name]
        inputs, outputs = layer.base.in_features, layer.base.out_features
        if layer.rank[adapter_name] > min(inputs // p, outputs // e) and layer.r[adapter_name] <= min(inputs, outputs):
            useful[name] = largest_useful_r(inputs, outputs, p, e)
    if useful:
        tightest = min(useful, key=lambda name: useful[name])
        layer, enough = layers[tightest], max(1, int(useful[tightest]))
        p, e = layer.in_factor[adapter_name], layer.out_factor[adapter_name]
        choices = ["a smaller out_factor"] * (e > 1) + [f"r={enough}"] * (enough < layer.r[adapter_name])
        block = 'or adapter="block"' if choices else 'adapter="block"'
        warnings.warn(
            f"adapter {adapter_name!r}: on {len(useful)} of {len(layers)} layers r={layer.r[adapter_name]} buys ranks "
            f"beyond the full rank of a pooled weight change; they cost parameters and reach nothing new ({tightest}: "
            f"rank {layer.rank[adapter_name]} for {layer.base.out_features // e} x {layer.base.in_features // p} "
            f"blocks). Spend them otherwise: {', '.join([*choices, block])}",
            stacklevel=2,
        )


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


register()
