"""What an export will write, decided before any work: the exact graph, and the graph that was asked for."""

import logging
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from qbl_trl.errors import ExportError
from qbl_trl.model_files import check_generation
from qbl_trl.onnx.asked import Asked
from qbl_trl.onnx.branches import choose_branches
from qbl_trl.onnx.companions import Held, max_positions, warn_of_towers
from qbl_trl.onnx.digits import layout_for
from qbl_trl.onnx.group_query import takes_query_lengths
from qbl_trl.onnx.layers import DenseBase, GroupBase
from qbl_trl.onnx.packed_embeddings import check_tables
from qbl_trl.onnx.ranges import check_texts
from qbl_trl.onnx.rewrite import Options
from qbl_trl.onnx.rotary import steady_length
from qbl_trl.onnx.trace import check_supported
from qbl_trl.onnx.weights import with_whole_zeros

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The graphs of one export.

    Attributes:
        dtype: float type of the graph that is kept.
        exact: in float32 and without anything rounded, for the parity gate.
        wanted: as it was asked for.
        readable: tokens that the model reads before its positions change with the length.
        texts: token ids (B, S) of the calibration; None: the model's own.
        bases: kinds of linear layers. No layer is kept: it would keep the model's weights.
        adapted: whether there is an adapter over any of them.
    """

    dtype: torch.dtype
    exact: Options
    wanted: Options
    readable: int
    texts: list[Tensor] | None
    bases: frozenset[type]
    adapted: bool

    @classmethod
    def of(cls, held: Held, asked: Asked, texts: list[Tensor] | None) -> Self:
        """What to write of a model.

        Raises:
            ExportError: if something of the model, or a setting for this model, has no graph.
        """
        check_supported(held.decoder())
        check_generation(held.generation_config)  # it is saved beside the graph
        warn_of_towers(held.decoder())
        layers = choose_branches(held.linears(), asked.lowering)  # refuses what has no factors any more
        bases = frozenset(type(source.base) for source in layers.values())
        adapted = any(source.branches for source in layers.values())
        del layers  # they hold the model's weights
        if asked.prompt_weights is not None and bases <= {DenseBase}:
            raise ExportError(
                f"export_onnx: prompt_weights={asked.prompt_weights!r} takes the place of 4-bit codes, and no layer of "
                "this model has any; load it with GroupQuantConfig first"
            )
        dtype: torch.dtype = getattr(torch, asked.dtype)
        exact = _exact(held, asked)
        wanted = replace(
            exact,
            dtype=dtype,
            accuracy_level=asked.accuracy_level,
            prompt_level=asked.prompt_accuracy_level if asked.prompt_weights is None else 0,
            int8_prompts=asked.prompt_weights is not None,
            digits=(asked.accuracy_level, asked.lowering, asked.provider) == (4, "auto", "cpu") and _has_digits(held),
        )
        readable = int(min(exact.max_length, steady_length(held.decoder())))
        if texts is not None:
            check_texts(texts, held.config.get_text_config().vocab_size, readable)
        if asked.embedding_bits is not None:
            check_tables(held.decoder(), asked.embedding_bits)
        return cls(dtype, exact, wanted, readable, texts, bases, adapted)

    @property
    def is_exact(self) -> bool:
        """Whether the graph that is kept has the weights of the exact one."""
        return self.dtype == torch.float32 and not self.wanted.digits

    def warn_of_settings(self, asked: Asked) -> None:
        """Say which settings changed nothing."""
        levels = (asked.accuracy_level, asked.prompt_accuracy_level)
        if 4 in levels and GroupBase not in self.bases and asked.embedding_bits is None:
            logger.warning(
                "accuracy_level=4 changed nothing: 8-bit activations are for layers of integer codes, which this model "
                "has none of"
            )
        if asked.lowering == "low_rank" and not self.adapted:
            logger.warning('lowering="low_rank" changed nothing: it keeps the factors of an adapter, and there is none')
        if self.bases <= {DenseBase}:
            logger.warning(
                "no layer of this model is quantized: the graph holds it in %s. For 4 bits load it (or the base of an "
                "adapter) with GroupQuantConfig, or give the model's folder to `qbl-trl quantize` first",
                asked.dtype,
            )


def _exact(held: Held, asked: Asked) -> Options:
    plain = (asked.attention, asked.provider, asked.dtype, asked.kv_cache_dtype) == ("auto", "cpu", "float32", None)
    return Options(
        dtype=torch.float32,
        lowering=asked.lowering,
        attention=("gqa",) if asked.kv_cache_dtype else operators(asked.attention, asked.provider),
        accuracy_level=None,
        provider=asked.provider,
        last_logits=asked.logits == "last",
        max_length=max_positions(held.decoder(), asked.max_length),
        spelled_out=asked.dtype != "float32",
        grouped_steps=plain,
        fused_recurrences=asked.attention != "standard",
        int8_cache=asked.kv_cache_dtype is not None,
    )


def operators(attention: str, provider: str) -> tuple[str, ...]:
    """What attention may become, the first that fits; none for operators as traced."""
    if attention == "auto":
        if provider == "cuda":
            return ("gqa",)
        return ("gqa", "attention") if takes_query_lengths(provider) else ("attention",)
    return () if attention == "standard" else (attention,)


def _has_digits(held: Held) -> bool:
    sources = choose_branches(held.linears(), "auto").values()
    return any(layout_for(with_whole_zeros(source)) for source in sources)
