"""What goes with placing an adapter, whichever tuner of PEFT places it: ours, or its mixed model.

A placing that is refused half-way leaves the model as it was.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from qbl_trl.adapter.balance import largest_useful_r
from qbl_trl.adapter.bnb_packed import keep_order_
from qbl_trl.adapter.checkpointing import is_checkpointing, let_inputs_require_grad
from qbl_trl.adapter.layer import BalancedLinear, record_placed_
from qbl_trl.adapter.recorded import quantization, record_base_, record_layers_
from qbl_trl.adapter.targets import resolve_all_linear
from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
from qbl_trl.errors import ConfigError
from qbl_trl.module_names import name_here, pattern_here
from qbl_trl.quant.head import input_table, output_head
from qbl_trl.quant.modules import same_module_name
from qbl_trl.quant.packed import PackedWeight


def prepare_(tuner: BaseTuner, config: QBLoRAConfig) -> None:
    """Write down what the base decides, so that the saved adapter says it: its format, and the pooled group.

    Raises:
        ConfigError: if the configuration asks for what the base cannot have.
    """
    model = tuner.model
    _refuse_packed(config, model)
    modules = dict(model.named_modules())
    for key in ("target_modules", "exclude_modules"):
        names = getattr(config, key)
        if isinstance(names, set | list):
            setattr(config, key, {name_here(name, modules) for name in names})
    for key in ("rank_pattern", "alpha_pattern", "in_factor_pattern", "out_factor_pattern"):
        setattr(config, key, pattern_here(getattr(config, key), modules))
    chosen = resolve_all_linear(config, model)
    if chosen is not None:
        config.target_modules = chosen  # type: ignore[assignment]  # a set, as PEFT's own
    _refuse_rows_of_tied_head(tuner, config)
    record_base_(config, model)
    if isinstance(quantization(model), GroupQuantConfig):
        record_layers_(config, model)


def finish_(model: nn.Module, adapter_name: str, config: QBLoRAConfig) -> None:
    """After its layers are there: the factors they got are written into the configuration."""
    layers = record_placed_(model, adapter_name, config)
    if layers and not config.inference_mode:
        _warn_of_surplus_rank(adapter_name, layers)
    keep_order_(model)
    if is_checkpointing(model):
        let_inputs_require_grad(model)  # also where no PeftModel is put around it


@contextmanager
def whole_or_not_at_all(tuner: Any, model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Place an adapter in the block; whatever stops it, the model has the modules and active adapters it had before.

    An adapter of the same name that was there before, of another wrapper around the model, stays.
    """
    modules = [(module, dict(module._modules)) for module in model.modules()]
    trains = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    adapted: list[Any] = [m for m, _ in modules if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    active = [(layer, layer._active_adapter, set(getattr(layer, "_adapters", ()))) for layer in adapted]
    held = {id(layer) for layer in adapted if _has(layer, adapter_name)}
    depth = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    own = getattr(tuner, "active_adapter", None)
    try:
        yield
    except BaseException:
        for layer in adapted:
            if _has(layer, adapter_name) and id(layer) not in held:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that another one is active now
                    layer.delete_adapter(adapter_name)
        for module, children in modules:  # what was put in their places, and into them, goes
            module._modules.clear()
            module._modules.update(children)
        for layer, names, known in active:
            layer._active_adapter = names
            if hasattr(layer, "_adapters"):
                layer._adapters = known
        for parameter, trained in trains:
            parameter.requires_grad_(trained)
        if depth is not None:
            model.config.num_hidden_layers = depth  # type: ignore[union-attr]  # layer_replication
        if not held:
            tuner.peft_config.pop(adapter_name, None)
        if own is not None and own != adapter_name:
            tuner.active_adapter = own
        if not hasattr(model, "peft_config") and getattr(model, "_hf_peft_config_loaded", False):
            model._hf_peft_config_loaded = False  # type: ignore[assignment]  # add_adapter of transformers says so first
        raise


def _has(layer: Any, adapter_name: str) -> bool:
    return isinstance(layer, BaseTunerLayer) and adapter_name in layer._get_available_adapters()


def not_tied(tied: list[str]) -> ConfigError:
    """PEFT would move the adapter of a tied head to the embedding, which is no linear layer, and share it."""
    return ConfigError(
        f"ensure_weight_tying: {', '.join(sorted(tied))} and the embedding are one table, and only a linear layer can "
        "hold a balanced adapter. Leave ensure_weight_tying off: the head is then adapted alone, and a merge gives it "
        "a weight of its own"
    )


def never_called(model: nn.Module, layer: str) -> ConfigError:
    """For a layer whose weight a fused kernel reads."""
    kind = getattr(getattr(model, "config", None), "model_type", None)
    return ConfigError(
        f"{layer}: the kernels of a {kind} model read this layer's weight without calling it, so no adapter can act "
        f'there; leave it out with exclude_modules=["{layer}"]'
    )


def _refuse_rows_of_tied_head(tuner: BaseTuner, config: QBLoRAConfig) -> None:
    """Rows that train make PEFT compute a tied head by itself, from the embedding: without adapter and bias.

    Raises:
        ConfigError: if the head has one of the two.
    """
    rows = config.trainable_token_indices
    table, head = input_table(tuner.model), output_head(tuner.model)
    if not rows or table is None or getattr(head, "weight", None) is not table.weight:
        return
    name, embedding = same_module_name(tuner.model, head), same_module_name(tuner.model, table)
    if isinstance(rows, dict) and not any(embedding.endswith(key) for key in rows):
        return
    if any(name.endswith(whole) for whole in config.modules_to_save or ()):
        return
    adapted = tuner._check_target_module_exists(config, name)
    if adapted or getattr(head, "bias", None) is not None:
        raise ConfigError(
            f"trainable_token_indices: {name} is one table with the embedding, and where rows of it train PEFT "
            f"computes it without its {'adapter' if adapted else 'bias'}. "
            + (f"Leave {name} out of target_modules, or train" if adapted else "Train")
            + f' the embedding and it whole: modules_to_save=["{embedding}", "{name}"]'
        )


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
