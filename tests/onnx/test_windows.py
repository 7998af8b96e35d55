"""Windows are read from the masks that a model makes; other masks keep the model's own operators."""

import pytest
import torch
from transformers import DogeConfig, DogeForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_causal_mask_function,
)
from transformers.models.llama.modeling_llama import LlamaAttention

from qbl_trl import export_onnx
from qbl_trl.errors import ExportError
from qbl_trl.onnx.session import OnnxLogits
from qbl_trl.onnx.windows import mask_of_window, window_of
from qbl_trl.parity import logits_of
from tests.onnx.architectures import GATED, build
from tests.onnx.models import quantize
from tests.onnx.test_limits import difference

SEPARATOR, LOWEST = 7, torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("window", [0, 1, 2, 255, 1024, 4096, 131072])
def test_a_window_comes_through_a_mask_in_every_float_type(window, dtype):
    function = sliding_window_causal_mask_function(window) if window else causal_mask_function
    mask = mask_of_window(function, local_size=window or None).to(dtype)
    assert window_of(mask[:, :, :, :7]) == window


def test_other_masks_are_no_windows():
    chunk = torch.zeros(2, dtype=torch.long)
    for size in range(2, 200):
        assert window_of(mask_of_window(chunked_causal_mask_function(size, chunk), size)) is None
    packed = packed_sequence_mask_function(torch.zeros(2, 9, dtype=torch.long))
    assert window_of(mask_of_window(and_masks(causal_mask_function, packed))) is None
    assert window_of(mask_of_window(causal_mask_function, local_size=8)) is None
    assert window_of(mask_of_window(sliding_window_causal_mask_function(8))) is None


def test_what_was_made_of_a_mask_is_no_window():
    mask = mask_of_window(causal_mask_function)
    assert window_of(mask.expand(2, 1, 3, 5)) is None
    for changed in (mask.bool(), ~mask.bool(), mask + 1, mask * LOWEST, torch.full_like(mask, LOWEST), mask * 0):
        assert window_of(changed) is None


class DocumentAttention(LlamaAttention):
    """Documents of a row, each behind a separator, do not see each other."""

    def forward(self, hidden_states, position_embeddings=None, attention_mask=None, **more):
        documents, new = self.documents[0], hidden_states.shape[1]
        if attention_mask is None:
            places = torch.arange(documents.shape[1])
            attention_mask = (places <= places[-new:, None])[None, None]
        if attention_mask.dtype == torch.bool:
            attention_mask = torch.zeros(attention_mask.shape).masked_fill(~attention_mask, LOWEST)
        apart = documents[:, None, -new:, None] != documents[:, None, None, :]
        mask = attention_mask.masked_fill(apart, LOWEST) if self.chosen else attention_mask + apart.float() * LOWEST
        return super().forward(hidden_states, position_embeddings=position_embeddings, attention_mask=mask, **more)


class DocumentLlama(LlamaForCausalLM):
    def __init__(self, config, chosen):
        super().__init__(config)
        self.documents = [None]
        for index, layer in enumerate(self.model.layers):
            own = DocumentAttention(config, index)
            own.load_state_dict(layer.self_attn.state_dict())
            own.documents, own.chosen, layer.self_attn = self.documents, chosen, own

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, **more):
        documents = (input_ids == SEPARATOR).long().cumsum(-1)
        before = attention_mask.shape[1] - input_ids.shape[1]
        self.documents[0] = torch.nn.functional.pad(documents, (before, 0))
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "past_key_values": past_key_values}
        return super().forward(input_ids=input_ids, **named, **more)


@pytest.mark.parametrize("chosen", [True, False])
def test_a_mask_that_a_model_adds_to_stays(tmp_path, chosen):
    torch.manual_seed(0)
    model = quantize(DocumentLlama(LlamaConfig(**{**GATED, "vocab_size": 5000}), chosen).eval())
    report = export_onnx(model, tmp_path / "out")
    assert report.attention == "standard"
    assert "attention with a mask of its own has no fused form" in report.attention_reason
    ids = torch.randint(10, 5000, (2, 30), generator=torch.Generator().manual_seed(1))
    ids[:, 12] = ids[:, 20] = SEPARATOR
    mask = torch.ones_like(ids)
    expected = logits_of(model)(ids, mask)
    torch.testing.assert_close(OnnxLogits(tmp_path / "out")(ids, mask), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("window", [40, 60])
def test_a_window_beyond_what_the_gate_reads_is_kept(tmp_path, window):
    settings = {**GATED, "max_position_embeddings": 160, "sliding_window": window}
    for kind in ("Mistral", "Starcoder2"):
        model = build(kind, settings)
        assert export_onnx(model, tmp_path / kind).attention == "gqa"
        assert difference(model, tmp_path / kind, 100) < 5e-6


def test_a_branch_on_the_length_of_a_text_is_refused(tmp_path):
    settings = {**GATED, "keep_window_size": 60, "num_experts": 4}
    model = DogeForCausalLM(DogeConfig(**settings)).eval()
    with pytest.raises(ExportError, match=r"texts of more than 60 tokens \(keep_window_size\).* max_length=60"):
        export_onnx(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_onnx(model, tmp_path / "out", max_length=60)
    assert difference(model, tmp_path / "out", 60) < 5e-6


def test_a_count_of_experts_that_a_dense_model_has_none_of_is_not_traced(tmp_path):
    torch.manual_seed(0)
    model = DogeForCausalLM(DogeConfig(**{**GATED, "num_hidden_layers": 1})).eval()
    export_onnx(model, tmp_path / "out")
    assert difference(model, tmp_path / "out", 9) < 5e-6
