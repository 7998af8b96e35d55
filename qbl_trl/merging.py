"""merge: a model with balanced adapters -> a plain transformers model, still at 4 bits, computing the same function.

The caller's model is left as it was: the merged model shares the frozen tensors of the base (codes, scales, zeros,
embeddings, norms) and owns only what changed, the block deltas. Each merged layer is compared with the layer it came
from before the model is handed out.
"""

import logging
from collections import OrderedDict
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from qbl_trl.adapter.bases import BNB4, describe, float_weight, foreign_kind
from qbl_trl.adapter.checkpointing import stop_checkpointing_
from qbl_trl.adapter.layer import BalancedLinear, adapter_layers
from qbl_trl.adapter.merged import check_weights_of_their_own
from qbl_trl.adapter.others import holds_other_adapters
from qbl_trl.adapter.recorded import quantization
from qbl_trl.arithmetic import plain_arithmetic, plain_defaults
from qbl_trl.config import SCALE_DTYPES, GroupQuantConfig
from qbl_trl.errors import CheckpointError, ConfigError, MergeError
from qbl_trl.quant.algorithms import quantize
from qbl_trl.quant.head import give_own_tensors_, untie_changed_head_
from qbl_trl.quant.hf_quantizer import describe_stored_
from qbl_trl.quant.importers.modules import take_over
from qbl_trl.quant.intact import is_offloaded
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.modules import copied, frozen, is_sharded, plain_forward_, replace
from qbl_trl.quant.renaming import forget_adapter_names_
from qbl_trl.wrapped import unwrap

logger = logging.getLogger(__name__)

# Two float32 evaluations of one sum of K products differ by rounding only; a wrong fold differs in the first digits.
_LAYER_TOLERANCE = 1e-5
_PROBE_ROWS = 4
_ROWS = TrainableTokensLayer  # of trainable_token_indices: they belong to the adapter


@torch.inference_mode(False)  # what is made here may be trained on
@plain_defaults()
def merge(peft_model: nn.Module, *, lossy: str | None = None) -> nn.Module:
    """Merge the active balanced adapters and return a plain model; the given model is not changed.

        codes, scales, zeros as they are;      delta[n // e, k // p] = (alpha / r) * pool_scale * (B A)

    Over a float base the change is added to the weight. The result saves with `save_pretrained` and loads with
    `AutoModelForCausalLM.from_pretrained` once `qbl_trl` is imported.

    Args:
        peft_model: a PeftModel, or a model with adapters injected, of transformers or of torch alone (also wrapped for
            distributed training); its active adapters are merged.
        lossy: None refuses whatever is not exact. "requantize" dequantizes such layers, adds the change and
            quantizes again to affine groups (a base that "gptq" made by "rtn": there are no calibration data); the loss
            is logged.

    Returns:
        The merged model in eval mode, every parameter frozen.

    Raises:
        ConfigError: if there is no balanced adapter, or `lossy` is unknown.
        MergeError: if a layer cannot be merged exactly (in_factor no multiple of the quantization group; a
            bitsandbytes base; weights spread over processes, or offloaded), or a merged layer does not compute what
            the trained layer computed.

    Source: QA-LoRA, arXiv:2309.14717, section 3.3; arXiv:2407.17029, section 3.
    """
    if lossy not in (None, "requantize"):
        raise ConfigError(f'merge: lossy={lossy!r} is not known; allowed: None, "requantize"')
    if not isinstance(peft_model, nn.Module):
        raise ConfigError(
            f"merge takes a model with adapters, not {peft_model!r}; of a saved adapter: `qbl-trl merge ADAPTER "
            "OUTPUT`, or PeftModel.from_pretrained(base, ADAPTER) first"
        )
    source = unwrap(peft_model)
    _check(source)
    merged = _copy_sharing_tensors(source)
    settings = _quantization_settings(merged)
    errors = [
        error
        for name, module in sorted(merged.named_modules(), key=_depth)
        if isinstance(module, BalancedLinear)
        for error in [_merge_layer_(merged, name, module, settings, lossy)]
        if error is not None
    ]
    _unwrap_the_rest_(merged)
    errors += _one_format_(merged, settings, lossy, requantized=bool(errors))
    if errors:
        logger.warning(
            "merge: %d layers were quantized again; relative weight error %.4f on average, %.4f at most",
            len(errors),
            sum(errors) / len(errors),
            max(errors),
        )
    untie_changed_head_(merged)
    for part in _described(merged):
        describe_stored_(part, settings)
    return _plain_(merged)


def _check(model: nn.Module) -> None:
    """Raise MergeError where a model as a whole does not merge, ConfigError where there is nothing to merge."""
    layers = adapter_layers(model)
    if any(holds_other_adapters(module) and not isinstance(module, _ROWS) for module in model.modules()):
        raise MergeError(
            "merge: the model also holds adapters of other PEFT methods; merge it with PEFT's merge_and_unload, or "
            "take them out first (delete_adapter(NAME))"
        )
    if any(layer.disable_adapters for layer in layers.values()):
        raise MergeError("merge: the adapters are disabled; enable them first (PeftModel.enable_adapter_layers)")
    if any(getattr(config, "layer_replication", None) for config in getattr(model, "peft_config", {}).values()):
        raise MergeError(
            "merge: the adapter replicates layers, and replicated layers share weights and do not merge; save it, and "
            "load it over its base"
        )
    if is_sharded(model):
        raise MergeError(
            "merge: the weights are spread over processes (FSDP or DeepSpeed ZeRO-3); give QBLoRACallback a "
            "merged_output_dir, which gathers them, or save the adapter and run: qbl-trl merge ADAPTER OUTPUT"
        )
    absent = next((name for name, layer in layers.items() if is_offloaded(layer.get_base_layer())), None)
    if absent is not None:
        raise MergeError(f"merge: {absent} is on no device (meta); load the model whole, without offloading")
    check_weights_of_their_own(model)


def _unwrap_the_rest_(model: nn.Module) -> None:
    """Modules in the places of what PEFT put around them: rows and whole modules that trained beside the adapters."""
    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer) and not isinstance(module, _ROWS):  # of another method, and empty
            replace(model, name, module.get_base_layer())  # type: ignore[no-untyped-call]
    _give_rows_of_their_own_(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):
            replace(model, name, module.unload_and_optionally_merge_module(True, False, None))


def _depth(named: tuple[str, nn.Module]) -> int:
    """For sorting: of two adapters around one base, as a mixed model has them, the inner one comes first."""
    return -named[0].count("base_layer")


def _described(model: nn.Module) -> list[nn.Module]:
    """The models that say how they are stored: this one, or those of transformers inside; none of torch alone."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(not around or name.startswith(f"{around}.") for around in found)
        if isinstance(module, PreTrainedModel) and not inside:
            found[name] = module
    return list(found.values()) or [model] * hasattr(model, "config")


def _copy_sharing_tensors(model: nn.Module) -> nn.Module:
    """A second set of modules over the same storage; what trains beside the adapters (biases, whole modules) is copied.

    The adapters' own matrices are only read, and gone when the merge is done.
    """
    own = {id(p) for m in model.modules() if isinstance(m, AuxiliaryTrainingWrapper) for p in m.parameters()}
    own |= {id(p) for name, p in model.named_parameters() if p.requires_grad and "lora_" not in name}

    def kept(tensor: Tensor) -> Tensor | None:
        if not isinstance(tensor, nn.Parameter):
            return tensor
        return None if id(tensor) in own else frozen(tensor)

    return copied(model, kept)


def _quantization_settings(model: nn.Module) -> GroupQuantConfig:
    current = quantization(model)
    return current if isinstance(current, GroupQuantConfig) else GroupQuantConfig()


def _merge_layer_(
    model: nn.Module, name: str, module: BalancedLinear, settings: GroupQuantConfig, lossy: str | None
) -> float | None:
    """Put the merged layer in the place of `module`; the relative weight error if it was quantized again."""
    active = [adapter for adapter in module.active_adapters if adapter in module.rank]
    if lossy and not _can_take_the_change(module):
        merged, error = _requantized(module, active, settings)
        replace(model, name, merged)
        return error
    module._forward_hooks = OrderedDict()  # the copy's: what an interrupted run left there is no part of the adapter
    try:
        module.take_over_base()
        base = module.get_base_layer()
        for part, parameter in module.named_parameters():
            if part.startswith("lora_"):  # the copy's: values that were rounded once are not rounded again
                parameter.data = parameter.data.float()
        if module.merged and isinstance(base, GroupQuantLinear):  # in part: what was merged, and all that is active
            active = [*module.merged_adapters, *(name for name in active if name not in module.merged_adapters)]
            module.unmerge()
            module._active_adapter = active  # type: ignore[assignment]  # PEFT holds a name or a list of them
        give_own_tensors_(model, base)
        probe = _probe(module)
        module.merge(safe_merge=True, adapter_names=[a for a in active if a not in module.merged_adapters])
        _check_layer(base, probe)
    except MergeError as error:
        raise MergeError(f"{name}: {error}") from error
    replace(model, name, base)
    return None


def _give_rows_of_their_own_(model: nn.Module) -> None:
    """Where rows of an embedding and of the head that is tied to it were trained apart, each gets a table to add to."""
    seen = set[int]()
    for module in model.modules():
        if isinstance(module, _ROWS) and module.tied_adapter is None:
            base: Any = module.get_base_layer()
            if id(base.weight) in seen:
                base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            seen.add(id(base.weight))


def _can_take_the_change(module: BalancedLinear) -> bool:
    """Whether the merge is exact; a base that holds codes of another library has given them over then."""
    if not module.merges_exactly():
        return False
    try:
        module.take_over_base()
    except MergeError:
        return False
    return True


def _probe(module: BalancedLinear) -> tuple[Tensor, Tensor] | None:
    """Random inputs and what the trained layer answers, for layers whose merge is exact in float32."""
    base = module.get_base_layer()
    if not isinstance(base, GroupQuantLinear):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, base.in_features, generator=generator, device="cpu").to(base.weight.device)
    module.eval()
    with torch.no_grad(), plain_arithmetic(x.device.type):
        return x, module(x)


def _check_layer(layer: nn.Module, probe: tuple[Tensor, Tensor] | None) -> None:
    if probe is None:
        return
    x, expected = probe
    with torch.no_grad(), plain_arithmetic(x.device.type):
        difference = float((layer(x) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not difference <= _LAYER_TOLERANCE:
        raise MergeError(
            f"the merged layer differs from the trained one by {difference:.1e} of its largest output (allowed: "
            f"{_LAYER_TOLERANCE:.0e}); the adapter or the base is damaged"
        )


def _requantized(
    module: BalancedLinear, active: list[str], settings: GroupQuantConfig
) -> tuple[GroupQuantLinear, float]:
    base = module.get_base_layer()
    left = [adapter for adapter in active if adapter not in module.merged_adapters]  # the base holds the others
    weight = sum((module.get_delta_weight(adapter).detach() for adapter in left), float_weight(base))
    return _quantize_again(weight, base, settings)


def _quantize_again(weight: Tensor, old: nn.Module, settings: GroupQuantConfig) -> tuple[GroupQuantLinear, float]:
    """The weight (N, K) in affine groups, those that it came from if any, and the relative error that this costs."""
    own = old.format if isinstance(old, GroupQuantLinear) else settings
    symmetric = settings.symmetric if own is settings else own.zeros == "none"
    kind: dict[str, Any] = {"bits": own.bits, "group_size": own.group_size, "symmetric": symmetric}
    affine = quantize(
        weight,
        **kind,
        algorithm="rtn" if settings.algorithm == "gptq" else settings.algorithm,
        scale_dtype=SCALE_DTYPES[own.scale_dtype],
    )
    bias = old.bias
    layer = GroupQuantLinear.from_affine(affine, **kind, bias=bias if isinstance(bias, Tensor) else None)
    return layer, float((layer.dequantize() - weight).norm() / weight.norm())


def _one_format_(model: nn.Module, settings: GroupQuantConfig, lossy: str | None, *, requantized: bool) -> list[float]:
    """Layers of other libraries that had no adapter: one checkpoint holds one format. Errors as in _merge_layer_."""
    errors = []
    for name, layer in list(model.named_modules()):
        kind = foreign_kind(layer)
        if kind is not None and describe(layer, name).holds_codes:
            try:
                replace(model, name, take_over(layer, kind, name))
                continue
            except CheckpointError as error:
                if not lossy:
                    raise MergeError(f'{error}. Or merge(model, lossy="requantize"), which reports its loss') from error
        elif kind not in (BNB4, "bitsandbytes 8-bit") or not requantized:
            continue
        again, loss = _quantize_again(float_weight(layer), layer, settings)
        replace(model, name, again)
        errors.append(loss)
    return errors


def _plain_(model: nn.Module) -> nn.Module:
    """Drop what training left on the model."""
    for part in model.modules():  # a model of sentence-transformers has that of transformers in it
        for name in ("peft_config", "_hf_peft_config_loaded"):
            vars(part).pop(name, None)
        forget_adapter_names_(part)
    stop_checkpointing_(model)
    config: Any = getattr(model, "config", None)
    if hasattr(config, "use_cache") and getattr(model, "can_generate", lambda: False)():  # training leaves it off
        config.use_cache = True
    text = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    if getattr(text, "output_router_logits", False):  # TRL wants them for a mixture's loss; `generate` fails over them
        text.output_router_logits = False  # type: ignore[union-attr]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return plain_forward_(model).eval()
