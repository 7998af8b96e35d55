"""Every recipe's parser takes every configuration shipped for it, and every flag is documented."""

import errno
import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
import yaml

from qbl_trl.errors import ConfigError, one_line

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
CONFIGS = {
    "sft_qablora": ["demo.yaml", "sft_qablora.yaml"],
    "sft_qblora": ["sft_qblora.yaml"],
    "dpo_qblora": ["dpo_qblora.yaml"],
}


def load(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_every_shipped_configuration_belongs_to_a_recipe():
    assert {p.name for p in (RECIPES / "configs").glob("*.yaml")} == {c for cs in CONFIGS.values() for c in cs}


@pytest.mark.parametrize(("recipe", "config"), [(r, c) for r, cs in CONFIGS.items() for c in cs])
def test_every_shipped_configuration_parses(recipe, config, tmp_path):
    file = RECIPES / "configs" / config
    arguments = ["--config", str(file), "--use_cpu", "true", "--bf16", "false", "--output_dir", str(tmp_path)]
    parsed = load(recipe).make_parser().parse_args_and_config(arguments)
    fields = {name for part in parsed for name in vars(part)}
    assert set(yaml.safe_load(file.read_text())) <= fields


@pytest.mark.parametrize("recipe", CONFIGS)
def test_every_recipe_says_how_to_run_it(recipe):
    module = load(recipe)
    assert f"accelerate launch recipes/{recipe}.py" in module.__doc__
    assert callable(module.main)


def launch(recipe, monkeypatch, *arguments):
    """The message with which a recipe stops, launched as a shell launches it."""
    monkeypatch.setattr(sys, "argv", [f"{recipe}.py", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / f"{recipe}.py"), run_name="__main__")
    assert isinstance(stop.value.code, str)  # Python prints it and exits with status 1
    return stop.value.code


ON_CPU = ("--use_cpu", "true", "--bf16", "false")
NOWHERE = ("--model_name_or_path", "/no/where", "--dataset_name", "/no/where")


@pytest.mark.parametrize(
    ("recipe", "output", "arguments"),
    [
        ("sft_qablora", "merged", (*ON_CPU, *NOWHERE, "--output_dir", "RUN")),
        ("sft_qablora", "merged", (*ON_CPU, "--output_dir", "RUN")),  # the embedded default
        ("sft_qablora", "onnx", (*ON_CPU, *NOWHERE, "--output_dir", "RUN", "--export_onnx", "true")),
        ("dpo_qblora", "merged", (*ON_CPU, *NOWHERE, "--output_dir", "RUN")),
        ("export_onnx", "onnx", ("--model", "/no/where", "--output", "RUN/onnx")),
    ],
)
def test_a_second_launch_says_in_one_line_what_to_do_before_anything_is_loaded(
    recipe, output, arguments, tmp_path, monkeypatch
):
    if output == "onnx":
        pytest.importorskip("onnx", reason="neither [onnx] nor [onnx5] is installed")
    (tmp_path / output).mkdir()
    (tmp_path / output / "config.json").touch()
    said = launch(recipe, monkeypatch, *(part.replace("RUN", str(tmp_path)) for part in arguments))
    folder = tmp_path / output
    assert said == f"{folder} is not empty; choose another folder, or pass --overwrite to replace all of it"


def test_a_model_or_a_dataset_that_is_not_there_is_one_line(monkeypatch, tmp_path):
    arguments = (*ON_CPU, *NOWHERE, "--output_dir", tmp_path / "run")
    for recipe in ("sft_qablora", "sft_qblora", "dpo_qblora"):
        said = launch(recipe, monkeypatch, *arguments)
        assert "/no/where" in said
        assert len(said.splitlines()) == 1


def test_a_split_that_a_dataset_lacks_and_a_flag_nobody_knows_are_one_line_before_a_model_is_loaded(
    monkeypatch, tmp_path
):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "w1 w2"}\n')
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    arguments = (*ON_CPU, *NOWHERE[:3], tmp_path / "data", "--output_dir", tmp_path / "run")
    for recipe in ("sft_qablora", "sft_qblora", "dpo_qblora"):
        said = launch(recipe, monkeypatch, *arguments, "--dataset_train_split", "nope")
        assert "nope" in said
        assert "train" in said
        assert len(said.splitlines()) == 1
        assert "--nope" in launch(recipe, monkeypatch, *arguments, "--nope", "3")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which the recipes are set for")
def test_without_a_gpu_a_recipe_names_the_flags_of_a_cpu(monkeypatch, tmp_path):
    said = launch("sft_qablora", monkeypatch, *NOWHERE, "--output_dir", tmp_path / "run")
    assert said.endswith("On a CPU pass --use_cpu true --bf16 false --dtype float32. (QBL_TRL_TRACEBACK=1 shows where)")
    assert "\n" not in said


@pytest.mark.parametrize("recipe", ["sft_qablora", "dpo_qblora"])
def test_a_checkpoint_that_is_not_there_is_one_line_before_anything_is_loaded(recipe, monkeypatch, tmp_path):
    arguments = (*ON_CPU, *NOWHERE, "--output_dir", tmp_path / "run", "--resume_from_checkpoint")
    said = launch(recipe, monkeypatch, *arguments, "true")
    assert (
        said == f"resume_from_checkpoint=true, and {tmp_path / 'run'} holds no checkpoint to go on from; leave it out "
        "to begin anew"
    )
    assert "is no folder" in launch(recipe, monkeypatch, *arguments, tmp_path / "run" / "checkpoint-99")
    (tmp_path / "run" / "checkpoint-3").mkdir(parents=True)
    for there in ("true", tmp_path / "run" / "checkpoint-3", "false"):
        assert "/no/where" in launch(recipe, monkeypatch, *arguments, there)


def test_help_shows_defaults_of_the_flags_and_not_of_the_embedded_configuration(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sft_qablora.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(RECIPES / "sft_qablora.py"), run_name="__main__")
    assert stop.value.code == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Fine-tune a 4-bit model with balanced adapters" in said
    assert "as many parameters. (default: 8)" in said


def test_a_graph_of_an_earlier_run_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "onnx").mkdir()
    launch("sft_qablora", monkeypatch, *ON_CPU, *NOWHERE, "--output_dir", tmp_path)
    assert f"{tmp_path / 'onnx'} stays as it is: --export_onnx true writes it anew" in capsys.readouterr().err


def test_an_error_of_the_machine_is_no_thing_that_is_not_there():
    error = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space"), one_line():
        raise error
    gone = FileNotFoundError(errno.ENOENT, "nothing there")
    gone.add_note("(adapter saved in run)")
    with pytest.raises(SystemExit, match=r"nothing there \(adapter saved in run\)"), one_line():
        raise gone


def test_a_setting_that_cannot_work_is_one_line_too_and_its_traceback_one_variable_away(monkeypatch, tmp_path):
    pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    arguments = (*ON_CPU, *NOWHERE, "--output_dir", str(tmp_path), "--in_factor", "0")
    said = launch("sft_qblora", monkeypatch, *arguments)
    assert "in_factor" in said
    assert "\n" not in said
    monkeypatch.setenv("QBL_TRL_TRACEBACK", "1")
    with pytest.raises(ConfigError, match="in_factor"):
        runpy.run_path(str(RECIPES / "sft_qblora.py"), run_name="__main__")


@pytest.mark.parametrize("recipe", ["sft_qablora", "dpo_qblora", "export_onnx"])
def test_the_flag_that_replaces_outputs_needs_no_value(recipe, tmp_path):
    parser = load(recipe).make_parser()
    if recipe == "export_onnx":
        own = parser.parse_args(["--model", "m", "--output", "o", "--overwrite"])
    else:
        *_, own = parser.parse_args_and_config([*ON_CPU, "--output_dir", str(tmp_path), "--overwrite"])
    assert own.overwrite is True


def test_the_accelerate_configurations_are_readable():
    for file in (RECIPES / "accelerate").glob("*.yaml"):
        assert "distributed_type" in yaml.safe_load(file.read_text()), file


def test_flags_change_the_embedded_default_of_the_recipe():
    recipe = load("sft_qablora")
    _, training, own = recipe.make_parser().parse_args_and_config(recipe.with_default(["--max_steps", "3", "--r", "2"]))
    assert (training.max_steps, training.max_length, own.r, own.lora_alpha) == (3, 128, 2, 8)
    for arguments in (
        ["--model_name_or_path", "m"],
        ["--dataset_name=d"],
        ["--config", "c.yaml"],
        ["--model-name-or-path", "m"],
    ):
        assert recipe.with_default(arguments) == arguments
