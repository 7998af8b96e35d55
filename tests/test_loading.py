"""What is opened from a folder is what was saved there: its class, its head, its revision."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import constants
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from qbl_trl import GroupQuantConfig, QBLoRAConfig, merge
from qbl_trl.cli import main
from qbl_trl.errors import ConfigError
from qbl_trl.loading import load_adapter
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import logits, tiny_llama, tokens

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
VOCABULARY = 300
TASKS = {
    "SEQ_CLS": (transformers.LlamaForSequenceClassification, {"num_labels": 3}),
    "TOKEN_CLS": (transformers.LlamaForTokenClassification, {"num_labels": 5}),
    "FEATURE_EXTRACTION": (transformers.LlamaModel, {}),
    "SEQ_2_SEQ_LM": (transformers.BartForConditionalGeneration, {}),
    None: (transformers.BertForMaskedLM, {}),
}


def scores(model):
    with torch.no_grad():
        made = model.eval()(input_ids=tokens())
    return made.logits if "logits" in made else made.last_hidden_state


def tiny(task):
    made_by, extra = TASKS[task]
    torch.manual_seed(0)
    if made_by.config_class is transformers.BartConfig:
        size = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": VOCABULARY}
        heads = {
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
        }
        return made_by(transformers.BartConfig(**size, **heads))
    return made_by(made_by.config_class(**SIZES, vocab_size=VOCABULARY, pad_token_id=0, **extra))


@pytest.mark.parametrize("task", TASKS)
def test_the_command_line_merges_every_task_into_the_model_that_was_trained(tmp_path, task):
    made_by, extra = TASKS[task]
    tiny(task).save_pretrained(tmp_path / "float")
    base = made_by.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig(), **extra)
    config = QBLoRAConfig(r=2, quantization_aware=True, out_factor=2, init_lora_weights=False, task_type=task)
    model = get_peft_model(base, config)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "config.json").write_text(json.dumps({}))  # no tokenizer beside it: none is asked for
    expected = scores(model.merge_and_unload())
    assert main(["merge", str(tmp_path / "adapter"), str(tmp_path / "merged")]) == 0
    torch.testing.assert_close(scores(made_by.from_pretrained(tmp_path / "merged")), expected, rtol=0, atol=2e-5)


def test_a_classifiers_labels_are_counted_where_only_its_adapter_knows_them(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "lm")
    base = transformers.LlamaForSequenceClassification.from_pretrained(
        tmp_path / "lm", num_labels=7, quantization_config=GroupQuantConfig()
    )
    base.config.pad_token_id = 0
    model = get_peft_model(base, QBLoRAConfig(r=1, quantization_aware=True, task_type="SEQ_CLS"))
    model.save_pretrained(tmp_path / "adapter")
    found = load_adapter(tmp_path / "adapter")
    found.config.pad_token_id = 0
    torch.testing.assert_close(scores(found), scores(model))


def test_quantizing_keeps_a_classifiers_head(tmp_path):
    model = tiny("SEQ_CLS")
    model.save_pretrained(tmp_path / "float")
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "packed")]) == 0
    packed = transformers.LlamaForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(packed.score.weight, model.score.weight)


@pytest.fixture
def two_revisions(tmp_path, monkeypatch):
    """A hub's cache of one model: main, and v2 with other weights."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    for module in (transformers.utils.hub, transformers.utils):
        for name in ("TRANSFORMERS_CACHE", "HF_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, str(tmp_path))
    root = tmp_path / "models--me--tiny"
    (root / "refs").mkdir(parents=True)
    for commit, seed, name in (("a" * 40, 0, "main"), ("b" * 40, 1, "v2")):
        tiny_llama(seed=seed).save_pretrained(root / "snapshots" / commit)
        (root / "refs" / name).write_text(commit)
    return tmp_path


def test_an_adapter_is_put_on_the_revision_it_was_trained_on(two_revisions, tmp_path):
    where = {"revision": "v2", "cache_dir": str(two_revisions)}
    base = AutoModelForCausalLM.from_pretrained("me/tiny", quantization_config=GroupQuantConfig(), **where)
    config = QBLoRAConfig(r=1, quantization_aware=True, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, revision="v2")
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits(load_adapter(tmp_path / "adapter"), tokens()), logits(model.eval(), tokens()))


def test_a_layer_that_the_checkpoint_lacks_is_drawn_and_stays_float(tmp_path):
    config = transformers.BertConfig(**SIZES, vocab_size=VOCABULARY)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)  # no pooler in the file
    for _ in range(3):
        made = transformers.BertForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=GroupQuantConfig()
        )
        pooler = made.bert.pooler.dense
        assert type(pooler) is torch.nn.Linear
        assert pooler.weight.abs().max() < 1  # drawn with a deviation of 0.02
        assert not pooler.bias.any()
    assert "bert.pooler.dense" in made.config.quantization_config.modules_to_not_convert
    made.save_pretrained(tmp_path / "packed")
    again = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    assert torch.equal(scores(again), scores(made))


def test_models_without_an_embedding_of_tokens_load_again(tmp_path):
    towers = {**SIZES, "num_hidden_layers": 1}
    vision = {**towers, "image_size": 28, "patch_size": 14}
    text = {**towers, "vocab_size": 64, "max_position_embeddings": 32}
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).save_pretrained(tmp_path)
    packed = transformers.CLIPModel.from_pretrained(tmp_path, quantization_config=GroupQuantConfig())
    packed.save_pretrained(tmp_path / "packed")
    again = transformers.CLIPModel.from_pretrained(tmp_path / "packed")
    ids, pixels = torch.arange(2, 10).unsqueeze(0), torch.randn(1, 3, 28, 28)
    with torch.no_grad():
        ours, theirs = (m.eval()(input_ids=ids, pixel_values=pixels).logits_per_image for m in (again, packed))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("above", [None, "another packed model"])
def test_a_packed_model_in_a_subfolder_is_not_held_against_what_lies_above(tmp_path, above):
    tiny_llama().save_pretrained(tmp_path / "float")
    settings = {"quantization_config": GroupQuantConfig()}
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", **settings)
    packed.save_pretrained(tmp_path / "all" / "inner")
    if above:
        other = LlamaConfig(**{**SIZES, "hidden_size": 128}, vocab_size=64)
        transformers.LlamaForCausalLM(other).save_pretrained(tmp_path / "other")
        AutoModelForCausalLM.from_pretrained(tmp_path / "other", **settings).save_pretrained(tmp_path / "all")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "all", subfolder="inner")
    assert torch.equal(logits(found, tokens()), logits(packed, tokens()))


@pytest.mark.parametrize(
    "command", [["quantize", "float", "float"], ["merge", "adapter", "adapter"], ["merge", "adapter", "float"]]
)
def test_an_output_does_not_replace_what_it_is_made_from(tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("float")
    base = AutoModelForCausalLM.from_pretrained("float", quantization_config=GroupQuantConfig())
    get_peft_model(base, QBLoRAConfig(r=1, quantization_aware=True)).save_pretrained("adapter")
    before = sorted(path for path in Path().rglob("*"))
    assert main([*command, "--overwrite"]) == 1
    assert "would replace" in capsys.readouterr().err
    assert sorted(path for path in Path().rglob("*")) == before


def test_a_weight_beyond_the_scales_type_is_refused(tmp_path):
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = 2e6
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"scale of .* is beyond float16; set scale_dtype"):
        quantize_model_(model, GroupQuantConfig())
    wide = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GroupQuantConfig(scale_dtype="bfloat16"))
    assert logits(wide, tokens()).isfinite().all()


def test_quantizing_again_adds_an_adapter_that_is_merged_already_only_once(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig(bits=8))
    shared = {"r": 1, "out_factor": 2, "init_lora_weights": False}
    model = get_peft_model(base, QBLoRAConfig(**shared, quantization_aware=True), adapter_name="groups")
    model.add_adapter("pairs", QBLoRAConfig(**shared, in_factor=2))
    model.base_model.set_adapter(["groups", "pairs"])
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    expected = layer.get_base_layer().dequantize() + sum(layer.get_delta_weight(name) for name in ("groups", "pairs"))
    model.merge_adapter(["groups"])
    merged = merge(model, lossy="requantize").model.layers[0].self_attn.q_proj.dequantize()
    torch.testing.assert_close(
        merged, expected, rtol=0, atol=float(expected.abs().max()) / 127
    )  # half a step of 8 bits


def test_an_adapter_over_a_merged_base_needs_that_base(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "float")
    settings = {"r": 1, "quantization_aware": True, "init_lora_weights": False}
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    merge(get_peft_model(base, QBLoRAConfig(**settings))).save_pretrained(tmp_path / "merged")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), QBLoRAConfig(**settings))
    model.save_pretrained(tmp_path / "second")
    assert torch.equal(logits(load_adapter(tmp_path / "second"), tokens()), logits(model.eval(), tokens()))
    with pytest.raises(ConfigError, match=r"trained over a merged base, which .*float is not"):
        load_adapter(tmp_path / "second", str(tmp_path / "float"))
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=GroupQuantConfig())
    with pytest.warns(UserWarning, match=r"merged_adapter=True, and this one has group_quant merged_adapter=False"):
        PeftModel.from_pretrained(fresh, tmp_path / "second")


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("/moved/base", r"is no folder here\."),
        ("moved/base", r"is no folder here, nor could it be fetched from the hub \(.*\)\."),
        ("adapter", r"is no folder of a model \(.*\)\."),
    ],
)
def test_a_base_that_is_not_there_is_named_with_the_way_to_name_another(tmp_path, monkeypatch, base, said):
    monkeypatch.chdir(tmp_path)
    get_peft_model(tiny_llama(), QBLoRAConfig(r=1, task_type="CAUSAL_LM")).save_pretrained("adapter")
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": base}))
    with pytest.raises(
        ConfigError, match=rf"adapter needs its base, and {base} {said} Name another: .* OUTPUT --base MODEL"
    ):
        load_adapter("adapter")
