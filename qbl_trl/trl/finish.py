"""What happens once training is over: merge, verify on real tokens, write, export, say so."""

import importlib
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.errors import MergeError, QblError, first_line
from qbl_trl.folders import new_folder
from qbl_trl.merging import merge
from qbl_trl.model_files import save_model
from qbl_trl.parity import compare, logits_of
from qbl_trl.quant.embedding import GroupQuantEmbedding
from qbl_trl.quant.head import input_table
from qbl_trl.quant.packed import PackedWeight
from qbl_trl.quant.targets import is_mixture
from qbl_trl.tokenizers import save_tokenizer
from qbl_trl.trl.layers import active_layers
from qbl_trl.trl.refusals import why_not_merged
from qbl_trl.trl.rounding import round_deltas_, rounded
from qbl_trl.wrapped import unpatched_forward, unwrap

logger = logging.getLogger(__name__)

# Of the largest logit. The layers themselves were compared in float32 by `merge`; what is left is rounding, once per
# layer, in the dtype the model computes in.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 1e-2}
_COARSE = 5e-2
_MOVED = 0.05  # of the tokens of a mixture in half precision


def merge_and_verify(
    model: nn.Module, input_ids: Tensor | None, stored: str | None = None
) -> tuple[nn.Module | None, dict[str, Any]]:
    """Merge the trained adapters and compare the two models' logits; the trained model is not changed.

    A model that does not answer to token ids alone (one of images, of sound) is compared layer by layer only, which
    `merge` does; the entry then says why under "not_compared".

    Args:
        model: the trained PeftModel, whole (not sharded).
        input_ids: (B, S) token ids to compare on, or None if the model reads none.
        stored: narrower type of the merged delta, which the trained model is then compared with likewise; or None.

    Returns:
        The merged model and the report's "merge" entry. None and the reason where no exact merge exists.

    Raises:
        MergeError: if the merged model disagrees with the trained one, or an adapter weight is not finite.
    """
    layers = active_layers(model)
    inexact = [name for name, layer in layers.items() if not layer.merges_exactly()]
    if inexact:
        reason = (
            f"{len(inexact)} layers (first: {inexact[0]}) have no exact merge: their base is no affine group base or "
            "in_factor is no multiple of its group. The adapter deploys beside its base, exactly: export_onnx(adapter)"
        )
        return None, {"exact": False, "reason": reason}
    if (why := why_not_merged(model)) is not None:
        return None, {"exact": False, "reason": why}
    start = time.perf_counter()
    merged = merge(model)
    round_deltas_(merged, stored)
    with rounded(layers, stored):
        parity, reason = _parity(model, merged, input_ids)
    if parity is None:
        logger.warning("merged layer by layer, but not compared on logits: %s", reason)
        return merged, {"exact": True, "not_compared": reason, "seconds": time.perf_counter() - start}
    tolerance = max(_TOLERANCE.get(dtype, _COARSE) for dtype in _dtypes(model))
    parity["tolerance"] = tolerance * max(parity.pop("largest_logit"), 1.0)
    largest, tokens = parity["max_abs_difference"], parity.pop("by_token")
    moved = int((tokens > parity["tolerance"]).sum())
    rounds = tolerance > _TOLERANCE[torch.float32] and is_mixture(unwrap(model))
    if rounds and 0 < moved <= max(1, _MOVED * len(tokens)) and math.isfinite(largest):
        parity["tokens_routed_elsewhere"] = moved
        logger.warning(
            "for %d of %d tokens the merged model's logits differ from the trained model's by up to %.1e (allowed "
            "here: %.1e): rounding made a router choose another expert, as it does between two batches of one model",
            *(moved, len(tokens), largest, parity["tolerance"]),
        )
    elif not largest <= parity["tolerance"]:
        raise MergeError(
            f"the merged model's logits differ from the trained model's by {largest:.1e} (allowed "
            f"here: {parity['tolerance']:.1e}); it was not written. The adapter is intact: save and deploy it with "
            "export_onnx(adapter_dir), and please report the model and the configuration"
        )
    return merged, {"exact": True, "parity": parity, "seconds": time.perf_counter() - start}


def write_merged(model: nn.Module, tokenizer: Any, folder: Path, overwrite: bool) -> None:
    """Save the merged model, and the tokenizer beside it, in one move."""
    with new_folder(folder, overwrite) as draft:
        save_model(model, draft)
        if tokenizer is not None:
            save_tokenizer(tokenizer, draft)


def export(model_dir: Path, output_dir: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """Write the ONNX graph with the package's public `export_onnx`, looked up now: training never loads ONNX.

    Returns:
        The report's "export" entry: the figures of ExportReport, with a count of layers in place of a list.
    """
    export_onnx = importlib.import_module("qbl_trl").export_onnx
    report = export_onnx(model_dir, output_dir, **options)
    figures = {name: value for name, value in report.to_dict().items() if name not in ("path", "layers", "operators")}
    return {"output": str(output_dir), "summary": str(report), "lowerings": report.lowerings(), **figures}


def sizes(model: nn.Module, merged: nn.Module | None) -> dict[str, int]:
    """Bytes: what was trained, the merged model, and the same model in 16 bits."""
    inner = unwrap(model)
    trained = sum(p.numel() * p.element_size() for p in inner.parameters() if p.requires_grad)
    found = {"adapter": trained}
    if merged is not None:
        tensors = {t.data_ptr(): t for t in [*merged.parameters(), *merged.buffers()]}
        found["merged"] = sum(t.numel() * t.element_size() for t in tensors.values())
        packed = [m for m in merged.modules() if isinstance(m, PackedWeight)]
        weights = {id(m.weight): m.in_features * m.out_features for m in packed}
        found["float16"] = 2 * sum(weights.get(id(p), p.numel()) for p in merged.parameters())
    return found


def _parity(model: nn.Module, merged: nn.Module, input_ids: Tensor | None) -> tuple[dict[str, Any] | None, str]:
    """The comparison, or None and why the trained model gave no logits for these ids."""
    trained = unwrap(model)
    if input_ids is None:
        return None, f"a {type(trained).__name__} gives no logits for token ids"
    mask = torch.ones_like(input_ids)
    with unpatched_forward(trained):
        try:
            trained_logits = logits_of(trained)(input_ids, mask)
        except Exception as error:  # whatever its forward misses; the merged model is not to blame
            why = "" if isinstance(error, QblError) else f" ({type(error).__name__}: {first_line(error)})"
            return None, f"a {type(trained).__name__} gives no logits for token ids alone{why}"
        merged_logits = logits_of(merged)(input_ids, mask)
    return _difference(trained_logits, merged_logits, mask), ""


def _difference(trained_logits: Tensor, merged_logits: Tensor, mask: Tensor) -> dict[str, Any]:
    difference = (trained_logits - merged_logits).abs()
    more = {
        "largest_logit": float(trained_logits.abs().max()),
        "by_token": difference.amax(-1).flatten(),
    }
    if trained_logits.dim() == 3:
        return {**compare(trained_logits, merged_logits, mask).to_dict(), **more}
    return {  # a classifier: one row of scores per sequence
        "tokens": mask.numel(),
        "max_abs_difference": float(difference.max()),
        "mean_abs_difference": float(difference.mean()),
        **more,
    }


def _dtypes(model: nn.Module) -> set[torch.dtype]:
    """What is computed in: the dtypes of the input embedding and of the adapters."""
    parts = [] if (table := input_table(unwrap(model))) is None else list(table.modules())
    packed = {part.like.dtype for part in parts if isinstance(part, GroupQuantEmbedding)}
    given = {p.dtype for part in parts for p in part.parameters(recurse=False) if p.is_floating_point()}
    return packed | given | {p.dtype for p in model.parameters() if p.requires_grad}
