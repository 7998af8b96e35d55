"""Every recipe's parser takes every configuration shipped for it, and every flag is documented."""

import importlib.util
import sys
from pathlib import Path

import pytest
import yaml

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
