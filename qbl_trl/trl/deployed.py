"""What a run deploys, for its page: parity at every step from the trained model to the graph, sizes, the export."""

from collections.abc import Mapping
from html import escape
from typing import Any

from qbl_trl.trl import charts
from qbl_trl.trl.page import badge, scroll, section, size, table

_COMPARED = {
    "parity": "ONNX graph, whole texts",
    "parity_cached": "ONNX graph over its cache",
    "parity_embeddings": "embedding and head packed",
    "parity_as_written": "ONNX graph as written",
}
_HEAD = ("logits compared", "largest difference", "mean", "KL per token, nats", "same best token", "tokens")


def parity(record: dict[str, Any], history: Any) -> str:
    """How far the merged model is from the trained one, and the graph from the merged model."""
    merge, export = record["merge"], record["export"] or {}
    if merge and not merge["exact"]:
        return section("Parity", "", badge("not merged", "neutral"), f"<p>{escape(merge['reason'])}</p>")
    note = "Logits of the training model and of the merged 4-bit model on the same tokens."
    if not merge:
        return section("Parity", note, '<p class="empty">Not measured yet: training is not over.</p>')
    rows, chart = [], ""
    if "parity" in merge:
        chart = scroll(charts.decades(merge["parity"]["max_abs_difference"], merge["parity"]["tolerance"]))
        rows.append(_compared("merged model", merge["parity"]))
    else:
        chart = badge("by layers", "neutral") + f"<p>{escape(merge['not_compared'])}</p>"
    rows += [_compared(label, export[name]) for name, label in _COMPARED.items() if export.get(name)]
    if len(rows) > 1 or (rows and "parity" not in merge):
        note += " The graph is compared with the merged model, on tokens without meaning."
    probe = record["probe"]
    before = (
        f'<p class="note">Before training, {len(probe)} layers with random adapters differed from their merged form by '
        f"{max(probe.values()):.1e} of their output at most.</p>"
        if probe
        else ""
    )
    return section("Parity", note, chart, scroll(table(_HEAD, rows)) if rows else "", before, _rounded(record))


def _rounded(record: dict[str, Any]) -> str:
    """What the merged model's shift was rounded to."""
    found = record.get("rounding")
    if not found:
        return ""
    first = f", which training did from step {found['from_step']} on" if "from_step" in found else ""
    return (
        f'<p class="note">The merged shift is rounded to {escape(found["stored"])}{first}; that moves it by '
        f"{found['cost']:.1e} of its size.</p>"
    )


def sizes(record: dict[str, Any], history: Any) -> str:
    """Bars: the model in 16 bits, merged, exported, and the adapter."""
    found, export = record["sizes"], record["export"]
    if "merged" not in found:
        return ""
    half = found["float16"]
    saved = half / found["merged"]
    items = [
        ("16-bit model", float(half), size(half), "--neutral"),
        (
            "merged, 4-bit",
            float(found["merged"]),
            size(found["merged"]) + (f", {saved:.1f} times smaller" if saved >= 1.05 else ""),
            "--train",
        ),
    ]
    if export:
        items.append(("ONNX folder", float(export["bytes"]), size(export["bytes"]), "--eval"))
    items.append(("adapter alone", float(found["adapter"]), size(found["adapter"]), "--merged"))
    note = "Tensors in memory, with those that stay in float (an embedding, a head), and the exported folder on disk."
    return section("Size", note, scroll(charts.bars(items)))


def export(record: dict[str, Any], history: Any) -> str:
    """The ONNX folder: what it is for, how its layers were written, how long that took. Nothing without an export."""
    found = record["export"]
    if not found:
        return ""
    rows = [("folder", found["output"]), ("size", size(found["bytes"]))]
    if "seconds" in found:
        rows.append(("exported in", f"{found['seconds']:.0f} s"))
    if "provider" in found:
        cache = found["kv_cache_dtype"]
        rows.append(
            ("made for", f"{found['provider']}, {found['dtype']}" + f", cache in {cache}" * (cache != found["dtype"]))
        )
        reason = found["attention_reason"]
        rows.append(("attention", found["attention"] + (f" ({reason})" if reason else "")))
    rows += [
        (f"{count} {'layer' if count == 1 else 'layers'}", how.removesuffix(" + none"))
        for how, count in found.get("lowerings", {}).items()
    ]
    rows += [("would fall back to the CPU", fallback) for fallback in found.get("fallbacks", ())]
    return section("ONNX export", "The graph that was written when training ended.", table(("", ""), rows))


def _compared(label: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of numbers as text; a classifier has no tokens to agree on."""
    agreement = f"{found['top1_agreement']:.2%}" if "top1_agreement" in found else "-"
    kl = f"{found['kl_per_token']:.1e}" if "kl_per_token" in found else "-"
    largest, mean = (f"{found[name]:.1e}" for name in ("max_abs_difference", "mean_abs_difference"))
    return label, largest, mean, kl, agreement, str(found["tokens"])
