"""The exported folder of a real small model: greedy tokens identical to the merged torch model over twenty prompts.

    python -m pytest integration/test_onnx_real_model.py

Needs SmolLM2-135M-Instruct as integration/demo/data.py prepares it; skipped where it is not there.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.demo.packages import default_cache
from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.parity import compare, positions
from qbl_trl.quant.linear import GroupQuantLinear

MODEL = default_cache() / "models" / "smollm2-135m-instruct"
PROMPTS, NEW_TOKENS = 20, 64
TOPICS = ("rivers", "bread", "trains", "music", "winter", "money", "birds", "glass", "chess", "islands")

pytestmark = pytest.mark.skipif(not MODEL.is_dir(), reason="run: python -m integration.demo.data")


@pytest.fixture(scope="module")
def merged():
    """The int4 base with a random merged adapter, one value per block of 32 by 2 weights."""
    quantization = GroupQuantConfig(bits=4, group_size=32)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32, quantization_config=quantization).eval()
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, GroupQuantLinear):
            delta = torch.randn(layer.out_features // 2, layer.in_features // 32, generator=generator) * 1e-4
            layer.set_delta(delta, 32, 2)
    return model


@pytest.fixture(scope="module")
def graph(merged, tmp_path_factory) -> OnnxLogits:
    folder = Path(tmp_path_factory.mktemp("smollm2"), "onnx")
    report = export_onnx(merged, folder)
    assert report.parity_cached.kl_per_token <= 1e-5
    return OnnxLogits(folder)


def prompts() -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [form.format(topic) for topic in TOPICS for form in ("Tell me about {}.", "Once, far from any {},")]
    return [tokenizer(text, return_tensors="pt").input_ids for text in texts[:PROMPTS]]


def test_greedy_tokens_are_those_of_the_merged_model_over_twenty_prompts(merged, graph):
    ties = 0
    for ids in prompts():
        settings = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": NEW_TOKENS}
        whole = merged.generate(ids, **settings)
        mask = torch.ones_like(whole)
        with torch.no_grad():
            expected = merged(whole, attention_mask=mask, position_ids=positions(mask)).logits
        found = graph.with_cache(whole, mask, prefix=ids.shape[1])
        report = compare(expected, found)
        assert report.max_abs_difference <= 1e-3
        assert report.kl_per_token <= 1e-5
        wrong = round((1 - report.top1_agreement) * report.tokens)
        assert wrong == report.ties  # a step whose two best logits tie within the difference is no step
        ties += report.ties
    assert ties <= 3
