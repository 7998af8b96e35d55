"""The input embedding and the output head at few bits, tied or not (GroupQuantConfig.quantize_embeddings).

A tied pair is one table: the head is a view of the embedding's tensors and adds nothing to the saved file. One that
modules_to_not_convert names stays in float, and with it the other, if the two are tied.
"""

import inspect
import re
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.errors import ConfigError, MergeError
from qbl_trl.quant.affine import Affine
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.embedding import GroupQuantEmbedding, embedding_scale
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import empty_model, replace, same_module_name
from qbl_trl.quant.packed import BESIDE_CODES
from qbl_trl.quant.precision import as_precise
from qbl_trl.quant.targets import is_named

_WRAPPERS = re.compile(r"(modules_to_save\.[^.]+|base_layer)\.")  # of modules that train, in their names


def quantize_embeddings_(model: nn.Module, config: GroupQuantConfig, hessian: Tensor | None = None) -> None:
    """Replace the embedding and the head of a loaded float model by packed ones, in place.

    Args:
        hessian: (K, K) float32, of what the head reads: rounds it, and an embedding that is tied to it, by GPTQ.

    Raises:
        ConfigError: as `check_embeddings`.
    """
    check_embeddings(model, config)
    table, head = to_pack(model, config)
    tied = table is not None and head is not None and head.weight is table.weight
    scale = 1.0 if table is None else embedding_scale(table) or 1.0
    packed = None if table is None else packed_table(table, config, scale, hessian if tied else None)
    if table is not None and packed is not None:
        replace(model, same_module_name(model, table), packed)
    if head is not None:
        replace(model, same_module_name(model, head), packed_head(head, config, packed if tied else None, hessian))


def check_embeddings(model: nn.Module, config: GroupQuantConfig) -> None:
    """Raise ConfigError if the embedding does more than look up rows and scale them, or others share its table.

    An encoder and a decoder that do would go on reading it in float.
    """
    table, _ = to_pack(model, config)
    if table is None:
        return
    own, tied = f"{same_module_name(model, table)}.weight", getattr(model, "all_tied_weights_keys", None) or {}
    names = [
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding) and (module.weight is table.weight or tied.get(f"{name}.weight") == own)
    ]
    if len(names) > 1:
        raise ConfigError(
            f"quantize_embeddings=True packs one embedding and its head, and a {type(model).__name__} reads the same "
            f"table as {', '.join(names)}; set quantize_embeddings=False"
        )


def packed_table(
    table: nn.Embedding, config: GroupQuantConfig, scale: float = 1.0, hessian: Tensor | None = None
) -> GroupQuantEmbedding:
    """A float embedding at the bits of a configuration.

    Args:
        scale: what looked-up rows are multiplied with.
        hessian: (K, K) float32, of the inputs of a head that is tied to it: rounds with these in mind, by GPTQ.
    """
    settings = {"bits": config.bits, "group_size": config.group_size, "symmetric": config.symmetric}
    more = {"padding_idx": table.padding_idx, "dtype": table.weight.dtype, "scale": scale}
    return GroupQuantEmbedding.from_affine(_affine(table.weight, config, hessian), **settings, **more)  # type: ignore[arg-type]


def packed_head(
    head: nn.Linear, config: GroupQuantConfig, tied_to: GroupQuantEmbedding | None, hessian: Tensor | None = None
) -> GroupQuantLinear:
    """A float head at the bits of a configuration, or as a view of the embedding that it is tied to.

    Args:
        hessian: as `packed_table` takes it, of a head by itself.
    """
    if tied_to is not None:
        packed = GroupQuantLinear(head.in_features, head.out_features, format=tied_to.format, device="meta")
        tied_to.as_head_(packed)
    else:
        packed = GroupQuantLinear.from_affine(
            _affine(head.weight, config, hessian),
            bits=config.bits,
            group_size=config.group_size,
            symmetric=config.symmetric,
        )
    packed.bias = head.bias
    return packed


def empty_embeddings_(model: nn.Module, config: GroupQuantConfig, packed: Container[str] = ()) -> None:
    """Put empty packed layers in the places of the embedding and the head, before packed files are loaded.

    Args:
        packed: names of the layers that the files hold packed, whatever the configuration says.
    """
    table, head = to_pack(model, config, packed)
    empty = None
    if table is not None:
        name = same_module_name(model, table)
        empty = GroupQuantEmbedding(
            table.num_embeddings,
            table.embedding_dim,
            table.padding_idx,
            format=config.layer_format(name),
            device="meta",
            dtype=table.weight.dtype,
            scale=embedding_scale(table) or 1.0,
        )
        replace(model, name, empty)
    if head is None:
        return
    name = same_module_name(model, head)
    packed_head = GroupQuantLinear(
        head.in_features,
        head.out_features,
        bias=head.bias is not None,
        format=config.layer_format(name),
        device="meta",
        dtype=head.weight.dtype,
    )
    if empty is not None and _is_tied(model):
        empty.as_head_(packed_head)
        packed_head.embedding = (empty,)
    replace(model, name, packed_head)


def tie_again_(model: nn.Module) -> None:
    """After loading: a tied head points at the tensors the embedding has got."""
    table = input_table(model)
    head = None if table is None else model.get_output_embeddings()  # type: ignore[operator]
    if isinstance(table, GroupQuantEmbedding) and isinstance(head, GroupQuantLinear) and _is_tied(model):
        table.as_head_(head)
        head.embedding = ()


def give_own_tensors_(model: nn.Module, layer: nn.Module) -> nn.Module | None:
    """Before a tied head alone is changed: give it tensors of its own. Any other layer stays as it is.

    Returns:
        The embedding, or the layer of a model of torch alone, that shared its tensors; `share_tensors_` undoes it.
    """
    shared = layer._parameters.get("weight")
    table = input_table(model)
    if table is None:
        holders = [m for m in model.modules() if m is not layer and m._parameters.get("weight") is shared]
        table = holders[0] if holders else None
    if shared is None or table is None or layer is table or shared is not table.weight:
        return None
    if isinstance(layer, GroupQuantLinear):
        layer.weight = nn.Parameter(layer.weight.detach().clone(), requires_grad=False)
        for name in BESIDE_CODES:  # a tied head's are not saved
            value = getattr(layer, name)
            layer.register_buffer(name, None if value is None else value.clone(), persistent=True)
    else:
        layer.weight = nn.Parameter(table.weight.detach(), requires_grad=False)
    return table


def share_tensors_(table: nn.Module, head: nn.Module) -> None:
    """A head that was set apart is one table with its embedding again."""
    if isinstance(table, GroupQuantEmbedding) and isinstance(head, GroupQuantLinear):
        table.as_head_(head)
    else:
        head.weight = table.weight


def untie_changed_head_(model: nn.Module) -> None:
    """After training and merging: a head that is no longer the embedding is saved, and loaded, as a weight of its own.

    Trained with `modules_to_save`, or adapted itself, either of the pair may have moved away from the other.

    Raises:
        MergeError: as `check_parting`.
    """
    table, head = input_table(model), _pair(model)[1]
    if table is None or head is None or not _is_tied(model) or type(head.weight) is not type(table.weight):
        return
    pair: tuple[Any, Any] = head.weight, table.weight
    if (pair[0] is pair[1] or torch.equal(*pair)) and getattr(head, "delta", None) is getattr(table, "delta", None):
        return
    if not check_parting(model):
        return
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():  # type: ignore[operator, union-attr]
        config.tie_word_embeddings = False  # type: ignore[union-attr]
    if hasattr(model, "all_tied_weights_keys"):  # transformers 5 worked it out when the model was made
        vars(model)["all_tied_weights_keys"] = {}  # the head's was the only one


def check_parting(model: nn.Module) -> bool:
    """Whether the configuration ties embedding and head; if so, they are one table no more once one of them trains.

    Raises:
        MergeError: if the configuration's tie means more than this pair (an encoder's embedding, a bias).
    """
    if not _is_tied(model):
        return False
    own = _WRAPPERS.sub("", f"{same_module_name(model, _pair(model)[1])}.weight")
    found = getattr(model, "all_tied_weights_keys", None)
    if found is not None and own not in found:  # transformers 5 found two tables in the files, and left them so
        return False
    if not _class_ties(model):
        return False
    tied = found or getattr(model, "_tied_weights_keys", None) or ()
    if any(not own.endswith(key) for key in tied) or getattr(model.config, "is_encoder_decoder", False):
        raise MergeError(
            f"{own} trains apart from the embedding it is tied to, and a {type(model).__name__} ties more than "
            "these two: no configuration of it says so. Train without the head and the embedding"
        )
    return True


def _class_ties(model: nn.Module) -> bool:
    """Whether a model of this class and configuration has one table for the two; not all that say so do.

    An encoder's embedding is not that of the decoder whose head it would be.
    """
    try:
        table, head = _pair(empty_model(type(model), model.config))
    except Exception:  # of a class that takes more than a configuration
        return True
    return head is not None and head.weight is getattr(table, "weight", None)


def input_table(model: nn.Module) -> nn.Module | None:
    """The input embedding, if it is one module with a weight: models of pixels or sound have none."""
    table = _pair(model)[0]
    return table if isinstance(getattr(table, "weight", None), Tensor) else None


def output_head(model: nn.Module) -> Any:
    """The output head, if the model has one."""
    return getattr(model, "get_output_embeddings", lambda: None)()


def _is_tied(model: nn.Module) -> bool:
    config: Any = getattr(model, "config", None)  # of torch alone, none
    return bool(config and getattr(config.get_text_config(), "tie_word_embeddings", False))


def to_pack(
    model: nn.Module, config: GroupQuantConfig, packed: Container[str] = ()
) -> tuple[nn.Embedding | None, nn.Linear | None]:
    """The embedding and the head; None for what there is not, and for what stays in float."""
    table, head = _pair(model)
    no_table, no_head = (_stays(model, layer, config, packed) for layer in (table, head))
    if not (no_table or type(table) is nn.Embedding or _scales_rows(model, table)) or not (
        no_head or isinstance(head, nn.Linear | None)
    ):
        raise ConfigError(
            "quantize_embeddings=True needs an embedding that looks rows up (and scales them) and an nn.Linear head, "
            f"{type(model).__name__} has {type(table).__name__} and {type(head).__name__}; set "
            "quantize_embeddings=False"
        )
    return None if no_table else table, None if no_head else head


def _scales_rows(model: nn.Module, table: nn.Module) -> bool:
    """Whether the embedding looks rows up and scales them, and nothing else of the model reads it.

    An encoder and a decoder whose tables are apart read their own, and Gemma 4 with its towers a row of the weight.
    """
    own = {type(module) for module in model.modules() if isinstance(module, PreTrainedModel)}
    read = any("embed_tokens.weight[" in _source(kind) for kind in own)
    apart = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return not read and not apart and embedding_scale(table) is not None


def _source(kind: type) -> str:
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):  # of a class that was typed in
        return ""


def _pair(model: nn.Module) -> tuple[Any, Any]:
    """The embedding, if the model has one (of pixels or sound it has none), and the head."""
    try:
        table = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        table = None
    return table, output_head(model)


def _stays(model: nn.Module, layer: nn.Module | None, config: GroupQuantConfig, packed: Container[str]) -> bool:
    """Whether modules_to_not_convert names a layer, or the other of a tied pair; not where the files hold it packed."""
    table, head = _pair(model)
    together = (table, head) if _is_tied(model) else (layer,)
    names = [same_module_name(model, part) for part in together if part is not None]
    named = any(is_named(name, key) for name in names for key in config.modules_to_not_convert or ())
    return named and not any(name in packed for name in names)


def _affine(weight: Tensor, config: GroupQuantConfig, hessian: Tensor | None = None) -> Affine:
    # A calibrated algorithm has no inputs to calibrate a table on, but for those of a head.
    algorithm = "gptq" if hessian is not None else "rtn" if config.algorithm == "gptq" else config.algorithm
    return quantize(
        as_precise(weight.detach(), config),
        bits=config.bits,
        group_size=config.group_size,
        symmetric=config.symmetric,
        algorithm=algorithm,
        scale_dtype=SCALE_DTYPES[config.scale_dtype],
        hessian=hessian,
        quick=True,
    )
