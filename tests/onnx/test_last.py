"""logits="last": the same answer for the last position, with nothing computed for the others that only they need."""

import onnx
import pytest
import torch

from qbl_trl import export_onnx
from qbl_trl.generation import BEFORE_5
from qbl_trl.onnx.last import is_cut
from qbl_trl.onnx.protos import subgraphs
from qbl_trl.onnx.session import OnnxLogits
from tests.onnx.architectures import ARCHITECTURES, build
from tests.onnx.models import merged_llama, padded_batch

END_OF_A_LAYER = {"o_proj", "gate_proj_up_proj", "down_proj", "lm_head"}
SHORT = {  # what sees one position in the last layer, where it is not what Llama does
    "llama": END_OF_A_LAYER,
    "gemma2 with windows": END_OF_A_LAYER,
    "phi3 with joined projections": {"o_proj", "gate_up_proj", "down_proj", "lm_head"},
    "gpt_neox with partial rotary": {"dense", "dense_h_to_4h", "dense_4h_to_h", "embed_out" if BEFORE_5 else "lm_head"},
    "mixtral, which asks the chosen experts": {"lm_head"},  # the experts are fed row by row
    "falcon with alibi": {"dense", "dense_h_to_4h", "dense_4h_to_h", "lm_head"},
}


def seeing_one_position(folder):
    """Names of the linear layers behind the cut, of the last decoder layer and the head."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    short, names = set(), set()
    for node in graph.node:
        if node.name.startswith("last/GatherND") or short.intersection(node.input):
            short.update(output for output in node.output if output)
            if node.op_type in ("MatMulNBits", "FusedMatMul"):
                names.add(node.name.split("/")[0].rpartition(".")[2])
    return names


@pytest.mark.parametrize("case", SHORT)
def test_last_logits_are_those_of_the_last_position(tmp_path, case):
    kind, settings, _ = ARCHITECTURES[case]
    model = build(kind, settings)
    for logits in ("all", "last"):
        export_onnx(model, tmp_path / logits, logits=logits)
    ids, mask = padded_batch()
    last = OnnxLogits(tmp_path / "last")(ids, mask)
    assert last.shape[1] == 1
    # float32 on both sides; blocks of a matrix product depend on its rows
    torch.testing.assert_close(last[:, 0], OnnxLogits(tmp_path / "all")(ids, mask)[:, -1], rtol=0, atol=5e-7)
    assert seeing_one_position(tmp_path / "last") == SHORT[case]


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_the_last_position_of_a_row_is_the_last_that_is_no_padding(tmp_path, attention):
    model = merged_llama()
    for logits in ("all", "last"):
        export_onnx(model, tmp_path / logits, logits=logits, attention=attention)
    lengths = torch.tensor([9, 4, 6])
    ids = torch.arange(27).view(3, 9) % 90 + 3
    mask = (torch.arange(9) < lengths[:, None]).long()  # on the right, as ONNX Runtime GenAI pads
    everywhere = OnnxLogits(tmp_path / "all")(ids, mask)
    last = OnnxLogits(tmp_path / "last")(ids, mask)
    torch.testing.assert_close(last[:, 0], everywhere[torch.arange(3), lengths - 1], rtol=0, atol=5e-7)


@pytest.mark.parametrize("attention", ["attention", "gqa", "standard"])
def test_the_cut_lies_behind_every_form_of_attention(tmp_path, attention):
    export_onnx(merged_llama(), tmp_path / "last", logits="last", attention=attention)
    assert seeing_one_position(tmp_path / "last") == END_OF_A_LAYER


def test_the_written_shape_says_one_position(tmp_path):
    export_onnx(merged_llama(), tmp_path / "last", logits="last")
    graph = onnx.load(tmp_path / "last" / "model.onnx", load_external_data=False).graph
    assert next(value for value in graph.output if value.name == "logits").type.tensor_type.shape.dim[1].dim_value == 1


def test_a_step_of_one_token_has_nothing_to_cut(tmp_path):
    for logits in ("all", "last"):
        export_onnx(merged_llama(), tmp_path / logits, logits=logits, accuracy_level=4, prompt_accuracy_level=0)
    graph = onnx.load(tmp_path / "last" / "model.onnx", load_external_data=False).graph
    branches = {branch.name: branch.node for node in graph.node for branch in subgraphs(node)}
    assert {name: sum(is_cut(node) for node in nodes) for name, nodes in branches.items()} == {"steps": 0, "prompts": 2}
    assert not any(node.op_type == "ReduceMax" for node in branches["steps"])  # of where the text ends
    ids = padded_batch()[0][:, -1:]
    answers = [OnnxLogits(tmp_path / logits)(ids, torch.ones_like(ids)) for logits in ("all", "last")]
    torch.testing.assert_close(*answers, rtol=0, atol=0)
