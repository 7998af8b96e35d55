"""What PEFT must not do with experts that are layers of their own (`qbl_trl.quant.experts`).

An adapter for each row of a batch: an expert sees tokens of all rows. And PEFT 0.21 knows that transformers 5 stacks
the experts of some models, and turns a LoRA on their layers into one on the stacked tensors, by the kind of model;
where experts are layers, nothing would answer to it. `load_adapter` of transformers 5 does so with every adapter, and
only reports the tensors that find no layer.
"""

import functools
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from qbl_trl.adapter.misplaced import check_loaded
from qbl_trl.errors import ConfigError
from qbl_trl.generation import BEFORE_5
from qbl_trl.module_names import name_here
from qbl_trl.quant.experts import Experts
from qbl_trl.quant.renaming import without_packed


def register() -> None:
    """Have PEFT and transformers leave the configuration and the tensors of such an adapter as they are."""
    if BEFORE_5:
        return
    from peft.utils import transformers_weight_conversion
    from transformers.integrations import peft as integration

    conversion: Any = transformers_weight_conversion
    loader: Any = integration
    convert_config = conversion.convert_peft_config_for_transformers
    convert_state = conversion.convert_peft_adapter_state_dict_for_transformers
    steps, load = loader.get_model_conversion_mapping, loader.PeftAdapterMixin.load_adapter

    def config_here(peft_config: Any, model: nn.Module, conversions: Any) -> None:
        if not _are_layers(model):
            convert_config(peft_config, model=model, conversions=conversions)

    def state_here(
        model: nn.Module, peft_config: Any, adapter_state_dict: dict[str, Tensor], adapter_name: str = "default"
    ) -> dict[str, Tensor]:
        if not _are_layers(model):
            converted: dict[str, Tensor] = convert_state(model, peft_config, adapter_state_dict, adapter_name)
            return converted
        own = {name.replace(f".{adapter_name}.", ".") for name in model.state_dict()}
        return {name_here(name, own): tensor for name, tensor in adapter_state_dict.items()}

    def steps_here(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
        known: list[Any] = steps(model, *args, **kwargs)
        return without_packed(known, model) if _are_layers(model) else known

    @functools.wraps(load)
    def load_here(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = kwargs.get("weight_mapping") or getattr(kwargs.get("load_config"), "weight_mapping", None)
        if given and _are_layers(self):
            kwargs["weight_mapping"] = without_packed(given, self)
        already = set(getattr(self, "peft_config", ()))
        report = load(self, *args, **kwargs)
        check_loaded(self, already, report)
        return report

    conversion.convert_peft_config_for_transformers = config_here
    conversion.convert_peft_adapter_state_dict_for_transformers = state_here
    loader.get_model_conversion_mapping = steps_here
    loader.PeftAdapterMixin.load_adapter = load_here


def _are_layers(model: nn.Module) -> bool:
    return any(isinstance(module, Experts) for module in model.modules())


def refuse_rows(model: nn.Module) -> None:
    """Raise ConfigError if an expert has an adapter: it could not tell whose rows its tokens are."""
    held = (name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer))
    found = next((name for name in held if ".experts." in name), None)
    if found is not None:
        raise ConfigError(
            f"adapter_names: {found} sees tokens of all rows of a batch that chose this expert, and cannot give each "
            "row an adapter of its own; run the rows of one adapter at a time (set_adapter)"
        )
