"""The HTML page of a run."""

import json
import re
import xml.etree.ElementTree as ElementTree

import pytest

from qbl_trl.errors import ConfigError
from qbl_trl.trl.callback import QBLoRACallback
from qbl_trl.trl.charts import Line, bars, decades, heat_map, line_chart, ticks
from qbl_trl.trl.report import PAGE, render, shared_start, write_report
from tests.trl import data
from tests.trl.runs import Exported, adapter, sft


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with evaluations of both models."""
    output = tmp_path_factory.mktemp("report") / "run"
    callback = QBLoRACallback(adapter(), eval_merged_loss=True, merged_output_dir=output / "merged")
    trainer = sft(output, callback, eval_dataset=data.texts(4), eval_strategy="steps", eval_steps=2)
    trainer.train()
    return output


@pytest.fixture
def record(run):
    return json.loads((run / "qblora_report.json").read_text())


def charts_of(page: str) -> list[ElementTree.Element]:
    """Every SVG of the page, parsed: it must be well-formed."""
    return [ElementTree.fromstring(text) for text in re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL)]


def test_the_page_is_one_file_that_fetches_nothing(run):
    page = write_report(run)
    assert page == run / PAGE
    text = page.read_text()
    assert not re.search(r"(src|href)=|url\(|@import|<script", text)
    assert "prefers-color-scheme: dark" in text
    assert not list(run.glob(".qblora*"))


def test_every_chart_is_there_and_well_formed(run):
    text = write_report(run).read_text()
    for title in ("Loss", "Zero-point shift by layer", "Parity", "Size", "Layers"):
        assert f"<h2>{title}</h2>" in text
    assert len(charts_of(text)) == 6
    for name in ("training", "evaluation", "merged"):
        assert re.search(rf">{name} \d", text), name


def test_the_heat_map_has_a_cell_for_each_layer_with_its_value(run, record):
    text = write_report(run).read_text()
    for layer in record["layers"]:
        block = re.search(r"\.(\d+)\.", layer["name"])[1]
        assert f"{layer['kind']}, block {block}: {layer['shift_max']:.3g} codes" in text


def test_a_run_that_is_not_finished_is_shown_so_far(record):
    record.update(finished=False, merge={}, sizes={}, probe={})
    text = render(record)
    assert "step 4 of 4" in text
    assert "Not measured yet" in text
    assert charts_of(text)


def test_a_run_without_a_merge_says_why(record):
    record["merge"] = {"exact": False, "reason": "the base is <b>NF4</b>"}
    assert "the base is &lt;b&gt;NF4&lt;/b&gt;" in render(record)


def test_a_base_without_zero_points_shows_the_size_of_the_change(record):
    for layer in record["layers"]:
        layer["shift_max"] = layer["shift_mean"] = None
    for entry in record["log_history"]:
        for name in [key for key in entry if "zero_point" in key]:
            del entry[name]
    page = render(record)
    assert "<h2>Size of the weight change by layer</h2>" in page
    assert "Left: the norm of the weight change. Right:" in page
    assert "zero points" not in page


def test_an_export_shows_its_figures_beside_the_merge(record):
    plain = render(record)
    assert "ONNX" not in plain
    record["export"] = {
        "output": "run/<onnx>",
        "summary": "",
        "lowerings": Exported().lowerings(),
        **Exported().to_dict(),
    }
    text = re.sub(r"<[^>]*>", " ", render(record))
    for title, largest in (
        ("merged model", None),
        ("whole texts", "2.0e-06"),
        ("its cache", "2.0e-06"),
        ("as written", "3.0e-02"),
    ):
        assert title in text
        assert largest is None or re.search(rf"{title} +{largest} +1\.0e-07 +1\.0e-09 +100\.00% +18", text)
    assert "embedding and head packed" not in text  # nothing was
    for shown in ("run/&lt;onnx&gt;", "123.5 KB", "4 s", "cpu, float32, cache in int8", "gqa", "2 layers"):
        assert shown in text, shown
    assert re.search(r"2 layers +MatMulNBits \+ block delta in 8 bits", text)
    record["export"]["lowerings"] = {"MatMulNBits + none": 1}
    assert re.search(r"1 layer +MatMulNBits +<", re.sub(r"</?t[dr][^>]*>", " ", render(record)))
    assert charts_of(render(record))


def test_an_export_of_an_earlier_report_shows_what_it_has(record):
    record["export"] = {"output": "run/onnx", "summary": "", "bytes": 5000}
    assert "5.0 KB" in render(record)


def test_the_merge_is_one_row_of_figures(record):
    parity = record["merge"]["parity"]
    text = re.sub(r"<[^>]*>", " ", render(record))
    assert re.search(
        rf"merged model +{parity['max_abs_difference']:.1e} +{parity['mean_abs_difference']:.1e} "
        rf"+{parity['kl_per_token']:.1e} +{parity['top1_agreement']:.2%} +{parity['tokens']}",
        text,
    )
    assert f"{len(record['probe'])} layers with random adapters differed from their merged form" in text


@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["a.b.layers.0.q", "a.b.layers.0.k", "a.b.layers.1.q"], "a.b.layers."),
        (["a.blocks.q", "a.blocked.q"], "a."),
        (["head", "a.b"], ""),
        (["a.b.q"], ""),
        ([], ""),
    ],
)
def test_names_of_layers_leave_out_the_modules_that_all_begin_with(names, start):
    assert shared_start(names) == start


def test_rows_of_layers_are_short_and_the_page_says_what_they_go_on_from(record):
    text = render(record)
    assert "Names go on from base_model.model.model.layers." in text
    assert ">0.self_attn.q_proj<" in text
    assert ">base_model.model.model.layers.0.self_attn.q_proj<" not in text


def test_a_model_in_a_folder_has_the_name_of_the_folder(record):
    record["model"] = "/somewhere/else/tiny-model"
    text = render(record)
    assert "<title>tiny-model: balanced adapters</title>" in text
    assert "<h1>tiny-model<" in text
    assert "; /somewhere/else/tiny-model</p>" in text


def test_names_from_outside_are_escaped(record):
    record["model"] = "<script>alert(1)</script>"
    assert "<script>" not in render(record)


def test_losses_that_are_not_finite_leave_gaps_not_errors(record):
    record["log_history"][0]["loss"] = float("nan")
    assert charts_of(render(record))


def test_a_folder_without_a_report_is_a_clear_error(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no qblora_report\.json; name the output_dir"):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "cannot be read"), ("{}", "cannot be read"), ("[]", "cannot be")]
)
def test_a_damaged_report_is_a_clear_error(tmp_path, content, message):
    (tmp_path / "qblora_report.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        write_report(tmp_path)


def test_a_report_of_another_version_is_refused(tmp_path):
    (tmp_path / "qblora_report.json").write_text('{"schema": 99}')
    with pytest.raises(ConfigError, match="is of version 99"):
        write_report(tmp_path)


@pytest.mark.parametrize(("low", "high"), [(0, 1), (2.47, 3.31), (-5, 1234), (1e-7, 3e-7), (3, 3)])
def test_ticks_are_few_and_cover_the_range(low, high):
    found = ticks(low, high, 5)
    assert found[0] <= low
    assert found[-1] >= high
    assert len(found) <= 8


def test_a_curve_of_one_point_and_one_of_none_are_drawn():
    chart = line_chart([Line("one", "--train", [(1, 2.0)]), Line("none", "--eval", [])], x_label="step", y_label="y")
    assert len(charts_of(chart)) == 1
    assert "none" not in chart
    assert "Nothing was logged" in line_chart([], x_label="step", y_label="y")


LONG = "self_attention.query_key_value"


@pytest.mark.parametrize(
    "chart",
    [
        line_chart([Line(LONG, "--k0", [(1, 2.0), (2, 1.5e-4)])], x_label="step", y_label="y", width=460),
        heat_map(["q_proj"], ["0"], {("q_proj", "0"): 214.0}, "weight units"),
        bars([("merged, 4-bit", 1e9, "1.0 GB, 3.5 times smaller", "--train"), ("adapter", 1.0, "1 B", "--merged")]),
    ],
)
def test_no_text_leaves_its_chart(chart):
    (svg,) = charts_of(chart)
    width = float(svg.get("viewBox").split()[2])
    for text in svg.iter("text"):
        if text.get("text-anchor") is None:
            assert float(text.get("x")) + 7.5 * len(text.text) <= width, text.text  # a bold letter of 13 pixels


def test_a_merged_model_that_is_not_smaller_is_not_called_so(record):
    sizes = {**record["sizes"], "float16": record["sizes"]["merged"] // 2}
    assert "times smaller" not in render({**record, "sizes": sizes})


def test_a_difference_of_zero_and_one_beyond_the_limit_can_be_drawn():
    assert "--good" in decades(0.0, 1e-4)
    assert "--bad" in decades(1e-2, 1e-4)


def test_an_empty_heat_map_says_so():
    assert "Nothing was measured" in heat_map(["a"], ["0"], {}, "codes")
    assert charts_of(heat_map(["a"], ["0"], {("a", "0"): 0.0}, "codes"))


def test_what_else_trainers_call_a_loss_is_no_dataset(record):
    record["log_history"] = [
        {"step": 1, "loss": 1.0, "eval_loss": None},
        {"step": 2, "eval_loss": 1.0, "eval_nll_loss": 3.0, "eval_per_domain_loss": [1.0, 2.0], "eval_runtime": 0.1},
    ]
    page = render(record)
    assert "evaluation nll" not in page
    assert "per_domain" not in page
