"""Which in_factor and out_factor a layer really gets, and the error when none of what was asked fits."""

import re
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import Any

from peft.utils.other import get_pattern_key

from qbl_trl.adapter.balance import default_out_factor, fitting_factors
from qbl_trl.adapter.bases import Base, quantize_hint
from qbl_trl.config import QUANT_METHOD, GroupQuantConfig, QBLoRAConfig, holds_merged
from qbl_trl.errors import ConfigError


def choose_factors(base: Base, config: QBLoRAConfig, name: str) -> tuple[int, int]:
    """(p, e) for one layer.

    Args:
        base: the described base layer.
        config: in_factor (None: the commonest group of the base, or the layer's own where that does not fit),
            out_factor (None: by rank), quantization_aware, on_misfit.
        name: full name of the layer, for the error.

    Raises:
        ConfigError: if the factors do not divide the layer, or are no multiple of its quantization group although
            the training is quantization aware.
    """
    unit = 1
    if config.quantization_aware:
        if base.group_size is None:
            recorded = config.base_quantization or {}
            grouped = recorded.get("quant_method") == QUANT_METHOD
            if grouped and not config.completed:  # of a saved adapter
                alone = recorded.get("algorithm") == "gptq" or holds_merged(recorded)  # no call makes such a base again
                call = f"Load the model with from_pretrained(..., quantization_config={_as_call(recorded)}), or load"
                raise ConfigError(
                    f"{name}: the adapter was trained over a base in affine quantization groups, and this layer is "
                    f"{base.kind}. {'Load' if alone else call} the folder that this base was saved to"
                )
            advice = (
                "Leave this layer of it out of target_modules" if grouped else f"Load the model with {quantize_hint()}"
            )
            raise ConfigError(
                f"{name}: quantization_aware=True needs a base with affine quantization groups, this one is "
                f"{base.kind}. {advice}, or set quantization_aware=False"
            )
        unit = base.group_size
    usual = (config.base_quantization or {}).get("group_size") or unit
    fits = usual % unit == 0 and (config.on_misfit == "reduce" or base.in_features % usual == 0)
    wanted = config.in_factor or (usual if fits else unit)
    p = _of_side("in_factor", wanted, config.in_factor_pattern, base.in_features, unit, config.on_misfit, name)
    shared = _shared_outputs(base, config, p, name) if config.out_factor is None else config.out_factor
    e = _of_side("out_factor", shared, config.out_factor_pattern, base.out_features, 1, config.on_misfit, name)
    if e == base.out_features > 1:
        warnings.warn(
            f"{name}: out_factor={e} makes all {e} outputs share one adapter output; set out_factor_pattern for this "
            'layer, or on_misfit="reduce" to keep them apart',
            stacklevel=2,
        )
    return p, e


def _as_call(recorded: dict[str, Any]) -> str:
    """A recorded configuration as it is written in a script."""
    plain = GroupQuantConfig(weights_dtype="float32")  # nothing to round to
    asked = ("bits", "group_size", "symmetric", "algorithm", "scale_dtype", "quantize_embeddings", "weights_dtype")
    told = {name: recorded[name] for name in (*asked, "modules_to_not_convert") if name in recorded}
    shown = [f"{name}={value!r}" for name, value in told.items() if value != getattr(plain, name)]
    return f"GroupQuantConfig({', '.join(shown)})"


def record_factors_(config: QBLoRAConfig, chosen: dict[str, tuple[int, int]]) -> None:
    """Write the factors of every layer into the configuration, in place; reading it back gives the same adapter.

    Args:
        config: where a factor is still open, the most frequent one is written.
        chosen: (p, e) by full layer name.
    """
    if config.in_factor is None:
        config.in_factor = Counter(p for p, _ in chosen.values()).most_common(1)[0][0]
    if config.out_factor is None:
        config.out_factor = Counter(e for _, e in chosen.values()).most_common(1)[0][0]
    common = config.in_factor, config.out_factor
    for at, field in enumerate(("in_factor_pattern", "out_factor_pattern")):
        given = getattr(config, field)
        missing = {n: factors[at] for n, factors in chosen.items() if by_pattern(given, n, common[at]) != factors[at]}
        # A new dictionary: copies of a configuration share the old one.
        setattr(config, field, {**given, **_short({} if given else _kinds(chosen, at), missing)})


def recorded_factors(config: QBLoRAConfig, name: str) -> tuple[int | None, int | None]:
    """(p, e) that a configuration states for a layer, once its adapter was placed."""
    return (
        by_pattern(config.in_factor_pattern, name, config.in_factor),
        by_pattern(config.out_factor_pattern, name, config.out_factor),
    )


def by_pattern(pattern: dict[str, int], name: str, common: int | None) -> int | None:
    """The setting of a layer, by PEFT's rules for patterns."""
    return pattern.get(get_pattern_key(list(pattern), name), common)


def warn_of_unmatched(config: QBLoRAConfig, layers: Iterable[str]) -> None:
    """Warn of factors for layers that do not exist, as PEFT does of ranks."""
    for field in ("in_factor_pattern", "out_factor_pattern"):
        keys = getattr(config, field)
        unmatched = sorted(key for key in keys if not any(re.match(rf"(.*\.)?({key})$", name) for name in layers))
        if unmatched:
            warnings.warn(
                f"The following {field} keys did not match any targeted module and were ignored: {unmatched}.",
                RuntimeWarning,
                stacklevel=2,
            )


def _kinds(chosen: dict[str, tuple[int, int]], at: int) -> dict[str, set[int]]:
    """The factors that layers of one kind (their last name) have."""
    kinds: dict[str, set[int]] = {}
    for name, factors in chosen.items():
        kinds.setdefault(name.rpartition(".")[2], set()).add(factors[at])
    return kinds


def _short(kinds: dict[str, set[int]], missing: dict[str, int]) -> dict[str, int]:
    """One entry for a kind of layers that agree, one for each other layer: a large model has thousands."""
    pattern: dict[str, int] = {}
    for name, factor in missing.items():
        kind = name.rpartition(".")[2]
        pattern[re.escape(kind) if kinds.get(kind) == {factor} else f"^{re.escape(name)}"] = factor
    return pattern


def _shared_outputs(base: Base, config: QBLoRAConfig, p: int, name: str) -> int:
    r = by_pattern(config.rank_pattern, name, config.r)
    if config.adapter == "block":  # has no rank that could run out
        r = 0
    return default_out_factor(r or 0, base.in_features, base.out_features, p)


def _of_side(
    field: str, wanted: int, pattern: dict[str, int], features: int, unit: int, on_misfit: str, name: str
) -> int:
    key = get_pattern_key(list(pattern), name)
    if key not in pattern:
        return _fit(field, wanted, features, field.replace("factor", "features"), unit, on_misfit, name)
    return _fit(field, pattern[key], features, field.replace("factor", "features"), unit, "error", name)


def _fit(field: str, wanted: int, features: int, side: str, unit: int, on_misfit: str, name: str) -> int:
    if on_misfit == "reduce" and field == "out_factor":
        wanted = min(wanted, max(1, features // 2))  # two outputs that share one could not be told apart
    if features % wanted == 0 and wanted % unit == 0:
        return wanted
    fitting = fitting_factors(features, unit)
    smaller = [factor for factor in fitting if factor <= wanted]
    if on_misfit == "reduce" and smaller:
        return smaller[-1]
    groups = f" into whole quantization groups of {unit}" if unit > 1 else ""
    if not fitting:
        raise ConfigError(
            f"{name}: {field}={wanted} does not divide {side}={features}{groups}, and no factor does. Leave the "
            "layer out with exclude_modules, or quantize with a group_size that divides it"
        )
    shown = ", ".join(map(str, fitting[:8])) + (", ..." if len(fitting) > 8 else "")
    nearest = smaller[-1] if smaller else fitting[0]
    advice = ', or on_misfit="reduce" to use the largest that fits' if smaller else ""
    raise ConfigError(
        f"{name}: {field}={wanted} does not divide {side}={features}{groups}. "
        f"Allowed here: {shown}; set {field}={nearest}{advice}"
    )
