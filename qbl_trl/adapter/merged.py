"""What goes with a merge of PEFT's, before and after: tied heads come apart, and the model says what it holds."""

import warnings

from torch import nn

from qbl_trl.adapter.mergeable import MergesIntoBase
from qbl_trl.adapter.recorded import quantization
from qbl_trl.config import GroupQuantConfig
from qbl_trl.errors import MergeError
from qbl_trl.quant.head import set_apart_, untie_changed_head_
from qbl_trl.quant.hf_quantizer import describe_stored_


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
    for layer in model.modules():
        if isinstance(layer, MergesIntoBase):
            table = set_apart_(model, layer.get_base_layer())  # type: ignore[no-untyped-call]
            if table is not None:
                layer.apart_from = (table,)


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
