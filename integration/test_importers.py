"""Importers against the libraries that own the formats, on files which those libraries wrote, and on a real model.

    python -m pytest integration/test_importers.py

Each test needs one library and skips with its name where that is not installed. gptqmodel wants transformers 5, the
others run on 4.57; AutoAWQ is no longer maintained and imports on neither, so its two packing modules are loaded on
their own.
"""

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from integration.demo.smollm2 import smollm2, smollm2_gguf
from qbl_trl import QBLoRAConfig, merge
from qbl_trl.quant.importers import convert_checkpoint, read_layers
from qbl_trl.quant.linear import GroupQuantLinear
from tests.quant.foreign import gptq_tensors, random_affine, write_folder
from tests.tiny import SIZES, logits, tiny_llama, tokens

TEXT = (
    "The Union is stronger when its people are, and the work of a generation is measured by what it leaves to the "
    "next: schools, roads, a sound currency, and laws which bind the powerful as they bind the weak."
)


def needs(library: str) -> None:
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed: pip install {library}")


def write_layer(folder: Path, tensors: dict[str, Tensor], quantization: dict) -> Path:
    """A checkpoint folder with the single layer `layer`."""
    folder.mkdir()
    save_file({f"layer.{key}": value.contiguous() for key, value in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": quantization}))
    return folder


def only_layer(folder: Path) -> GroupQuantLinear:
    return dict(read_layers(folder))["layer"]


# ---- a real model


def test_smollm2_from_gguf_gives_the_logits_of_transformers(tmp_path):
    needs("gguf")
    source = smollm2_gguf()
    convert_checkpoint(source, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    theirs = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    packed = [name for name, module in ours.named_modules() if isinstance(module, GroupQuantLinear)]
    assert len(packed) == 210
    ids = AutoTokenizer.from_pretrained(smollm2())(TEXT, return_tensors="pt")["input_ids"]
    assert (logits(ours, ids) - logits(theirs, ids)).abs().max() <= 1e-4


MEASURE = """
import resource, sys
import torch, transformers, qbl_trl
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from qbl_trl.quant.importers import convert_checkpoint
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = peak()
convert_checkpoint(sys.argv[1], sys.argv[2])
print((peak() - start) / 1024)
"""


def test_smollm2_is_converted_in_less_than_a_gigabyte(tmp_path):
    needs("gguf")
    command = [sys.executable, "-c", MEASURE, str(smollm2_gguf()), str(tmp_path / "ours")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout.split()[-1]) < 1024


# ---- models that transformers loaded with the format's own library


def test_a_gptq_model_trains_and_merges_with_its_codes(tmp_path):
    needs("gptqmodel")
    try:
        import optimum.gptq  # noqa: F401
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    except ImportError as error:
        pytest.skip(f"gptqmodel does not import here (it wants transformers 5 and optimum): {error}")
    from transformers import GPTQConfig

    settings = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
    _, affines = write_folder(
        tmp_path / "in", lambda affine: gptq_tensors(affine, 4), settings, lambda *at: random_affine(*at[:2], 4, at[2])
    )
    # Its kernels for inference refuse training.
    config = GPTQConfig(bits=4, backend="gptq_torch")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "in", quantization_config=config, device_map="cpu")
    assert isinstance(base.model.layers[0].self_attn.q_proj, TorchLinear)
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = merge(model.eval())
    for name, affine in affines.items():
        assert torch.equal(merged.get_submodule(name).affine().codes, affine.codes)
    torch.testing.assert_close(logits(merged, tokens()), logits(model, tokens()), rtol=0, atol=2e-3)  # its float16


def test_an_hqq_model_trains_and_merges_with_its_codes(tmp_path):
    needs("hqq")
    from transformers import HqqConfig

    tiny_llama().save_pretrained(tmp_path / "in")
    config = HqqConfig(nbits=4, group_size=32, axis=1)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "in", quantization_config=config, device_map="cpu")
    model = get_peft_model(base, QBLoRAConfig(r=4, quantization_aware=True, init_lora_weights=False))
    model.train()(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    merged = merge(model.eval())
    torch.testing.assert_close(logits(merged, tokens()), logits(model, tokens()), rtol=0, atol=2e-5)  # float32
    merged.save_pretrained(tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tokens()), logits(merged, tokens()))


# ---- one layer each


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_hqq(tmp_path, bits, dtype):
    needs("hqq")
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    settings = BaseQuantizeConfig(nbits=bits, group_size=64, axis=1)
    layer = HQQLinear(nn.Linear(256, 96), settings, compute_dtype=dtype, device="cpu")
    folder = write_layer(tmp_path / "in", layer.state_dict(), {"quant_method": "hqq"})
    ours = only_layer(folder)
    # The library multiplies in its compute dtype; float16 keeps 11 bits of each factor's result.
    tolerance = 0 if dtype == torch.float32 else 1e-3
    torch.testing.assert_close(ours.dequantize(), layer.dequantize().float(), rtol=tolerance, atol=tolerance * 0.06)
    assert torch.equal(ours.zeros, layer.meta["zero"].reshape(96, 4))
    assert torch.equal(ours.scales, layer.meta["scale"].reshape(96, 4))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [32, None])
def test_compressed_tensors(tmp_path, bits, symmetric, group_size):
    needs("compressed_tensors")
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    strategy = "group" if group_size else "channel"
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, group_size=group_size)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format="pack-quantized")
    weight = torch.randn(48, 128)
    shape = (48, 128 // group_size if group_size else 1)
    low = -(1 << (bits - 1))
    zeros = torch.zeros(shape) if symmetric else torch.randint(low, -low, shape).float()
    given = {
        "weight": weight,
        "weight_scale": torch.rand(shape) * 0.1 + 0.05,
        "weight_zero_point": zeros.to(torch.int8),
    }
    state = PackedQuantizationCompressor.compress(given, scheme)
    expected = PackedQuantizationCompressor.decompress(state, scheme)["weight"]
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": json.loads(scheme.model_dump_json())},
    }
    ours = only_layer(write_layer(tmp_path / "in", state, quantization))
    assert torch.equal(ours.dequantize(), expected.float())
    assert (ours.zeros is None) == symmetric


@functools.cache
def awq_modules() -> tuple[types.ModuleType, types.ModuleType, types.ModuleType]:
    """AutoAWQ's packers and unpackers, without the package around them."""
    needs("awq")
    root = Path(importlib.util.find_spec("awq").origin).parent
    for name in ("awq", "awq.modules", "awq.modules.linear", "awq.utils"):
        package = types.ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        sys.modules[name] = package
    names = ("awq.modules.linear.gemm", "awq.modules.linear.gemv", "awq.utils.packing_utils")
    gemm, gemv, packing = (importlib.import_module(name) for name in names)
    gemm.get_best_device = lambda: "cpu"
    return gemm, gemv, packing


@pytest.mark.parametrize("version", ["gemm", "gemv"])
def test_autoawq(tmp_path, version):
    gemm, gemv, packing = awq_modules()
    float_layer = nn.Linear(256, 64).half()
    scales = torch.rand(64, 8).half() * 0.005 + 0.005
    zeros = torch.randint(0, 16, (64, 8))
    grouped = (float_layer.weight.data.unflatten(1, (8, 32)) / scales[..., None] + zeros[..., None]).round()
    steps = grouped.clamp(0, 15) - zeros[..., None]
    float_layer.weight.data = (steps.float() * scales[..., None].float()).flatten(1).half()
    if version == "gemm":
        layer = gemm.WQLinear_GEMM.from_linear(float_layer, 4, 32, scales=scales.T.contiguous(), zeros=zeros.T)
        expected = packing.dequantize_gemm(layer.qweight, layer.qzeros, layer.scales, 4, 32).T
    else:
        layer = gemv.WQLinear_GEMV.from_linear(float_layer, 4, 32, scales=scales, zeros=zeros)
        expected = float_layer.weight.data
    settings = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": version}
    ours = only_layer(write_layer(tmp_path / "in", layer.state_dict(), settings))
    torch.testing.assert_close(ours.dequantize(), expected.float(), rtol=1e-3, atol=0)  # theirs is in float16
    assert torch.equal(ours.scales, scales)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_gptqmodel(tmp_path, bits, checkpoint_format):
    needs("gptqmodel")
    try:
        from gptqmodel.nn_modules.qlinear.torch import TorchLinear
        from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
    except ImportError as error:
        pytest.skip(f"gptqmodel does not import here (it wants transformers 5): {error}")
    float_layer = nn.Linear(256, 64).half()
    top = (1 << bits) - 1
    scales, zeros = torch.rand(64, 8).half() * 0.2 / top + 0.1 / top, torch.randint(0, top + 1, (64, 8)).half()
    index = (torch.arange(256) // 32).int()
    layer = TorchLinear(bits, 32, False, False, 256, 64, bias=True)
    layer.pack(float_layer, scales, zeros, index)
    layer.post_init()
    expected = layer.dequantize_weight().T.clone()
    if checkpoint_format == "gptq":
        convert_gptq_v2_to_v1_format_module(layer, types.SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    state = {key: value for key, value in layer.state_dict().items() if key in ("qweight", "qzeros", "scales", "g_idx")}
    state["bias"] = layer.bias
    settings = {"quant_method": "gptq", "bits": bits, "group_size": 32, "desc_act": False, "sym": False}
    settings["checkpoint_format"] = checkpoint_format
    ours = only_layer(write_layer(tmp_path / "in", state, settings))
    torch.testing.assert_close(ours.dequantize(), expected.float(), rtol=1e-3, atol=0)  # theirs is in float16
    assert torch.equal(ours.zero_points().float(), zeros.float())


# ---- whole models, quantized and saved by their library

AUTO_ROUND = """
import sys
import torch
import transformers
from auto_round import AutoRound
source, target, format, symmetric, bits = sys.argv[1:]
settings = {"bits": int(bits), "group_size": 32, "sym": symmetric == "1", "iters": 0, "disable_opt_rtn": True}
rounder = AutoRound(source, device_map="cpu", **settings)
model, folder = rounder.quantize_and_save(target, format=format)
print("FOLDER", folder)
"""


@pytest.mark.parametrize(
    ("format", "bits"),
    [
        *(
            (format, 4)
            for format in ("auto_round", "auto_round:auto_gptq", "auto_round:auto_awq", "auto_gptq", "auto_awq")
        ),
        *((format, 3) for format in ("auto_round", "auto_gptq")),
    ],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_auto_round(tmp_path, format, bits, symmetric):
    needs("auto_round")
    source = tmp_path / "float"
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    model = tiny_llama(vocab_size=len(tokenizer))
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    command = [sys.executable, "-c", AUTO_ROUND, str(source), str(tmp_path / "in"), format, str(int(symmetric))]
    command.append(str(bits))
    environment = os.environ | {"TORCHDYNAMO_DISABLE": "1"}  # its packers are compiled otherwise
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = result.stdout.split("FOLDER ")[-1].strip()
    convert_checkpoint(folder, tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    quantized = [name for name, module in ours.named_modules() if isinstance(module, GroupQuantLinear)]
    assert len(quantized) == 14
    for name in quantized:
        layer, weight = ours.get_submodule(name), model.get_submodule(name).weight
        # Rounding to nearest: every weight within half a code of where it was, up to clipping at the ends.
        wrong = (layer.dequantize() - weight).abs().unflatten(1, (-1, 32))
        steps = layer.affine().codes.unflatten(1, (-1, 32)).int()
        if symmetric and bits == 3:
            steps -= 4  # they lie around the middle of 4 bits
        inside = (steps > 0) & (steps < (1 << bits) - 1)
        assert (wrong <= 0.55 * layer.scales.float().abs().unsqueeze(-1))[inside].all(), name
    reference = logits(model, tokens(2, 16))
    assert (logits(ours, tokens(2, 16)) - reference).norm() < (0.2 if bits == 4 else 0.5) * reference.norm()


MLX = """
import json, sys
import mlx.core as mx
from mlx_lm import convert, load
source, target, ids, bits = sys.argv[1:]
convert(source, target, quantize=True, q_bits=int(bits), q_group_size=32)
model, _ = load(target)
print("LOGITS", json.dumps(model(mx.array(json.loads(ids))).astype(mx.float32).tolist()))
"""


LLAMA = [("Llama", bits) for bits in (2, 3, 4, 5, 6, 8)]


@pytest.mark.parametrize(("kind", "bits"), [*LLAMA, ("Qwen3", 4), ("Mixtral", 4)])
def test_mlx(tmp_path, kind, bits):
    needs("mlx_lm")
    tokenizer, ids = AutoTokenizer.from_pretrained(smollm2()), tokens(1, 16)
    sizes = {**SIZES, "vocab_size": len(tokenizer), "head_dim": 16, "tie_word_embeddings": kind == "Qwen3"}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes, **({"num_local_experts": 4} if kind == "Mixtral" else {}))
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    folders = [str(tmp_path / "float"), str(tmp_path / "mlx")]
    command = [sys.executable, "-c", MLX, *folders, json.dumps(ids.tolist()), str(bits)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    expected = torch.tensor(json.loads(result.stdout.split("LOGITS ")[-1]))
    convert_checkpoint(tmp_path / "mlx", tmp_path / "ours")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", dtype=torch.float32)
    torch.testing.assert_close(logits(ours, ids), expected, rtol=0, atol=1e-5)  # float32 on both sides
