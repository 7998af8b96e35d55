"""export_onnx: a merged model, or a model with its adapters, as a 4-bit ONNX folder that computes the same function."""

import logging
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from qbl_trl.arithmetic import plain_arithmetic, plain_defaults
from qbl_trl.errors import ExportError
from qbl_trl.folders import check_apart, check_free, folder_bytes, new_folder
from qbl_trl.onnx import companions
from qbl_trl.onnx.asked import TOLERANCE, Asked
from qbl_trl.onnx.genai import write_genai_config
from qbl_trl.onnx.making import finish, make_exact, make_gate
from qbl_trl.onnx.plan import Plan, operators
from qbl_trl.onnx.ranges import measured
from qbl_trl.onnx.report import ExportReport
from qbl_trl.onnx.rewrite import Options
from qbl_trl.parity import ParityReport
from qbl_trl.progress import progress, step
from qbl_trl.quant.calibration import batches_of, tokens_of

logger = logging.getLogger(__name__)

_FAR = 0.1  # nats per token: worth saying
_USELESS = 1.0  # nats per token: a graph that types, 8-bit activations and caches took this far is broken

_exporting = threading.RLock()


@contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Other threads wait: for as long as a model is traced, functions of torch and transformers are other ones."""
    with _exporting:
        yield


@_one_at_a_time()
@plain_arithmetic("cpu")
@plain_arithmetic("cuda")
@plain_defaults()
def export_onnx(
    model_or_path: Any,
    output_dir: str | PathLike[str],
    *,
    provider: str = "cpu",
    dtype: str | torch.dtype | None = None,
    lowering: str = "auto",
    attention: str = "auto",
    accuracy_level: int | None = None,
    prompt_accuracy_level: int | None = None,
    prompt_weights: str | None = None,
    embedding_bits: int | None = None,
    kv_cache_dtype: str | None = None,
    calibration: Iterable[Any] | None = None,
    logits: str = "all",
    max_length: int | None = None,
    tolerance: float | None = TOLERANCE,
    overwrite: bool = False,
    tokenizer: Any = None,
) -> ExportReport:
    """Write a model as an ONNX folder for ORTModelForCausalLM and ONNX Runtime GenAI, still at 4 bits.

    The folder appears whole or not at all, and only after its graph, in float32 and without 8-bit activations or an
    8-bit cache, gave the logits of the torch model. What these change, and packed embeddings, is measured. The model
    given is not changed.

    Args:
        model_or_path: a transformers model (merged), a PEFT model (its adapters stay as branches), or a folder of one.
            Of a model that reads images or sound, the text side is exported, with a warning.
        output_dir: a new or empty folder.
        provider: "cpu" or "cuda": which kernels the graph is written for.
        dtype: "float32" (default on cpu) or "float16"; on cuda "float16" (default) or "bfloat16".
        lowering: "auto" or "factored": codes and integer zero points as they are, the adapter beside them;
            "float_zero_point": the adapter inside fractional zero points; "low_rank": the adapter's own two factors.
        attention: "gqa" (GroupQueryAttention: one buffer for the cache in GenAI), "attention" (the ONNX operator, for
            heads that GroupQueryAttention does not take), "standard" (as traced), or "auto": the first that fits.
            On CPU in float32 "auto" also writes a step over a growing cache as standard operators, which copy the cache
            once instead of once per query head; an If chooses at every step, and GenAI, whose cache does not grow,
            reads a graph of its own over the same weights. GroupQueryAttention continues
            batches on CPU since ONNX Runtime 1.32: where that is installed, it is the first choice, and the graph
            needs it; before, "attention" is.
        accuracy_level: 4 lets MatMulNBits quantize activations to 8 bits on CPU: faster, not exact; reported. With
            lowering="auto" an adapter's block delta then lies beside the codes, in 8 bits; "factored" keeps it in
            float.
        prompt_accuracy_level: the same where more than one token is read at once; by default no other. 0 beside
            accuracy_level=4 reads prompts with float32 activations (an adapter's digits stay): faster from about 32
            tokens on where the processor multiplies floats well, with the weights twice in memory. 0 alone is refused:
            it would change nothing.
        prompt_weights: "int8" reads prompts on CPU by products of 8-bit integers, weights rounded once more and
            activations in 14 bits: the fastest way to a first token, and fastest on processors with AMX or VNNI. The
            folder and the session hold a byte more for every weight; not exact, reported. None multiplies the codes.
        embedding_bits: 4 or 8 packs an embedding and a head that are float, tied or not, for the graph alone: a model
            this small loses most of its bytes there, and the head is read at every step. Rounded with what the head
            reads in mind (see `calibration`). Not exact; reported.
        kv_cache_dtype: "int8" keeps keys and values in 8 bits on CPU, one scale for each feature of each key head: a
            quarter of the memory, and faster the longer the text; not exact, reported. It needs GroupQueryAttention
            and ONNX Runtime 1.32; None keeps them in the type of the graph.
        calibration: texts for the scales of that cache and the rounding of packed embeddings: batches of token ids
            (batch, tokens) without padding, or one; by default some that the model writes itself, and tokens without
            meaning.
        logits: "all" positions, or the "last" one only, as `generate` needs: the head and the end of the last layer
            then see one position.
        max_length: positions of the rotary tables; the model's own maximum by default.
        tolerance: largest logit difference allowed in float32 (less where all logits are below 1); beyond float32, a
            graph is refused once it is one nat per token away. None reports without refusing.
        overwrite: replace a folder that is not empty.
        tokenizer: a tokenizer or a folder of one; by default what lies beside the model.

    Returns:
        ExportReport; its str() is readable, to_dict() is JSON.

    Raises:
        ExportError: if a setting, a layer, or the parity gate stands against it. Nothing is written then.
        ConfigError: if a batch of `calibration` is not token ids.
    """
    asked, began = Asked.of(locals()), time.perf_counter()
    target = check_free(output_dir, overwrite, ExportError)
    check_apart(target, *companions.folders_of(model_or_path), error=ExportError)
    tokenizer = companions.check_tokenizer(tokenizer)
    texts = None if calibration is None else [tokens_of(batch) for batch in batches_of(calibration)]
    with progress(4 + bool(kv_cache_dtype), "reading the model", "step") as bar:
        held = companions.Held(model_or_path)
        plan = Plan.of(held, asked, texts)
        step(bar, "computing its logits")
        gate, tables_cost = make_gate(held, embedding_bits, plan)
        step(bar, "tracing, writing and checking the graph")
        with (
            new_folder(target, overwrite, ExportError) as folder,
            tempfile.TemporaryDirectory(dir=folder.parent, prefix=".qbl_") as side,
        ):
            exact_folder = folder if plan.is_exact else Path(side)
            exact, reports = make_exact(held, plan.exact, attention == "auto", gate, tolerance, exact_folder)
            text_config, cache = held.config.get_text_config(), None
            if plan.wanted.int8_cache:
                step(bar, "measuring its cache")
                cache = measured(exact_folder, text_config, plan.readable, texts)
            step(bar, "finishing the folder")
            wanted = replace(plan.wanted, attention=operators(exact.attention, provider))
            final, lossy = finish(held, exact, wanted, gate, folder, exact_folder, cache)
            if tolerance is not None:
                _check_of_use(lossy, asked, wanted)
            companions.write(held, model_or_path, tokenizer, folder, plan.dtype)
            write_genai_config(
                text_config, held.generation_config, folder, provider, exact.shares, plan.exact.max_length
            )
            size = folder_bytes(folder)
    plan.warn_of_settings(asked)
    _warn_of_distance("embedding_bits", tables_cost)
    _warn_of_distance("8-bit activations, weights or cache, or half precision", lossy)
    return ExportReport(
        path=str(target),
        provider=provider,
        dtype=asked.dtype,
        attention=final.attention,
        attention_reason=exact.reason,
        layers=tuple(final.layers),
        operators=final.operators,
        bytes=size,
        parity=reports[0],
        parity_cached=reports[1],
        parity_embeddings=tables_cost,
        parity_as_written=lossy,
        kv_cache_dtype=kv_cache_dtype or asked.dtype,
        fallbacks=final.fallbacks,
        seconds=time.perf_counter() - began,
    )


def _check_of_use(lossy: ParityReport | None, asked: Asked, wanted: Options) -> None:
    """Refuse a graph that types, 8-bit activations or an 8-bit cache took too far from the model."""
    if lossy is None or lossy.kl_per_token <= _USELESS:
        return
    others = {", prompts' weights in int8": wanted.int8_prompts, ", cache in int8": wanted.int8_cache}
    parts = "".join(part for part, is_so in others.items() if is_so)
    levels = f"accuracy levels {wanted.levels[: 1 if wanted.int8_prompts else 2]}"
    raise ExportError(
        f"as it was to be written ({asked.dtype}, {levels}{parts}), the graph is no longer the model: {lossy}; nothing "
        "was written. Pass tolerance=None to write it all the same"
    )


def _warn_of_distance(what: str, found: ParityReport | None) -> None:
    if found is not None and found.kl_per_token > _FAR:
        logger.warning(
            "%s: the graph is %.2g nats per token from the model, on %d tokens without meaning; measure it on text "
            "of your task with qbl_trl.verify",
            what,
            found.kl_per_token,
            found.tokens,
        )
