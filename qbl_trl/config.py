"""What a user sets: QBLoRAConfig for the adapter, GroupQuantConfig for the base. Data and validation only."""

import dataclasses
import math
import re
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import torch
from peft import LoraConfig
from transformers.utils.quantization_config import QuantizationConfigMixin

from qbl_trl.allowed import ALGORITHMS, ALLOWED_BITS, ALLOWED_GROUP_SIZES, SCALE_DTYPE_NAMES
from qbl_trl.errors import ConfigError
from qbl_trl.peft_type import QBLORA

QUANT_METHOD = "group_quant"
SCALE_DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in SCALE_DTYPE_NAMES}
POOLINGS = ("mean", "rms", "sum")

# Features of PEFT's LoraConfig that change what the adapter computes and have no balanced form (yet).
_UNSUPPORTED = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "target_parameters",
    "megatron_config",
    "alora_invocation_tokens",
    "arrow_config",
    "velora_config",
    "monteclora_config",
    "kasa_config",
    "corda_config",
    "lora_ga_config",
    "eva_config",
)


@dataclass(frozen=True)
class LayerFormat:
    """How one layer is stored; everything needed to allocate it before its values are known.

    Attributes:
        bits: width of a code, 2, 4 or 8.
        group_size: weights along K that share a scale, a power of two from 16 to 256.
        zeros: "none" (every zero point is 2**(bits-1)), "packed" (integers, packed like codes) or a float dtype name.
        scale_dtype: "float16", "bfloat16" or "float32".
        in_factor, out_factor: block of a merged delta (p, e), or None when nothing is merged.
        delta_dtype: dtype of the merged delta.
    """

    bits: int = 4
    group_size: int = 32
    zeros: str = "packed"
    scale_dtype: str = "float16"
    in_factor: int | None = None
    out_factor: int | None = None
    delta_dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.bits not in ALLOWED_BITS or not isinstance(self.bits, int):
            raise ConfigError(f"bits={self.bits!r} is not supported; allowed: {', '.join(map(str, ALLOWED_BITS))}")
        if self.group_size not in ALLOWED_GROUP_SIZES or not isinstance(self.group_size, int):
            allowed = ", ".join(map(str, ALLOWED_GROUP_SIZES))
            raise ConfigError(f"group_size={self.group_size!r} is not supported; allowed: {allowed}")
        if self.zeros not in ("none", "packed", *SCALE_DTYPES):
            raise ConfigError(f"zeros={self.zeros!r} is not known; allowed: none, packed, {', '.join(SCALE_DTYPES)}")
        for name in ("scale_dtype", "delta_dtype"):
            if getattr(self, name) not in SCALE_DTYPES:
                raise ConfigError(f"{name}={getattr(self, name)!r} is not known; allowed: {', '.join(SCALE_DTYPES)}")
        for name in ("in_factor", "out_factor"):
            factor = getattr(self, name)
            if factor is not None and (not isinstance(factor, int) or isinstance(factor, bool) or factor < 1):
                raise ConfigError(f"{name}={factor!r} of a merged delta must be a whole number of at least 1, or None")
        if (self.in_factor is None) != (self.out_factor is None):
            raise ConfigError("in_factor and out_factor of a merged delta are given together or not at all")


@dataclass
class QBLoRAConfig(LoraConfig):
    """A balanced low-rank adapter: y = W x + (lora_alpha / r) * expand_e(B (A pool_p(x))).

    Every field of `peft.LoraConfig` that is not named below keeps its meaning, with R for r where it means A's rows
    (`init_lora_weights="gaussian"`: a standard deviation of 1 / R). The rank really used is matched to
    the parameters of a plain LoRA of rank `r`: R = round(r (K + N) / (K / in_factor + N / out_factor)).

    Attributes:
        r: nominal rank, the rank of the plain LoRA with as many parameters. Default 64. R beyond min(K / p, N / e)
            reaches nothing new; placing the adapter warns of it and names an r that fits.
        lora_alpha: scale numerator, the adapter is multiplied by lora_alpha / r. Default 16.
        target_modules: names, a regular expression or "all-linear" (every linear layer but the output head; where
            `quantization_aware`, every one that the base quantized).
        in_factor: p, how many neighbouring inputs are pooled into one. Default 2, or the quantization group of the
            base when `quantization_aware`.
        out_factor: e, how many neighbouring outputs share one adapter output. Default 2, as published; when
            `quantization_aware`, 1 on the layers where 2 would raise R beyond half of full rank (a block has no rank:
            always 2). Sharing outputs buys rank: it wins while rank is scarce and loses once there is enough of it
            (ranks 1 to 8 in integration/benchmarks/RESULTS.md). Placing the adapter writes it down;
            give it where adapters of different rank are to be swapped or combined.
        quantization_aware: QA-BLoRA. Requires in_factor to be a multiple of the base's quantization group, so that
            the trained adapter merges exactly into the zero points and the merged model stays at 4 bits.
        pooling: "mean" (as published), "rms" (mean times sqrt(p), keeps the variance of the input) or "sum". The
            default is the one whose learning rate is LoRA's, whatever p and e are: the pooling table of
            integration/benchmarks/RESULTS.md.
        adapter: "low_rank" trains A and B; "block" trains the whole block matrix D (QA-HiRA), from zero.
        on_misfit: "error" raises when a factor does not divide a layer; "reduce" takes the largest that does, and
            that leaves a layer more than one adapter output.
        in_factor_pattern, out_factor_pattern: factors of single layers, by full name or regular expression, as
            `rank_pattern` names ranks. Placing the adapter writes down the factors that "reduce" or a layer's own
            group size chose, so that a saved adapter states every factor.
        base_quantization: the GroupQuantConfig, BitsAndBytesConfig or HqqConfig of the base as a dictionary, recorded
            when the adapter is placed, so that the same base can be made again from its float checkpoint.
        quantized_layers: how many of its layers were in groups, recorded likewise: transformers 4.57 keeps the experts
            of some mixtures (GPT-OSS) in one tensor, which is no layer.

    Raises:
        ConfigError: on a value outside its range or a LoraConfig feature that has no balanced form.

    Source: arXiv:2407.17029 (Q-BLoRA, QA-BLoRA; v1: QA-HiRA).
    """

    r: int = field(default=64, metadata={"help": "Nominal rank: that of the plain LoRA with as many parameters."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    target_modules: list[str] | str | None = field(
        default="all-linear", metadata={"help": "Names, a regular expression, or 'all-linear' (without the head)."}
    )
    in_factor: int | None = field(
        default=None, metadata={"help": "Inputs pooled into one; 2, or the base's group if quantization_aware."}
    )
    out_factor: int | None = field(
        default=None,
        metadata={"help": "Outputs that share one; 2, or 1 where quantization_aware finds rank enough."},
    )
    quantization_aware: bool = field(
        default=False, metadata={"help": "Align in_factor with the base's groups: exact merge at 4 bits (QA-BLoRA)."}
    )
    pooling: str = field(default="rms", metadata={"help": "Scale of the pooled input: mean, rms or sum."})
    adapter: str = field(default="low_rank", metadata={"help": "low_rank (A and B) or block (the whole D)."})
    on_misfit: str = field(
        default="error", metadata={"help": "error, or reduce to the largest factor that divides the layer."}
    )
    in_factor_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "in_factor of single layers, by full name or regular expression."}
    )
    out_factor_pattern: dict[str, int] = field(
        default_factory=dict, metadata={"help": "out_factor of single layers, by full name or regular expression."}
    )
    base_quantization: dict[str, Any] | None = field(
        default=None, metadata={"help": "How the base was quantized; recorded when the adapter is placed."}
    )
    quantized_layers: int | None = field(
        default=None, metadata={"help": "Layers that the base held in groups; recorded when the adapter is placed."}
    )

    def __post_init__(self) -> None:
        self.completed = False  # whether this very object was completed for a base; no field, so never saved
        self._check_names()
        self._check_start()  # before PEFT asks for packages and settings this start would need
        for name in ("rank_pattern", "alpha_pattern", "in_factor_pattern", "out_factor_pattern"):
            if not isinstance(getattr(self, name), dict):
                raise ConfigError(
                    f"QBLoRAConfig: {name}={getattr(self, name)!r} must be a dictionary of layer names (or regular "
                    "expressions) and numbers"
                )
            for key in getattr(self, name):
                _regular_expression(name, key)
        if not isinstance(self.quantization_aware, bool):
            raise ConfigError(f"QBLoRAConfig: quantization_aware={self.quantization_aware!r} must be true or false")
        if not isinstance(self.base_quantization, dict | None):
            raise ConfigError(
                f"QBLoRAConfig: base_quantization={self.base_quantization!r} must be a dictionary, or None"
            )
        everywhere = str(self.target_modules).lower() == "all-linear"
        if everywhere:  # PEFT takes it for a regular expression, which does not go with layers_to_transform
            self.target_modules = None
        super().__post_init__()
        if everywhere:
            self.target_modules = "all-linear"
        self.peft_type = QBLORA
        for name in ("in_factor", "out_factor"):
            if getattr(self, name) is None and not self.quantization_aware:
                setattr(self, name, 2)
        for name in ("in_factor", "out_factor", "r"):
            if name == "r" or getattr(self, name) is not None:
                setattr(self, name, _whole_number(name, getattr(self, name)))
        for name in ("lora_alpha", "lora_dropout"):
            setattr(self, name, _number(name, getattr(self, name)))
        for name in ("rank_pattern", "alpha_pattern", "in_factor_pattern", "out_factor_pattern"):
            check = _number if name == "alpha_pattern" else _whole_number
            setattr(self, name, {key: check(f"{name}[{key!r}]", given) for key, given in getattr(self, name).items()})
        if not 0 <= self.lora_dropout < 1:
            raise ConfigError(f"QBLoRAConfig: lora_dropout={self.lora_dropout!r} must be at least 0 and less than 1")
        _one_of("QBLoRAConfig", "bias", self.bias, ("none", "all", "lora_only"))
        _one_of("QBLoRAConfig", "pooling", self.pooling, POOLINGS)
        _one_of("QBLoRAConfig", "adapter", self.adapter, ("low_rank", "block"))
        _one_of("QBLoRAConfig", "on_misfit", self.on_misfit, ("error", "reduce"))
        for name in _UNSUPPORTED:
            if getattr(self, name, None):
                raise ConfigError(
                    f"QBLoRAConfig: {name} has no balanced form; leave it unset, or use peft.LoraConfig for it"
                )

    def _check_names(self) -> None:
        for name in ("target_modules", "exclude_modules", "modules_to_save"):
            given = getattr(self, name)
            if isinstance(given, str) and name != "modules_to_save":
                _regular_expression(name, given)
                continue
            if given is None:
                continue
            if not isinstance(given, list | tuple | set) or not all(isinstance(part, str) for part in given):
                instead = "" if name == "modules_to_save" else ", or one regular expression"
                raise ConfigError(f"QBLoRAConfig: {name}={given!r} must be a list of module names{instead}")

    def _check_start(self) -> None:
        if not isinstance(self.init_lora_weights, bool) and self.init_lora_weights != "gaussian":
            raise ConfigError(
                f"QBLoRAConfig: init_lora_weights={self.init_lora_weights!r} is made for factors of the whole weight, "
                "and most such starts rewrite the base, which a quantized base does not allow; use True, False or "
                "'gaussian' (to start from the quantization error see qbl_trl.adapter.initialize)"
            )

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        raise ConfigError(
            "QBLoRAConfig: custom layer classes are not supported, every balanced adapter is one layer class; use "
            "peft.LoraConfig for modules that are not linear"
        )


@dataclass(kw_only=True)
class GroupQuantConfig(QuantizationConfigMixin):
    """Affine group quantization of the linear layers: w = s (q - z), one scale and zero point per group along K.

    Attributes:
        bits: width of a code: 2, 4 or 8.
        group_size: weights that share a scale: 16, 32, 64, 128 or 256.
        symmetric: every zero point at 2**(bits-1); none is stored.
        algorithm: how scales and zero points are chosen: "rtn" (range), "mse" (clip search), "hqq" (half-quadratic)
            or "gptq" (calibrated, needs `calibration`).
        modules_to_not_convert: names or name parts of layers that stay in float, beside the output head; of a tied
            embedding and head (`quantize_embeddings`), either name keeps both.
        scale_dtype: "float16", "bfloat16" or "float32".
        quantize_embeddings: also quantize the input embedding and the output head (tied or not); "gptq" calibrates the
            head, and rounds an embedding that is not tied to one to its weights.
        calibration: for "gptq": batches of token ids, (batch, tokens) or (tokens,) integers, or mappings of the model's
            arguments; a single tensor will do. Never saved.
        zeros: how zero points are stored; set by the quantizer ("none", "packed", or a float dtype).
        in_factor, out_factor, delta_dtype: block of a merged adapter; set by `merge`.
        layers: formats of single layers that differ from the above, by full name; set by the quantizer and `merge`.
        weights_dtype: "bfloat16" or "float16": weights are rounded to it before they are quantized, as loading the
            model in it does; a base in float32 that is quantized so has the codes of that one. Not for "gptq". An
            adapter records which type its base's weights had.

    Raises:
        ConfigError: on a value outside its range or an unknown field.
    """

    bits: int = 4
    group_size: int = 32
    symmetric: bool = False
    algorithm: str = "rtn"
    modules_to_not_convert: list[str] | None = None
    scale_dtype: str = "float16"
    quantize_embeddings: bool = False
    calibration: Any = field(default=None, compare=False, repr=False)
    zeros: str | None = None
    in_factor: int | None = None
    out_factor: int | None = None
    delta_dtype: str = "float32"
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    weights_dtype: str | None = None
    quant_method: str = QUANT_METHOD

    def __post_init__(self) -> None:
        _one_of("GroupQuantConfig", "quant_method", self.quant_method, (QUANT_METHOD,))
        self.noted_dtype: str | None = None  # no field: how precise the weights were that this very base was made of
        if self.zeros is None:
            self.zeros = "none" if self.symmetric else "packed"
        for name in ("bits", "group_size", "in_factor", "out_factor"):
            if isinstance(value := getattr(self, name), Integral) and not isinstance(value, bool):
                setattr(self, name, int(value))  # of Python, as files take it, also where NumPy's was given
        _one_of("GroupQuantConfig", "algorithm", self.algorithm, ALGORITHMS)
        _one_of("GroupQuantConfig", "scale_dtype", self.scale_dtype, tuple(SCALE_DTYPES))
        _one_of("GroupQuantConfig", "weights_dtype", self.weights_dtype, (None, *SCALE_DTYPES))
        for name in ("symmetric", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"GroupQuantConfig: {name}={getattr(self, name)!r} must be true or false")
        if self.algorithm == "gptq" and self.weights_dtype is not None:
            raise ConfigError(
                'GroupQuantConfig: algorithm="gptq" rounds to what the model computes as it is loaded; load it in '
                f"{self.weights_dtype} (dtype=) instead of setting weights_dtype"
            )
        if self.algorithm == "hqq" and self.symmetric:
            raise ConfigError(
                'GroupQuantConfig: algorithm="hqq" optimises the zero point, and symmetric codes have none; set '
                'symmetric=False, or algorithm="mse"'
            )
        if not isinstance(self.layers, dict) or not all(isinstance(stored, dict) for stored in self.layers.values()):
            raise ConfigError(
                f"GroupQuantConfig: layers={self.layers!r} must be a dictionary of layer names and their formats"
            )
        kept = self.modules_to_not_convert
        if not isinstance(kept, list | tuple | set | None) or not all(isinstance(name, str) for name in kept or ()):
            raise ConfigError(f"GroupQuantConfig: modules_to_not_convert={kept!r} must be a list of names")
        self.modules_to_not_convert = sorted(kept) if isinstance(kept, set) else kept  # files have lists alone
        self.layer_format("")  # checks bits, group_size, zeros and the factors
        for name in self.layers:
            self.layer_format(name)

    def layer_format(self, name: str) -> LayerFormat:
        """How the layer of this full name is stored."""
        fields = {f.name for f in dataclasses.fields(LayerFormat)}
        common = {key: getattr(self, key) for key in fields}
        special = self.layers.get(name, {})
        unknown = set(special) - fields
        if unknown:
            raise ConfigError(f"GroupQuantConfig: layers[{name!r}] has unknown fields: {', '.join(sorted(unknown))}")
        return LayerFormat(**{**common, **special})

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> "GroupQuantConfig | tuple[GroupQuantConfig, dict[str, Any]]":
        """Rebuild from the dictionary in a saved config.json; unknown fields are refused."""
        fields = {f.name for f in dataclasses.fields(cls)}
        unknown = set(config_dict) - fields
        if unknown:
            raise ConfigError(
                f"quantization_config has unknown fields: {', '.join(sorted(unknown))}; it was written by another "
                "or a newer version of this package"
            )
        own = {key: value for key, value in kwargs.items() if key in fields}
        config = cls(**{**config_dict, **own})
        rest = {key: value for key, value in kwargs.items() if key not in fields}
        return (config, rest) if return_unused_kwargs else config

    def get(self, key: str, default: Any = None) -> Any:
        """A field by name: transformers asks what a model's configuration holds as it asks a dictionary."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: no calibration data, and not what was done before codes were chosen."""
        left_out = ("calibration", "weights_dtype")
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in left_out}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as to_dict: a checkpoint states its defaults, too."""
        return self.to_dict()


def holds_merged(recorded: dict[str, Any]) -> bool:
    """Whether the base of a recorded configuration holds a merged adapter, which quantizing again does not give."""
    formats = [recorded, *recorded.get("layers", {}).values()]
    return any(stored.get("in_factor") is not None for stored in formats)


def _whole_number(name: str, value: Any) -> int:
    """Of Python, as files take it, also where NumPy's was given."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"QBLoRAConfig: {name}={value!r} must be a whole number of at least 1")
    return int(value)


def _number(name: str, value: Any) -> int | float:
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
        raise ConfigError(f"QBLoRAConfig: {name}={value!r} must be a number")
    return int(value) if isinstance(value, Integral) else float(value)


def _regular_expression(name: str, value: Any) -> None:
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ConfigError(f"QBLoRAConfig: {name}: {value!r} is no name and no regular expression ({error})") from error


def _one_of(owner: str, name: str, value: Any, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{owner}: {name}={value!r} is not known; allowed: {', '.join(map(str, allowed))}")
