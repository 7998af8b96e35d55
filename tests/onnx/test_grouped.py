"""Steps over a growing cache, and accuracy levels by length: branches that give what the whole graph gives."""

import numpy as np
import onnx
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.errors import ExportError
from qbl_trl.onnx.digits import Layout
from qbl_trl.onnx.prompts import PROMPT
from qbl_trl.onnx.session import OnnxLogits
from tests.onnx.models import merged_llama, operators, padded_batch
from tests.onnx.test_runtimes import ARCHITECTURES, build
from tests.tiny import tiny_llama

FP32 = 5e-6  # sums are taken in different orders; logits of the tiny models are below 1
SHARING = ["llama", "mistral with a window", "gemma2 with capped scores", "gpt_bigcode with one key head"]


@pytest.mark.parametrize("case", SHARING)
def test_grouped_steps_give_the_logits_of_group_query_attention(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    model = build(kind, settings)
    ids, mask = padded_batch()
    found = {}
    for attention in ("auto", "gqa"):
        export_onnx(model, tmp_path / attention, attention=attention)
        found[attention] = OnnxLogits(tmp_path / attention).with_cache(ids, mask, 4)
    torch.testing.assert_close(found["auto"], found["gqa"], rtol=0, atol=FP32)
    assert operators(tmp_path / "auto").count("If") == model.config.num_hidden_layers
    assert "If" not in operators(tmp_path / "gqa")


def test_a_shared_buffer_stays_with_group_query_attention(tmp_path):
    model = merged_llama()
    export_onnx(model, tmp_path / "out")
    ids, mask = padded_batch()
    graph = OnnxLogits(tmp_path / "out")
    torch.testing.assert_close(
        graph.with_cache(ids, mask, 4, buffer=20), graph.with_cache(ids, mask, 4), rtol=0, atol=FP32
    )


def test_heads_that_share_no_keys_and_half_precision_have_no_branches(tmp_path):
    export_onnx(merged_llama(num_key_value_heads=4), tmp_path / "all")
    export_onnx(merged_llama(), tmp_path / "half", dtype="float16")
    assert "If" not in operators(tmp_path / "all") + operators(tmp_path / "half")


@pytest.mark.parametrize(("steps", "prompts"), [(4, 0), (None, 4)])
def test_prompts_have_an_accuracy_level_of_their_own(tmp_path, steps, prompts):
    model, levels = merged_llama(), {"steps": steps, "prompts": prompts}
    plain = {"attention": "gqa", "lowering": "factored"}
    export_onnx(model, tmp_path / "both", accuracy_level=steps, prompt_accuracy_level=prompts, **plain)
    for name, level in levels.items():
        export_onnx(model, tmp_path / name, accuracy_level=level, **plain)
    onnx.checker.check_model(str(tmp_path / "both" / "model.onnx"))
    for tokens, name in ((PROMPT - 1, "steps"), (PROMPT, "prompts")):
        ids = torch.from_numpy(np.arange(tokens)[None] % 90 + 3)
        mask = torch.ones_like(ids)
        expected = OnnxLogits(tmp_path / name)(ids, mask)
        assert torch.equal(OnnxLogits(tmp_path / "both")(ids, mask), expected)  # the same kernels


def test_both_levels_read_the_same_weights(tmp_path):
    model = merged_llama()
    one = export_onnx(model, tmp_path / "one", accuracy_level=4).bytes
    two = export_onnx(model, tmp_path / "two", accuracy_level=4, prompt_accuracy_level=0)
    data = [(tmp_path / name / "model.onnx.data").stat().st_size for name in ("one", "two")]
    assert data[1] <= data[0]
    assert two.bytes < one + 200_000  # the nodes of the other branch
    assert two.parity_as_written is not None


def test_a_float_model_has_no_levels_to_choose_from(tmp_path):
    export_onnx(tiny_llama(), tmp_path / "out", attention="gqa", accuracy_level=4, prompt_accuracy_level=0)
    assert "If" not in operators(tmp_path / "out")


def test_an_unknown_level_of_prompts_is_refused(tmp_path):
    with pytest.raises(ExportError, match="prompt_accuracy_level=7 is not known; allowed: None, 0, 1, 2, 3, 4"):
        export_onnx(merged_llama(), tmp_path / "out", prompt_accuracy_level=7)
    assert not (tmp_path / "out").exists()


def test_digits_take_the_fewest_blocks_where_prompts_are_read_in_float():
    one, more = Layout.of(4, 32, 18, digits=1), Layout(4, 32, 18, (0,), 3)
    assert (one.blocks, more.blocks) == (1, 2)
    assert one.cost(18, prompts=False) < more.cost(18, prompts=False)
    assert one.cost(18) > more.cost(18)
