"""What an export was asked for, checked before any work."""

import importlib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from os import PathLike
from typing import Any, Self

from qbl_trl.errors import ExportError

DTYPES = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16")}  # by provider, the default first
LOWERINGS = ("auto", "factored", "float_zero_point", "low_rank")
ATTENTIONS = ("auto", "attention", "gqa", "standard")
LEVELS = (0, 1, 2, 3, 4)
PROMPT_WEIGHTS = (None, "int8")
EMBEDDING_BITS = (None, 4, 8)
LOGITS = ("all", "last")
KV_CACHE_DTYPES = (None, "int8")
TOLERANCE = 1e-3
SHORTEST = 4  # tokens: what the parity gate reads


@dataclass(frozen=True)
class Asked:
    """The settings of `export_onnx`, whose docstring says what each is; `dtype` becomes the name of the graph's type.

    Raises:
        ExportError: naming the setting and what is allowed.
    """

    provider: str = "cpu"
    dtype: Any = None
    lowering: str = "auto"
    attention: str = "auto"
    accuracy_level: int | None = None
    prompt_accuracy_level: int | None = None
    prompt_weights: str | None = None
    embedding_bits: int | None = None
    kv_cache_dtype: str | None = None
    calibration: Any = None
    logits: str = "all"
    max_length: int | None = None
    tolerance: float | None = TOLERANCE
    tokenizer: Any = None

    @classmethod
    def of(cls, arguments: Mapping[str, Any]) -> Self:
        """Of the arguments of a call; those that are no settings of the graph are left aside."""
        return cls(**{field.name: arguments[field.name] for field in fields(cls) if field.name in arguments})

    def __post_init__(self) -> None:
        self._check_names()
        self._check_values()
        named = DTYPES[self.provider][0] if self.dtype is None else str(self.dtype).removeprefix("torch.")
        object.__setattr__(self, "dtype", named)
        self._check_kernels()
        self._check_calibration()

    def _check_names(self) -> None:
        for name, allowed in (
            ("provider", tuple(DTYPES)),
            ("lowering", LOWERINGS),
            ("attention", ATTENTIONS),
            ("accuracy_level", (None, *LEVELS)),
            ("prompt_accuracy_level", (None, *LEVELS)),
            ("prompt_weights", PROMPT_WEIGHTS),
            ("embedding_bits", EMBEDDING_BITS),
            ("kv_cache_dtype", KV_CACHE_DTYPES),
            ("logits", LOGITS),
        ):
            given = getattr(self, name)
            single = given is None or isinstance(given, (str, Integral))  # `in` would ask an array, too
            if not single or isinstance(given, bool) or given not in allowed:
                raise ExportError(
                    f"export_onnx: {name}={given!r} is not known; allowed: {', '.join(map(str, allowed))}"
                )

    def _check_values(self) -> None:
        length, tolerance, tokenizer = self.max_length, self.tolerance, self.tokenizer
        if length is not None and not (type(length) is int and length >= SHORTEST):
            raise ExportError(f"export_onnx: max_length={length!r} must be a whole number of at least {SHORTEST}")
        number = isinstance(tolerance, Real) and not isinstance(tolerance, bool)
        if tolerance is not None and not (number and 0 <= tolerance < math.inf):
            raise ExportError(f"export_onnx: tolerance={tolerance!r} must be a number of at least 0, or None")
        if not (tokenizer is None or hasattr(tokenizer, "save_pretrained") or isinstance(tokenizer, (str, PathLike))):
            raise ExportError(f"export_onnx: tokenizer takes a tokenizer, a folder or a model id, not {tokenizer!r}")

    def _check_kernels(self) -> None:
        """Whether some kernel computes in these types."""
        provider, level = self.provider, self.prompt_accuracy_level
        for name, chosen in (
            ("accuracy_level", self.accuracy_level),
            ("prompt_accuracy_level", level is not None),
            ("prompt_weights", self.prompt_weights),
        ):
            if chosen and provider != "cpu":
                raise ExportError(f"export_onnx: {name} chooses between kernels that only provider='cpu' has")
        if level is not None and self.prompt_weights is not None:
            raise ExportError(
                f"export_onnx: prompt_weights={self.prompt_weights!r} leaves prompts no codes that "
                f"prompt_accuracy_level={level} could multiply; set one of the two"
            )
        if level is not None and 4 not in (self.accuracy_level, level):
            raise ExportError(
                f"export_onnx: prompt_accuracy_level={level} changes nothing without accuracy_level=4: prompts and "
                "steps are in float32 then. Set accuracy_level=4 beside it, or leave it out"
            )
        if self.dtype not in DTYPES[provider]:
            raise ExportError(
                f"export_onnx: dtype={self.dtype} has no kernels on provider={provider!r}; allowed there: "
                f"{', '.join(DTYPES[provider])}"
            )
        if self.prompt_weights is not None and self.dtype != "float32":
            raise ExportError(
                f"export_onnx: prompt_weights={self.prompt_weights!r} is written in float32, not for dtype={self.dtype}"
            )
        if self.kv_cache_dtype is not None and (self.dtype != "float32" or self.attention not in ("auto", "gqa")):
            raise ExportError(
                f'export_onnx: kv_cache_dtype={self.kv_cache_dtype!r} is written for provider="cpu" in float32, with '
                f'attention="auto" or "gqa"; not for {self.dtype} on {provider} with attention={self.attention!r}'
            )
        if self.kv_cache_dtype is not None and not _takes_query_lengths(provider):
            raise ExportError(f"export_onnx: kv_cache_dtype={self.kv_cache_dtype!r} needs ONNX Runtime 1.32 or newer")

    def _check_calibration(self) -> None:
        texts = self.calibration
        if texts is None:
            return
        if self.kv_cache_dtype is None and self.embedding_bits is None:
            raise ExportError(
                'export_onnx: calibration is for kv_cache_dtype="int8" and embedding_bits; without them there is '
                "nothing to measure"
            )
        if isinstance(texts, str | bytes) or not isinstance(texts, Iterable):
            raise ExportError(f"export_onnx: calibration takes batches of token ids, not {texts!r}")
        for batch in texts if isinstance(texts, (list, tuple)) else ():  # what can be read twice
            importlib.import_module("qbl_trl.quant.calibration").tokens_of(batch)


def _takes_query_lengths(provider: str) -> bool:
    takes: bool = importlib.import_module("qbl_trl.onnx.group_query").takes_query_lengths(provider)
    return takes
