"""The graphs that decode.py compares: ours, GenAI's, Optimum's, and a GGUF file, all of one model."""

import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from integration.demo.smollm2 import smollm2_gguf
from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.quant.importers import convert_checkpoint
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.writers import write_checkpoint

ADAPTER_STEPS = 0.08  # of the codes, root mean square: as the median layer of the adapter that the demo trains


def build(
    source: Path, work: Path, genai_python: str | None, seconds: dict[str, float], names: list[str] | None = None
) -> dict[str, Path]:
    """Every graph of the comparison, or those of some names, by name; those that are there already are kept."""
    work.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}

    def add(name: str, make: Callable[[Path], Any]) -> None:
        if names is None or name in names:
            once(work / name, make, folders, seconds)

    if genai_python:
        add("genai int4", lambda out: genai_build(genai_python, source, out))
        add("genai int4, last logits", lambda out: genai_build(genai_python, source, out, "prune_lm_head=true"))
    quick = {"accuracy_level": 4, "merged": True}
    add("ours int8 activations", lambda out: ours(source, out, **quick))
    add("ours int8 activations, last logits", lambda out: ours(source, out, **quick, logits="last"))
    floats = {"logits": "last", "prompt_accuracy_level": 0}
    add("ours, float prompts, last logits", lambda out: ours(source, out, **quick, **floats))
    cached = "ours, float prompts, last logits, int8 cache"
    add(cached, lambda out: ours(source, out, **quick, **floats, kv_cache_dtype="int8"))
    bare = {"accuracy_level": 4, "merged": False}
    add(cached.replace("ours", "base"), lambda out: ours(source, out, **bare, **floats, kv_cache_dtype="int8"))
    integers = {"logits": "last", "prompt_weights": "int8", "kv_cache_dtype": "int8"}
    add("ours, int8 prompts, last logits, int8 cache", lambda out: ours(source, out, **quick, **integers))
    if genai_python:
        add("genai int4, int8 cache", lambda out: genai_build_int8_cache(genai_python, source, out, folders[cached]))
    add("base int8 activations", lambda out: ours(source, out, **bare))
    add("ours exact, last logits", lambda out: ours(source, out, merged=True, logits="last"))
    add("ours int8 activations, Attention", lambda out: ours(source, out, **quick, attention="attention"))
    add("optimum fp32", lambda out: optimum_fp32(source, out))
    return folders


def once(folder: Path, make: Callable[[Path], Any], folders: dict[str, Path], seconds: dict[str, float]) -> None:
    """Make a graph where it is not there already, and note where it is and how long it took."""
    folders[folder.name] = folder
    if not (folder / "model.onnx").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        start = time.perf_counter()
        make(folder)
        seconds[folder.name] = time.perf_counter() - start


def ours(source: Path, out: Path, merged: bool, **options: Any) -> None:
    """The base in groups of 32 and a random merged adapter; the embedding is packed by the export."""
    model = packed_model(source)
    if merged:
        set_random_adapter_(model)
    export_onnx(model, out, tokenizer=source, overwrite=True, embedding_bits=4, **options)


def packed_model(source: Path, **options: Any) -> Any:
    """The base in groups of 32."""
    quantization = GroupQuantConfig(bits=4, group_size=32, **options)
    sees = "vision_config" in json.loads((source / "config.json").read_text())
    kind = AutoModelForImageTextToText if sees else AutoModelForCausalLM
    return kind.from_pretrained(source, dtype=torch.float32, quantization_config=quantization)


def set_random_adapter_(model: Any) -> None:
    """One value per block of 32 by 2 weights of every packed layer but the head."""
    head, generator = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, GroupQuantLinear) and layer is not head:
            step = float(layer.scales.float().square().mean().sqrt())
            delta = torch.randn(layer.out_features // 2, layer.in_features // 32, generator=generator)
            layer.set_delta(delta * ADAPTER_STEPS * step, 32, 2)


def genai_build(python: str, source: Path, out: Path, *more: str) -> None:
    """GenAI's own int4 graph: block 32, 8-bit activations."""
    options = ["-p", "int4", "-e", "cpu", "-c", str(out) + ".cache", "--extra_options"]
    settings = ["int4_block_size=32", "int4_accuracy_level=4", *more]
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out), *options, *settings]
    subprocess.run(command, check=True)


def genai_build_int8_cache(python: str, source: Path, out: Path, measured: Path) -> None:
    """The same over a cache of 8 bits, with the scales of a folder of ours: its own calibration needs a graph first."""
    graph = onnx.load(measured / "model.onnx", load_external_data=False).graph
    weights = [weight for weight in graph.initializer if weight.name.endswith((".key.scale", ".value.scale"))]
    found = {weight.name: onnx.numpy_helper.to_array(weight).ravel() for weight in weights}
    layers = len(found) // 2
    scales = {
        f"{part[0]}_scales": [found[f"past_key_values.{layer}.{part}.scale"].tolist() for layer in range(layers)]
        for part in ("key", "value")
    }
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"scales": scales}, file)
        file.flush()
        settings = ["kv_cache_quant_scheme=int8_per_channel", f"kv_cache_scale_file={file.name}"]
        genai_build(python, source, out, *settings)


def optimum_fp32(source: Path, out: Path) -> None:
    """What Optimum exports by itself; its last steps know no graph of more than 2 GB."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    large = sum(weight.nbytes for weight in model.parameters()) >= onnx.checker.MAXIMUM_PROTOBUF
    onnx_export_from_model(model, out, task="text-generation-with-past", do_validation=False, no_post_process=large)


def random_llama(shape: str, work: Path, tokenizer: Path) -> Path:
    """A float Llama of random weights, HIDDENxLAYERS, with a tokenizer: GenAI's builder asks for one."""
    hidden, layers = (int(part) for part in shape.split("x"))
    folder = work / f"random-llama-{shape}"
    if not folder.is_dir():
        config = LlamaConfig(
            hidden_size=hidden,
            intermediate_size=hidden * 4,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 64,
            num_key_value_heads=max(hidden // 256, 1),
            vocab_size=49152,
            max_position_embeddings=4096,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def random_qwen(shape: str, work: Path, tokenizer: Path) -> Path:
    """A float Qwen 3.5 of random weights, HIDDENxLAYERS, three of four layers with a delta rule; transformers 5.

    It has a tower of one layer: GenAI's builder knows the model with one alone.
    """
    from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

    hidden, layers = (int(part) for part in shape.split("x"))
    folder = work / f"random-qwen3.5-{shape}"
    if not folder.is_dir():
        text = {
            "hidden_size": hidden,
            "intermediate_size": hidden * 7 // 2,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 128,
            "num_key_value_heads": max(hidden // 512, 1),
            "head_dim": 256,
            "linear_num_value_heads": hidden // 64,
            "linear_num_key_heads": hidden // 64,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 0.25,
                "mrope_section": [11, 11, 10],
                "mrope_interleaved": True,
            },
            "vocab_size": 49152,
            "max_position_embeddings": 4096,
        }
        tower = {"depth": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": hidden}
        config = Qwen3_5Config(text_config=text, vision_config=tower, tie_word_embeddings=True)
        Qwen3_5ForConditionalGeneration(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def merged_gguf(folders: dict[str, Path]) -> Path:
    """The published GGUF file with a random merged adapter in its offsets."""
    file = next(iter(folders.values())).parent / "merged.gguf"
    if not file.is_file():
        with tempfile.TemporaryDirectory() as base:
            convert_checkpoint(smollm2_gguf(), Path(base) / "model")
            model = AutoModelForCausalLM.from_pretrained(Path(base) / "model", dtype=torch.float32)
            set_random_adapter_(model)
            write_checkpoint(model, file, "gguf", template=smollm2_gguf())
    return file
