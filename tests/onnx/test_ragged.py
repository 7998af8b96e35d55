"""Groups that do not fill a row: the last one holds fewer weights, in every layer and option."""

import pytest

from qbl_trl import GroupQuantConfig, export_onnx, verify
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama, tokens

EXACT = 2e-6  # float32, logits of about 1
EIGHT_BITS = 2e-2  # activations


def ragged(**settings):
    """Rows of 96 weights in groups of 64."""
    return quantize_model_(tiny_llama(hidden_size=96, head_dim=16), GroupQuantConfig(group_size=64, **settings))


@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("algorithm", ["rtn", "hqq"])
@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({}, EXACT),
        ({"attention": "standard"}, EXACT),
        ({"lowering": "float_zero_point"}, EXACT),
        ({"accuracy_level": 4, "prompt_accuracy_level": 0}, EIGHT_BITS),
        ({"accuracy_level": 4, "prompt_weights": "int8"}, EIGHT_BITS),
    ],
)
def test_a_graph_reads_and_adds_what_is_there(tmp_path, algorithm, embeddings, options, allowed):
    model = ragged(algorithm=algorithm, quantize_embeddings=embeddings)
    report = export_onnx(model, tmp_path / "out", **options)
    assert report.parity.max_abs_difference < EXACT
    assert verify(model, tmp_path / "out", tokens()).max_abs_difference < allowed


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_gpu_has_kernels_for_it(tmp_path, dtype):
    model = ragged(algorithm="hqq", quantize_embeddings=True)
    assert export_onnx(model, tmp_path / "out", provider="cuda", dtype=dtype).fallbacks == ()
