"""write_report: a training run as one self-contained HTML page, from what the callback wrote down."""

import json
import os
import re
from collections.abc import Sequence
from html import escape
from itertools import takewhile
from numbers import Real
from pathlib import Path
from typing import Any

from qbl_trl.errors import ConfigError
from qbl_trl.folders import new_file
from qbl_trl.trl import charts
from qbl_trl.trl.charts import Line
from qbl_trl.trl.deployed import export, parity, sizes
from qbl_trl.trl.page import badge, facts, page, scroll, section, size, table
from qbl_trl.trl.run_record import REPORT, SCHEMA

PAGE = "qblora_report.html"
_HALF = 460.0  # width of a chart that shares its row
_AGAIN = "run the training again, or delete the file"


def write_report(run_dir: str | os.PathLike[str]) -> Path:
    """Write RUN_DIR/qblora_report.html from RUN_DIR/qblora_report.json; a run that is not finished is shown so far.

    Raises:
        ConfigError: if the folder holds no report, a damaged one, or one of another version.
    """
    folder = Path(run_dir)
    folder = folder.parent if folder.name == REPORT else folder
    record = _read(folder / REPORT)
    try:
        html = render(record)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{folder / REPORT} is not whole ({error!r}); {_AGAIN}") from error
    target = folder / PAGE
    with new_file(target) as draft:
        draft.write_text(html, encoding="utf-8")
    return target


def render(record: dict[str, Any]) -> str:
    """The page of one report; nothing in it is fetched from elsewhere."""
    history = record["log_history"]
    body = "".join(
        part(record, history) for part in (_head, _key_figures, _losses, _shifts, _map, parity, sizes, export, _layers)
    )
    return page(f"{_short(record['model'])}: balanced adapters", body)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"{path.parent} holds no {REPORT}; name the output_dir of a run with QBLoRACallback (it is written at the "
            "first save, or when training ends)"
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text())
        schema = record["schema"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} cannot be read ({error!r}); {_AGAIN}") from error
    if schema != SCHEMA:
        raise ConfigError(
            f"{path} is of version {schema}, this package reads version {SCHEMA}; use the one that wrote it"
        )
    return record


_EVALUATED = re.compile(r"eval_(?!merged_)(.+_)?loss")


def _series(history: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(entry["step"], float(entry[name])) for entry in history if isinstance(entry.get(name), Real)]


def _head(record: dict[str, Any], history: Any) -> str:
    layers = record["layers"]
    first = layers[0] if layers else {}
    state = (
        badge("finished", "")
        if record["finished"]
        else badge(f"step {record['step']} of {record['max_steps']}", "neutral")
    )
    p, e = (" or ".join(map(str, sorted({layer[side] for layer in layers}))) for side in ("in_factor", "out_factor"))
    kind = f"{first.get('base', '')} base, in_factor {p}, out_factor {e}, rank "
    ranks = sorted({layer["rank"] for layer in layers})
    span = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0] if ranks else '?'}"
    nominal = f"{span} (the parameters of plain rank {first.get('nominal_rank')})"
    place = f"; {record['model']}" if _short(record["model"]) != record["model"] else ""
    return f'<h1>{escape(_short(record["model"]))}{state}</h1><p class="lead">{escape(kind + nominal + place)}</p>'


def _key_figures(record: dict[str, Any], history: Any) -> str:
    items = []
    for name, label in (
        ("loss", "training loss, last"),
        ("eval_loss", "evaluation loss"),
        ("eval_merged_loss", "the same, merged"),
    ):
        points = _series(history, name)
        if points:
            items.append((f"{points[-1][1]:.3f}", label))
    trained = record["adapter"]["trainable_parameters"]
    items.append((f"{trained / 1e6:.2f} M" if trained >= 1e5 else f"{trained / 1e3:.1f} k", "trained parameters"))
    steps, seconds = record["step"] - record.get("first_step", 0), record["seconds"]
    if steps > 0 and seconds:
        items.append((f"{seconds / steps:.2f} s", f"per step, {_processes(record['world_size'])}"))
        items.append((f"{100 * record['callback_seconds'] / seconds:.2f} %", "of it spent on metrics"))
    if "merged" in record["sizes"]:
        items.append((size(record["sizes"]["merged"]), "merged model"))
    return facts(items)


def _losses(record: dict[str, Any], history: Any) -> str:
    lines = [Line("training", "--train", _series(history, "loss")), *_evaluations(history)]
    chart = charts.line_chart(lines, x_label="step", y_label="loss")
    merged = "The merged curve is the loss of the 4-bit model that deploys; it should lie on the evaluation's."
    return section(
        "Loss",
        merged
        if any(line.dashed and line.points for line in lines)
        else "Of the training batches"
        + (", and of the evaluation." if any(line.points for line in lines[1:]) else "."),
        scroll(chart),
    )


def _evaluations(history: Any) -> list[Line]:
    """Of the one dataset, or of each of several, as it is and merged. Trainers log other things called losses."""
    matches = [(entry, match[1] or "") for entry in history for key in entry if (match := _EVALUATED.fullmatch(key))]
    found = {name for entry, name in matches if f"eval_{name}runtime" in entry}
    lines = []
    for index, name in enumerate(sorted(found) or [""]):
        own, merged = (f"--k{index % 6}",) * 2 if name else ("--eval", "--merged")
        of = f" {name.removesuffix('_')}" if name else ""
        lines.append(Line(f"evaluation{of}", own, _series(history, f"eval_{name}loss"), marks=True))
        again = _series(history, f"eval_merged_{name}loss")
        lines.append(Line(f"merged{of}", merged, again, marks=True, dashed=True))
    return lines


def _shifts(record: dict[str, Any], history: Any) -> str:
    largest, mean = _series(history, "qbl/zero_point_shift_max"), _series(history, "qbl/zero_point_shift_mean")
    norm = _series(history, "qbl/adapter_norm")
    if not norm:
        return ""
    left = [Line("largest", "--merged", largest), Line("mean", "--train", mean)]
    ranks = sorted({key for entry in history for key in entry if key.startswith("qbl/stable_rank/")})
    right = [Line(key.rpartition("/")[2], f"--k{i}", _series(history, key)) for i, key in enumerate(ranks[:7])]
    if largest:
        note = "how far zero points moved, in code units; rounded to whole codes they would lose up to half a code"
    else:  # a base without zero points
        left, note = [Line("norm", "--train", norm)], "the norm of the weight change"
    y_label = "zero-point shift" if largest else "adapter norm"
    return section(
        "What the adapter does to the base",
        f"Left: {note}. Right: stable rank of the weight change by kind of layer; 1 means one direction does "
        "everything.",
        '<div class="two">',
        charts.line_chart(left, x_label="step", y_label=y_label, from_zero=True, width=_HALF),
        charts.line_chart(right, x_label="step", y_label="stable rank", width=_HALF),
        "</div>",
    )


def _map(record: dict[str, Any], history: Any) -> str:
    layers = [layer for layer in record["layers"] if "kind" in layer]
    if not layers:
        return ""
    shifted = any(layer.get("shift_max") is not None for layer in layers)
    key, unit = ("shift_max", "codes") if shifted else ("norm", "weight units")
    rows = list(dict.fromkeys(layer["kind"] for layer in layers))
    columns = sorted(
        {_block(layer["name"]) for layer in layers}, key=lambda block: (not block.isdigit(), block.zfill(6))
    )
    values = {(layer["kind"], _block(layer["name"])): layer[key] for layer in layers if layer.get(key) is not None}
    title = "Zero-point shift by layer" if shifted else "Size of the weight change by layer"
    note = "The largest of each layer. Rows are kinds, columns blocks from input to output; point at a cell to read it."
    return section(title, note, scroll(charts.heat_map(rows, columns, values, unit)))


def _layers(record: dict[str, Any], history: Any) -> str:
    columns = (
        "out_features",
        "in_features",
        "in_factor",
        "out_factor",
        "rank",
        "shift_max",
        "shift_mean",
        "stable_rank",
        "norm",
    )
    start = shared_start([layer["name"] for layer in record["layers"]])
    rows = [
        [layer["name"].removeprefix(start), *(_number(layer.get(column)) for column in columns)]
        for layer in record["layers"]
    ]
    head = ("layer", "N", "K", "p", "e", "rank", "shift, max", "mean", "stable rank", "norm")
    listing = f"<details><summary>{len(rows)} layers</summary>{scroll(table(head, rows))}</details>"
    return section(
        "Layers",
        "Shapes (N outputs, K inputs), factors (p inputs pooled, e outputs shared) and the last measurement of each."
        + (f" Names go on from {start}" if start else ""),
        listing,
    )


def shared_start(names: Sequence[str]) -> str:
    """The modules that all names begin with, with the dot behind them."""
    modules = [name.split(".")[:-1] for name in names] if len(names) > 1 else []
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*modules, strict=False))
    return "".join(f"{parts[0]}." for parts in shared)


def _short(model: str) -> str:
    """The last folder of an absolute path; a model id as it is."""
    return Path(model).name if Path(model).is_absolute() else model


def _block(name: str) -> str:
    """Index of the decoder block in a layer's name; its own name where there is none."""
    found = re.search(r"\.(\d+)\.", name)
    return found[1] if found else "-"


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def _number(value: Any) -> Any:
    return "-" if value is None else value
