"""One whole model out of a sharded one, on the main process.

FSDP changes the class of every module it wraps and forbids copying it. So a twin without weights is made before
wrapping; afterwards every process takes part in gathering, and the main process fills the twin.
"""

from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from qbl_trl.adapter.layer import BalancedLinear
from qbl_trl.errors import MergeError
from qbl_trl.quant.modules import copied, is_sharded, on_meta

PARTITIONED = (
    "DeepSpeed ZeRO-3 keeps the weights partitioned; merge from the saved adapter: qbl-trl merge ADAPTER OUTPUT"
)


def is_partitioned(layers: dict[str, BalancedLinear]) -> bool:
    """Whether DeepSpeed ZeRO-3 holds the adapters elsewhere: their tensors are empty here."""
    return any(hasattr(p, "ds_id") for layer in layers.values() for p in layer.parameters())


def without_weights(model: nn.Module) -> nn.Module:
    """The same modules with parameters on the meta device; buffers are shared. Costs no memory."""
    return copied(model, lambda tensor: on_meta(tensor) if isinstance(tensor, nn.Parameter) else tensor)


class Gatherer:
    """Makes one whole model out of a sharded one.

    Args:
        model: the model before it is sharded; None where it never will be.
    """

    def __init__(self, model: nn.Module | None = None) -> None:
        self._twin = None if model is None else without_weights(model)  # stays so: what is gathered fills copies

    def whole(self, model: nn.Module, is_main: bool) -> nn.Module | None:
        """The model itself if it is whole; else its twin with every weight, on the CPU of the main process.

        Every process must call this.

        Returns:
            None on the other processes of a sharded run.

        Raises:
            MergeError: if the model is sharded and was not seen before.
        """
        if not is_sharded(model):
            return model
        if self._twin is None:
            raise MergeError(
                "the model is sharded and QBLoRACallback did not see it whole; pass the callback in callbacks=[...] of "
                "the trainer, or save the adapter and run: qbl-trl merge ADAPTER OUTPUT"
            )
        weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
        if not is_main:
            return None
        # Sharding moves buffers to its device in place, the twin's with them.
        made = copied(self._twin, lambda tensor: tensor if isinstance(tensor, nn.Parameter) else tensor.cpu())
        named, saved = dict(made.named_parameters(remove_duplicate=False)), made.state_dict()
        filled = {name: value for name, value in weights.items() if name in saved}  # buffers may be others by now
        made.load_state_dict(filled, strict=False, assign=True)
        for name, parameter in made.named_parameters():
            parameter.requires_grad_(named[name].requires_grad)
        return made
