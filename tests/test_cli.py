import json
import re

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from qbl_trl import GroupQuantConfig, QBLoRAConfig, verify
from qbl_trl.cli import main, make_parser
from qbl_trl.parity import ParityReport
from qbl_trl.quant.summary import summarize
from tests.quant import foreign
from tests.quant.test_importers import AWQ, affines
from tests.tiny import logits, tiny_gpt2, tiny_llama, tiny_tokenizer, tokens

FILE = "model.safetensors"


@pytest.fixture
def float_folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def adapter(float_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=GroupQuantConfig())
    model = get_peft_model(base, QBLoRAConfig(r=8, quantization_aware=True, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model.eval(), tokens())


def test_quantize_writes_what_loading_with_the_same_settings_gives(float_folder, tmp_path, capsys):
    assert main(["quantize", str(float_folder), str(tmp_path / "q"), "--group-size", "16", "--algorithm", "mse"]) == 0
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    settings = GroupQuantConfig(group_size=16, algorithm="mse")
    expected = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=settings)
    assert torch.equal(logits(ours, tokens()), logits(expected, tokens()))
    before, after = (file.stat().st_size / 1e6 for file in (float_folder / FILE, tmp_path / "q" / FILE))
    said = capsys.readouterr().out
    assert re.fullmatch(rf"{tmp_path}/q: 14 packed layers, {before:.1f} MB -> {after:.1f} MB, \d+\.\d s\n", said)


def test_quantize_calibrates_gptq_on_the_texts_of_a_file(float_folder, tmp_path, capsys):
    tiny_tokenizer().save_pretrained(float_folder)
    (tmp_path / "texts.txt").write_text("w3 w34 w45 w9\n\nw66 w5 w35")
    command = ["quantize", str(float_folder), str(tmp_path / "q"), "--algorithm", "gptq"]
    assert main(command) == 1
    assert "--algorithm gptq and --calibration FILE" in capsys.readouterr().err
    assert not (tmp_path / "q").exists()
    assert main([*command, "--calibration", str(tmp_path / "texts.txt")]) == 0
    ids = [torch.tensor([[3, 34, 45, 9]]), torch.tensor([[66, 5, 35]])]
    settings = GroupQuantConfig(algorithm="gptq", calibration=ids)
    expected = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=settings)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    assert torch.equal(logits(ours, tokens()), logits(expected, tokens()))


def test_inspect_lists_every_layer_with_its_error_and_fitting_factors(float_folder, tmp_path, capsys):
    main(["quantize", str(float_folder), str(tmp_path / "q")])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "q"), "--against", str(float_folder), "--all"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 14 + 2
    down = next(line for line in lines if "0.mlp.down_proj" in line)
    assert "64 x 96" in down
    assert down.endswith("32, 96")
    assert "14 layers" in lines[-2]
    assert lines[-1].startswith("in float beside them: 0.1 MB, most of it in model.embed_tokens, lm_head")


def test_inspect_gives_layers_alike_one_row_with_the_range_of_their_errors(float_folder, tmp_path, capsys):
    main(["quantize", str(float_folder), str(tmp_path / "q")])
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "q"), "--against", str(float_folder)]) == 0
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == [
        "layers",
        "count",
        "N",
        "x",
        "K",
        "bits",
        "group",
        "B/weight",
        "error",
        "exact",
        "in_factors",
    ]
    assert len(rows) == 7 + 2
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "q")
    errors = sorted(x.error for x in summarize(model, float_folder) if x.name.endswith("mlp.down_proj"))
    down = next(row for row in rows if "down_proj" in row)
    assert down.startswith("model.layers.0-1.mlp.down_proj ")
    assert re.search(rf" 2  64 x 96 +4 +32 +0\.\d+ +{errors[0]:.4f} to {errors[1]:.4f} +32, 96$", down)


def test_merge_makes_the_4_bit_base_again_and_folds_the_adapter(adapter, tmp_path, capsys):
    folder, expected = adapter
    assert main(["merge", str(folder), str(tmp_path / "merged")]) == 0
    before = (tmp_path / "float" / FILE).stat().st_size / 1e6
    said = f"{tmp_path}/merged: 14 packed layers (14 with a merged adapter), {before:.1f} MB -> "
    assert capsys.readouterr().out.startswith(said)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    # float32 rounding of sums of at most 96 products
    torch.testing.assert_close(logits(merged, tokens()), expected, rtol=0, atol=1e-5)


def test_to_lora_writes_plain_lora_files(adapter, tmp_path):
    assert main(["to-lora", str(adapter[0]), str(tmp_path / "lora")]) == 0
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text())["peft_type"] == "LORA"


def test_convert_writes_hqq_and_says_why_integer_zero_points_cannot_be(adapter, tmp_path, capsys):
    main(["merge", str(adapter[0]), str(tmp_path / "merged")])
    assert main(["convert", str(tmp_path / "merged"), str(tmp_path / "hqq"), "--to", "hqq"]) == 0
    assert json.loads((tmp_path / "hqq" / "config.json").read_text())["quantization_config"]["quant_method"] == "hqq"
    assert "14 layers; weights off by 0.0e+00" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "merged"), str(tmp_path / "gptq"), "--to", "gptq"]) == 1
    assert "gptq is not written. It stores integer zero points" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "merged"), str(tmp_path / "out.gguf"), "--to", "gguf"]) == 1
    assert "--to gguf needs --template, a GGUF file of the same model" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "merged"), str(tmp_path / "h"), "--to", "hqq", "--template", "x.gguf"]) == 1
    assert "--template is for --to gguf; leave it out with --to hqq" in capsys.readouterr().err
    assert not (tmp_path / "gptq").exists()
    assert not (tmp_path / "out.gguf").exists()


def test_an_output_folder_that_is_not_empty_is_refused_and_left_alone(float_folder, tmp_path, capsys):
    (tmp_path / "q").mkdir()
    (tmp_path / "q" / "precious").touch()
    assert main(["quantize", str(float_folder), str(tmp_path / "q")]) == 1
    assert "is not empty" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "q").iterdir()] == ["precious"]


def test_a_folder_without_an_adapter_is_refused(float_folder, tmp_path, capsys):
    assert main(["merge", str(float_folder), str(tmp_path / "merged")]) == 1
    assert "holds no adapter" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()


def drop(state):
    return {key: value for key, value in state.items() if "layers.1.mlp" not in key}


def drop_one(state):
    return {key: value for key, value in state.items() if not key.endswith("layers.0.mlp.down_proj.lora_B.weight")}


def add(state):
    extra = {key.replace("layers.1.", "layers.7."): value.clone() for key, value in state.items() if "layers.1." in key}
    return state | extra


@pytest.mark.parametrize("command", ["merge", "export"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop, "holds 22 of the adapter's 28 tensors"),
        (drop_one, "holds 27 of the adapter's 28 tensors"),
        (add, "14 tensors for layers that have no adapter"),
    ],
)
def test_an_adapter_file_that_does_not_fit_its_configuration_is_refused(
    adapter, tmp_path, capsys, change, message, command
):
    if command == "export":
        pytest.importorskip("onnx")
    file = adapter[0] / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    assert main([command, str(adapter[0]), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["merge", "to-lora", "export"])
@pytest.mark.parametrize(
    ("damaged", "content", "message"),
    [
        ("adapter_model.safetensors", b"short", "adapter_model.safetensors: cut short or damaged"),
        ("adapter_model.safetensors", None, "holds no weights of its adapter (adapter_model.safetensors)"),
        ("adapter_config.json", b"{", "adapter_config.json cannot be read"),
        ("adapter_config.json", b"[]", "adapter_config.json cannot be read"),
    ],
)
def test_a_damaged_adapter_is_named(adapter, tmp_path, capsys, damaged, content, message, command):
    if command == "export":
        pytest.importorskip("onnx")
    file = adapter[0] / damaged
    file.unlink()
    if content is not None:
        file.write_bytes(content)
    assert main([command, str(adapter[0]), str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_verified_on_the_base_it_was_trained_over(adapter, tmp_path):
    main(["merge", str(adapter[0]), str(tmp_path / "merged")])
    report = verify(adapter[0], tmp_path / "merged", tokens())
    assert report.max_abs_difference < 1e-5  # the float base that the adapter names is quantized again


def test_an_adapter_trained_with_more_tokens_is_loaded_on_a_base_made_as_large(float_folder, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(float_folder, quantization_config=GroupQuantConfig())
    base.resize_token_embeddings(133)
    settings = {"quantization_aware": True, "modules_to_save": ["embed_tokens", "lm_head"], "init_lora_weights": False}
    model = get_peft_model(base, QBLoRAConfig(r=4, **settings)).eval()
    model.save_pretrained(tmp_path / "adapter")
    words = Tokenizer(WordLevel({str(i): i for i in range(133)}, unk_token="0"))
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "adapter")
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = tokens(vocabulary=133)
    torch.testing.assert_close(logits(merged, ids), logits(model, ids), rtol=0, atol=1e-5)  # float32 rounding


def test_an_adapter_folder_is_inspected_on_its_base(adapter, capsys):
    assert main(["inspect", str(adapter[0])]) == 0
    assert "14 layers" in capsys.readouterr().out.splitlines()[-2]


def test_a_converted_checkpoint_replaces_a_folder_only_if_told_to(tmp_path, capsys):
    foreign.write_folder(tmp_path / "in", foreign.awq_tensors, AWQ, affines())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    command = ["quantize", "--from", str(tmp_path / "in"), str(tmp_path / "out")]
    assert main(command) == 1
    assert main([*command, "--overwrite", "--bits", "8", "--symmetric"]) == 1
    assert "leave out --bits, --symmetric" in capsys.readouterr().err
    assert (tmp_path / "out" / "old").exists()
    assert main([*command, "--overwrite"]) == 0
    assert not (tmp_path / "out" / "old").exists()


def test_verify_says_what_a_difference_may_come_from(tmp_path, capsys):
    tiny_llama().save_pretrained(tmp_path / "one")
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    told = ["verify", str(tmp_path / "one"), str(tmp_path / "other")]
    assert main(told) == 1
    found = capsys.readouterr()
    assert "KL per token" in found.out
    assert (
        "is over 1.0e-03. Of 8-bit activations, weights or caches, packed embeddings and half precision expect"
        in found.err
    )
    assert main([*told, "--tolerance", "none"]) == 0


def test_verify_reads_the_texts_of_a_file(tmp_path, capsys):
    for name, seed in (("one", 0), ("other", 1)):
        tiny_llama(seed=seed).save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / "one")
    texts = ["w3 w7 w9", "w50 w2"]
    (tmp_path / "texts.txt").write_text("\n\n".join(texts))
    folders = [str(tmp_path / "one"), str(tmp_path / "other")]
    assert main(["verify", *folders, "--text-file", str(tmp_path / "texts.txt"), "--tolerance", "none"]) == 0
    found = capsys.readouterr().out
    tokenizer = tiny_tokenizer()
    each = [verify(*folders, tokenizer(text, return_tensors="pt").input_ids) for text in texts]
    assert found.strip() == str(ParityReport.joined(each))
    assert main(["verify", folders[0], str(tmp_path / "nowhere")]) == 1
    assert "nowhere: no such folder" in capsys.readouterr().err


@pytest.mark.parametrize("value", ["nan", "-1", "inf"])
def test_verify_takes_no_tolerance_that_lets_nothing_or_everything_through(value, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["verify", "A", "B", "--tolerance", value])
    assert stop.value.code == 2
    assert f"{value} is no tolerance" in capsys.readouterr().err


def test_inspect_measures_errors_against_float_weights_only(float_folder, tmp_path, capsys):
    packed = str(tmp_path / "q")
    main(["quantize", str(float_folder), packed])
    assert main(["inspect", packed, "--against", packed]) == 1
    assert "holds codes in 'model.layers.0.self_attn.q_proj.weight', not float weights" in capsys.readouterr().err
    tiny_llama(hidden_size=32).save_pretrained(tmp_path / "other")
    assert main(["inspect", packed, "--against", str(tmp_path / "other")]) == 1
    assert "it is of another model" in capsys.readouterr().err


def test_inspect_turns_transposed_weights_round_square_ones_too(tmp_path):
    tiny_gpt2().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    errors = {layer.name: layer.error for layer in summarize(model, tmp_path / "float")}
    assert len(errors) == 8
    assert max(errors.values()) < 0.1  # 15 steps over the range of 32 normal values: a step of 0.27, its noise 0.08


@pytest.mark.parametrize(
    "command", ["quantize", "inspect", "merge", "to-lora", "export", "convert", "verify", "report"]
)
def test_every_command_explains_itself(command, capsys):
    with pytest.raises(SystemExit) as stop:
        make_parser().parse_args([command, "--help"])
    assert stop.value.code == 0
    assert command in capsys.readouterr().out


def test_a_home_that_the_shell_left_as_it_is_is_found_everywhere(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "float")
    assert main(["quantize", "~/float", "~/packed"]) == 0
    assert "14 packed layers" in capsys.readouterr().out
    assert main(["inspect", "~/packed", "--against", "~/float"]) == 0
    assert main(["quantize", "~/packed", "~/float", "--from", "--overwrite"]) == 1
    assert "holds a model that --from did not write" in capsys.readouterr().err
