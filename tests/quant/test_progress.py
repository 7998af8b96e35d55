"""Bars while a model is quantized: they move by layers, and are silent where they should be."""

import copy
import io
import sys

import pytest
from tqdm import tqdm
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from qbl_trl import GroupQuantConfig
from qbl_trl.generation import BEFORE_5
from qbl_trl.progress import progress
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama


@pytest.fixture
def float_dir(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def bars(monkeypatch):
    """Every bar of the quantizer: its total, its updates, whether it is closed."""
    made = []

    def recorded(total, what, unit, **options):
        bar = tqdm(total=total, desc=what, unit=unit, file=io.StringIO())
        made.append(bar)
        return bar

    monkeypatch.setattr("qbl_trl.quant.hf_quantizer.progress", recorded)
    yield made
    assert not [bar for bar in made if bar in tqdm._instances]  # closed


def test_quantizing_moves_a_bar_by_layers(float_dir, bars):
    quantize_model_(AutoModelForCausalLM.from_pretrained(float_dir), GroupQuantConfig())
    assert [(bar.total, bar.n, bar.desc) for bar in bars] == [(14, 14, "quantizing")]


@pytest.mark.skipif(not BEFORE_5, reason="transformers 5 shows every weight it loads")
def test_quantizing_while_loading_moves_a_bar_by_layers_and_leaves_none_on_the_model(float_dir, bars):
    model = AutoModelForCausalLM.from_pretrained(float_dir, quantization_config=GroupQuantConfig(algorithm="hqq"))
    assert [(bar.total, bar.n) for bar in bars] == [(14, 14)]
    assert not any(isinstance(value, tqdm) for value in vars(model.hf_quantizer).values())
    copy.deepcopy(model)


def test_bars_are_silent_with_those_of_transformers_and_beyond_a_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def shown(screen):
        monkeypatch.setattr(sys, "stderr", screen)
        with progress(3, "quantizing", "layer") as bar:
            bar.update()
        return screen.getvalue()

    assert "quantizing" in shown(Terminal())
    assert shown(io.StringIO()) == ""
    monkeypatch.setattr(logging, "_tqdm_active", False)
    assert shown(Terminal()) == ""
