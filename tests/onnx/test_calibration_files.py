"""`--calibration FILE`: the texts of a file, by the tokenizer beside the model, are the caller's token ids."""

import json

import numpy as np
import pytest

from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.cli import main
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.onnx.test_int8_cache import scales
from tests.test_recipes import load
from tests.tiny import tiny_llama, tiny_tokenizer

TEXTS = ["w3 w50 w7 w7 w99 w20", "w12 w64"]


@pytest.fixture
def folder(tmp_path):
    quantize_model_(tiny_llama(), GroupQuantConfig()).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "plain.txt").write_text("\n\n".join(TEXTS))
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    return tmp_path / "model"


def test_the_texts_of_a_file_set_the_scales_on_the_command_line_and_in_the_recipe(folder, tmp_path):
    ids = [tiny_tokenizer()(text, return_tensors="pt").input_ids for text in TEXTS]
    export_onnx(folder, tmp_path / "ids", kv_cache_dtype="int8", calibration=ids)
    options = ["--kv-cache-dtype", "int8", "--calibration"]
    assert main(["export", str(folder), str(tmp_path / "plain"), *options, str(tmp_path / "plain.txt")]) == 0
    recipe = load("export_onnx")
    told = {"model": folder, "output": tmp_path / "rows", "kv_cache_dtype": "int8"}
    told |= {"calibration": tmp_path / "rows.jsonl"}
    recipe.main(recipe.make_parser().parse_args([part for k, v in told.items() for part in (f"--{k}", str(v))]))
    wanted = scales(tmp_path / "ids")
    for made in ("plain", "rows"):
        found = scales(tmp_path / made)
        for name, scale in wanted.items():
            np.testing.assert_array_equal(found[name], scale)


def test_a_file_without_a_cache_of_8_bits_or_beside_no_tokenizer_is_refused(folder, tmp_path, capsys):
    command = ["export", str(folder), str(tmp_path / "out"), "--calibration", str(tmp_path / "plain.txt")]
    assert main(command) == 1
    assert "calibration is for --kv-cache-dtype int8 and --embedding-bits" in capsys.readouterr().err
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert main([*command, "--kv-cache-dtype", "int8"]) == 1
    assert "holds no tokenizer, and texts need one" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
