"""What a run says when training is over: merging and exporting take minutes."""

import json
import re

import qbl_trl
from qbl_trl.trl.callback import REPORT, QBLoRACallback
from tests.trl.runs import Exported, adapter, sft


def test_the_end_of_training_says_what_it_does_and_with_what_result(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(vars(qbl_trl), "export_onnx", lambda *args, **kwargs: Exported())
    folders = {"merged_output_dir": tmp_path / "m", "onnx_output_dir": tmp_path / "x"}
    sft(tmp_path / "run", QBLoRACallback(adapter(), **folders)).train()
    said = capsys.readouterr().out.splitlines()
    start = said.index("Merging 14 layers, and comparing the model with the trained one")
    merged, written, exporting, exported = said[start + 1 : start + 5]
    assert re.fullmatch(
        r"Merged in \d+\.\d s: largest logit difference \d\.\de-\d\d .allowed 1\.0e-04., on \d+ tokens", merged
    )
    assert re.fullmatch(rf"Merged model written to {tmp_path}/m .\d+\.\d KB.", written)
    assert exporting == f"Exporting it to {tmp_path}/x, which may take minutes"
    assert exported == (
        "Exported in 4 s (123.5 KB); largest logit difference 2.0e-06; largest logit difference as written 3.0e-02"
    )
    export = json.loads((tmp_path / "run" / REPORT).read_text())["export"]
    assert export["lowerings"] == {"MatMulNBits + block delta in 8 bits": 2}
    assert export["parity_as_written"]["max_abs_difference"] == 3e-2
    assert "layers" not in export  # one entry for each would be most of the report


def test_adapters_that_stay_beside_their_base_are_not_said_to_be_merged(tmp_path, capsys):
    sft(tmp_path, QBLoRACallback(adapter(quantization_aware=False, in_factor=2))).train()
    said = capsys.readouterr().out
    assert "Merging" not in said
    assert "Not merged: 14 layers" in said
