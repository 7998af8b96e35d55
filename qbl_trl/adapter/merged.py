"""What goes with a merge of PEFT's, before and after: tied heads come apart, and the model says what it holds."""

import warnings

from torch import nn

from qbl_trl.adapter.mergeable import MergesIntoBase
from qbl_trl.adapter.recorded import quantization
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import MergeError
from qbl_trl.quant.head import give_own_tensors_, input_table, untie_changed_head_
from qbl_trl.quant.hf_quantizer import describe_stored_
from qbl_trl.quant.linear import GroupQuantLinear


def prepare_merge_(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Before a merge: one that a layer refuses is refused before the first layer is merged; then a tied head that is
    adapted gets a weight of its own, until it is unmerged.

    Raises:
        MergeError: naming the layer.
    """
    for layer_name, layer in model.named_modules():
        if isinstance(layer, MergesIntoBase):
            names = layer.active_adapters if adapter_names is None else adapter_names
            try:
                layer.check_merge([name for name in names if name not in layer.merged_adapters], safe_merge)
            except MergeError as error:
                raise MergeError(f"{layer_name}: {error}") from error
    if not any(getattr(config, "layer_replication", None) for config in getattr(model, "peft_config", {}).values()):
        check_weights_of_their_own(model, adapter_names)  # PEFT refuses replicated layers in words of their own
    for layer in model.modules():
        if isinstance(layer, MergesIntoBase) and _is_merged(layer, adapter_names):
            table = give_own_tensors_(model, layer.get_base_layer())  # type: ignore[no-untyped-call]
            if table is not None:
                layer.apart_from = (table,)


def check_weights_of_their_own(model: nn.Module, adapter_names: list[str] | None = None) -> None:
    """Refuse to merge into a float weight that other layers compute with, too: theirs would change.

    Zamba's blocks with transformers 5 are such layers. A head that is tied to an embedding is none, it can come apart.

    Args:
        adapter_names: what would be merged, the active adapters by default.

    Raises:
        MergeError: naming two layers of one weight.
    """
    table = input_table(model)
    if table is None:  # no model of transformers that ties by its configuration; what is shared comes apart
        return
    holders = dict[int, list[tuple[str, nn.Module]]]()
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None and weight is not table.weight:
            holders.setdefault(id(weight), []).append((name, module))
    for name, layer in model.named_modules():
        if not isinstance(layer, MergesIntoBase) or not _is_merged(layer, adapter_names):
            continue
        base = layer.get_base_layer()  # type: ignore[no-untyped-call]
        if isinstance(base, GroupQuantLinear):
            continue
        sharing = holders.get(id(base._parameters.get("weight")), ())
        other = next((holder for holder, module in sharing if module is not base), None)
        if other is not None:
            raise MergeError(
                f"{name} computes with the weight of {other.removesuffix('.base_layer')}, and a change of it would be "
                "in both. Leave layers that share weights out with exclude_modules, or deploy the adapter beside its "
                "base: export_onnx(model)"
            )


def _is_merged(layer: MergesIntoBase, adapter_names: list[str] | None) -> bool:
    """Whether a merge of these adapters (by default the active ones) changes a layer."""
    return not layer.rank.keys().isdisjoint(layer.active_adapters if adapter_names is None else adapter_names)


def holds_merged_adapters(model: nn.Module) -> bool:
    """Whether the base under an adapter holds what was merged into it: unloading leaves it there."""
    return any(isinstance(layer, MergesIntoBase) and layer.merged for layer in model.modules())


def describe_merged_(plain: nn.Module) -> None:
    """After a merge: the configuration says what the model holds, so that it saves and loads as it computes."""
    stored = quantization(plain)
    if isinstance(stored, GroupQuantConfig):
        describe_stored_(plain, stored)
    if hasattr(plain, "config"):
        try:
            untie_changed_head_(plain)
        except MergeError as error:  # the layers are merged by now; in memory all is well
            warnings.warn(f"the merged model computes as trained but does not save so: {error}", stacklevel=2)
