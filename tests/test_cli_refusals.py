"""What the command line says where it cannot go on: one line, with what to do, and nothing written."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertModel, LlamaForCausalLM

from qbl_trl.cli import main
from tests.tiny import tiny_llama


@pytest.fixture
def float_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


def test_what_is_quantized_already_is_not_quantized_again(float_folder, tmp_path, capsys):
    main(["quantize", str(float_folder), str(tmp_path / "q")])
    assert main(["quantize", str(tmp_path / "q"), str(tmp_path / "again"), "--bits", "8"]) == 1
    assert "is quantized already" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantize", "/no/where", "OUT"],
        ["inspect", "./nowhere"],
        ["convert", "/no/where", "OUT", "--to", "hqq"],
        ["inspect", "FLOAT", "--against", "/no/where"],
    ],
)
def test_what_is_not_there_or_not_known_is_said_in_one_line(arguments, float_folder, tmp_path, capsys):
    named = {"OUT": str(tmp_path / "out"), "FLOAT": str(float_folder)}
    assert main([named.get(argument, argument) for argument in arguments]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"qbl-trl {arguments[0]}: ")
    assert "no such file or folder" in lines[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_a_name_that_is_neither_a_folder_nor_a_model_is_said_to_be_both(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    assert main([command, "mistyped"] + ["out"] * (command == "quantize")) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"qbl-trl {command}: mistyped is no folder here, and no model that could be fetched: ")


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.embed_tokens.weight"])
def test_a_folder_that_lacks_a_float_tensor_is_neither_quantized_nor_converted(float_folder, tmp_path, capsys, lost):
    packed = str(tmp_path / "packed")
    assert main(["quantize", str(float_folder), packed]) == 0
    for folder in (str(float_folder), packed):
        file = f"{folder}/model.safetensors"
        save_file({name: value for name, value in load_file(file).items() if name != lost}, file, {"format": "pt"})
    for command in (["quantize", str(float_folder)], ["convert", packed, "--to", "hqq"]):
        assert main([command[0], command[1], str(tmp_path / "out"), *command[2:]]) == 1
        assert f"the files lack 1 of the model's tensors ({lost}, ...)" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_from_replaces_no_checkpoint_that_was_named_in_the_place_of_its_output(float_folder, tmp_path, capsys):
    before = {file.name: file.read_bytes() for file in float_folder.iterdir()}
    assert main(["quantize", str(tmp_path / "out"), "--from", str(float_folder), "--overwrite"]) == 1
    assert "holds a model that --from did not write, and stays as it is" in capsys.readouterr().err
    assert {file.name: file.read_bytes() for file in float_folder.iterdir()} == before


def test_flags_are_read_as_recipes_spell_them_too(float_folder, tmp_path, capsys):
    assert (
        main(["quantize", str(float_folder), str(tmp_path / "q"), "--group_size=16", "--scale_dtype", "float32"]) == 0
    )
    stored = json.loads((tmp_path / "q" / "config.json").read_text())["quantization_config"]
    assert (stored["group_size"], stored["scale_dtype"]) == (16, "float32")


def test_an_error_of_another_library_is_one_line_and_its_traceback_one_variable_away(
    float_folder, tmp_path, capsys, monkeypatch
):
    file = float_folder / "config.json"
    file.write_text(file.read_text().replace('"llama"', '"no_such_model"'))
    command = ["quantize", str(float_folder), str(tmp_path / "out")]
    assert main(command) == 1
    assert "ValueError: The checkpoint you are trying to load" in capsys.readouterr().err.strip().splitlines()[-1]
    monkeypatch.setenv("QBL_TRL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="no_such_model"):
        main(command)
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_one_line_and_the_exit_status_of_shells(float_folder, tmp_path, capsys, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr("qbl_trl.commands.quantize.run", interrupted)
    assert main(["quantize", str(float_folder), str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "qbl-trl quantize: interrupted\n"


def test_an_adapter_of_another_method_is_sent_to_what_works(float_folder, tmp_path, capsys):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(AutoModelForCausalLM.from_pretrained(float_folder), lora).save_pretrained(tmp_path / "lora")
    for command in (["quantize"], ["merge"]):
        assert main([*command, str(tmp_path / "lora"), str(tmp_path / "out")]) == 1
        said = capsys.readouterr().err
        assert "of another PEFT method" in said
        assert "merge_and_unload() merges a LoRA into a float base" in said
    assert not (tmp_path / "out").exists()


def test_a_folder_that_only_another_library_opens_is_sent_to_quantize_from(float_folder, monkeypatch, capsys):
    def missing(*args, **kwargs):
        raise NameError("name 'QuantizeConfig' is not defined")

    file = float_folder / "config.json"
    settings = json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq", "bits": 4}}
    file.write_text(json.dumps(settings))
    monkeypatch.setattr(LlamaForCausalLM, "from_pretrained", missing)
    assert main(["inspect", str(float_folder)]) == 1
    assert f"`qbl-trl quantize --from {float_folder} OUTPUT` takes its codes over" in capsys.readouterr().err


def test_a_float_file_cut_short_is_named(float_folder, tmp_path, capsys):
    file = float_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    assert main(["quantize", str(float_folder), str(tmp_path / "out")]) == 1
    assert f"{file}: cut short or damaged, not a whole safetensors file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_folder_does_not_hold_is_said_with_what_it_holds(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "run" / "checkpoint-2" / "adapter_config.json").write_text("{}")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "model.onnx").write_bytes(b"")
    for command, message in (
        (
            ["merge", "run", "merged"],
            "holds no adapter (no adapter_config.json); a folder in it does: run/checkpoint-2",
        ),
        (["inspect", "run"], "run holds no model (no config.json)"),
        (["inspect", "graph"], "graph holds an ONNX graph"),
        (["quantize", "run", "run"], "run is not empty; choose another folder, or pass --overwrite"),
    ):
        assert main(command) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["pooler", "head", "head and pooler"])
def test_an_encoder_without_the_head_or_the_pooler_of_its_class_is_quantized_as_what_it_is(lacking, tmp_path, caplog):
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=64, **sizes), add_pooling_layer="pooler" not in lacking).eval()
    model.save_pretrained(tmp_path / "float")
    if "head" in lacking:  # as models of sentences are published
        file = tmp_path / "float" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": ["BertForMaskedLM"]}))
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "q"), "--bits", "8"]) == 0
    assert ("holds no head of a BertForMaskedLM" in caplog.text) == ("head" in lacking)
    ids = torch.arange(8)[None]
    found = BertModel.from_pretrained(tmp_path / "q", add_pooling_layer="pooler" not in lacking).eval()
    with torch.no_grad():
        torch.testing.assert_close(found(ids)[0], model(ids)[0], rtol=0, atol=0.1)
    assert main(["inspect", str(tmp_path / "q")]) == 0


def test_a_file_that_is_there_is_named_without_the_name_of_a_function(tmp_path, capsys):
    (tmp_path / "out.gguf").touch()
    files = [str(tmp_path / "out.gguf"), "--to", "gguf", "--template", str(tmp_path / "base.gguf")]
    assert main(["convert", "MODEL", *files]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"qbl-trl convert: {tmp_path / 'out.gguf'} exists already; ")
    assert "--overwrite" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["export", "FLOAT", "OUT", "--prompt-accuracy-level", "0"], "--prompt-accuracy-level 0 changes nothing"),
        (["quantize", "FLOAT", "OUT", "--algorithm", "hqq", "--symmetric"], "leave out --symmetric"),
        (["convert", "FLOAT", "OUT", "--to", "awq"], "Exact: --to hqq or export to ONNX. Lossy: model.dequantize()"),
        (["convert", "FLOAT", "OUT", "--to", "hqq"], "`qbl-trl quantize`, or loading it with GroupQuantConfig, packs"),
        (["inspect", "FLOAT"], "in float; `qbl-trl quantize` packs it"),
        (["export", "/no/where", "OUT"], "/no/where: no such folder"),
    ],
)
def test_options_are_called_what_they_are_called_here(arguments, said, float_folder, tmp_path, capsys):
    named = {"OUT": str(tmp_path / "out"), "FLOAT": str(float_folder)}
    assert main([named.get(argument, argument) for argument in arguments]) == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in line
    assert "export_onnx" not in line
