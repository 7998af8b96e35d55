"""Prefill and decode speed of exported folders, beside ONNX Runtime GenAI's builder, Optimum's fp32 export and torch.

    python -m integration.benchmarks.decode --genai_python /path/to/genai/env/bin/python

GenAI's builder needs transformers 5, so it runs in an environment of its own; without one its rows are left out. All
graphs of one loop are measured in turn, in one process, so that whatever else the machine does hits all of them
alike; speeds are medians, and ratios medians of the ratios within a turn. Our graphs hold a merged adapter (one value
per block of 32 by 2 weights) over the same int4 embedding and head as GenAI's; `base` is the same without the adapter:
the difference is what it costs. llama.cpp runs SmolLM2 from its GGUF file, as published and with a merged adapter
(`qbl-trl convert --to gguf`).
The results are written to integration/benchmarks/results/decode.json.
"""

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from integration.demo.data import smollm2_gguf
from qbl_trl import GroupQuantConfig, export_onnx
from qbl_trl.quant.importers import convert_checkpoint
from qbl_trl.quant.linear import GroupQuantLinear
from qbl_trl.quant.writers import write_checkpoint

RESULTS = Path(__file__).parent / "results" / "decode.json"
_WARM_UP = 4  # steps


@dataclass
class Row:
    """One graph in one loop: tokens per second, ratios to the loop's first graph, share of what the machine reads."""

    graph: str
    loop: str
    megabytes: float
    prefill: float
    decode: float
    prefill_ratio: float
    decode_ratio: float
    bandwidth: float


def make_parser() -> argparse.ArgumentParser:
    """What this benchmark can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    default = Path(os.environ.get("QBL_CACHE") or "~/.cache/qbl_trl").expanduser() / "models/smollm2-135m-instruct"
    parser.add_argument("--model", type=Path, default=default, help="float folder; see integration/demo/data.py")
    parser.add_argument("--random", help="HIDDENxLAYERS of a Llama with random weights instead, such as 1024x16")
    parser.add_argument("--work", type=Path, default=Path("outputs/decode"), help="where graphs are kept between runs")
    parser.add_argument("--genai_python", help="interpreter with onnxruntime-genai and transformers 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of ONNX Runtime and of torch")
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser


def main(args: argparse.Namespace) -> None:
    """Build what is missing, measure, print, write."""
    torch.set_num_threads(args.threads)
    if args.random:
        args.model = random_llama(args.random, args.work, args.model)
    source = args.model
    seconds: dict[str, float] = {}
    folders = build(source, args.work / source.name, args.genai_python, seconds)
    bandwidth = memory_bandwidth(args.threads)
    rows: list[Row] = []
    for loop in (bare_sessions, optimum_loop, genai_loop, llama_loop):
        measured = loop(folders, args, bandwidth)
        print(table(measured), flush=True)
        rows += measured
    entry = {
        "model": source.name,
        "machine": platform.processor() or platform.machine(),
        "threads": args.threads,
        "load_average": os.getloadavg()[0],
        "bandwidth_gb_s": bandwidth / 1e9,
        "versions": {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__},
        "build_seconds": seconds,
        "rows": [asdict(row) for row in rows],
    }
    known = json.loads(args.output.read_text()) if args.output.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({**known, source.name: entry}, indent=1) + "\n")


# ---- graphs


def build(source: Path, work: Path, genai_python: str | None, seconds: dict[str, float]) -> dict[str, Path]:
    """Every graph of the comparison, by name; those that are there already are kept."""
    work.mkdir(parents=True, exist_ok=True)
    folders: dict[str, Path] = {}

    def once(name: str, make: Callable[[Path], Any]) -> None:
        folders[name] = work / name
        if not (work / name / "model.onnx").is_file():
            start = time.perf_counter()
            make(work / name)
            seconds[name] = time.perf_counter() - start

    if genai_python:
        once("genai int4", lambda out: genai_build(genai_python, source, out))
    once("ours int8 activations", lambda out: ours(source, out, merged=True, accuracy_level=4))
    once("ours int8 activations, last logits", lambda out: ours(source, out, True, accuracy_level=4, logits="last"))
    once("base int8 activations", lambda out: ours(source, out, merged=False, accuracy_level=4))
    once("ours exact, last logits", lambda out: ours(source, out, merged=True, logits="last"))
    gqa = {"accuracy_level": 4, "attention": "gqa"}
    once("ours int8 activations, gqa", lambda out: ours(source, out, merged=True, **gqa))
    once("base int8 activations, gqa", lambda out: ours(source, out, merged=False, **gqa))
    once("optimum fp32", lambda out: optimum_fp32(source, out))
    return folders


def ours(source: Path, out: Path, merged: bool, **options: Any) -> None:
    """The base in groups of 32 with its embedding, and a random merged adapter."""
    quantization = GroupQuantConfig(bits=4, group_size=32, quantize_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, quantization_config=quantization)
    if merged:
        set_random_adapter_(model)
    export_onnx(model, out, tokenizer=source, overwrite=True, **options)


def set_random_adapter_(model: Any) -> None:
    """One value per block of 32 by 2 weights of every packed layer but the head."""
    head, generator = model.get_output_embeddings(), torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, GroupQuantLinear) and layer is not head:
            delta = torch.randn(layer.out_features // 2, layer.in_features // 32, generator=generator) * 1e-3
            layer.set_delta(delta, 32, 2)


def genai_build(python: str, source: Path, out: Path) -> None:
    """GenAI's own int4 graph: block 32, 8-bit activations."""
    options = ["-p", "int4", "-e", "cpu", "-c", str(out) + ".cache", "--extra_options"]
    settings = ["int4_block_size=32", "int4_accuracy_level=4"]
    command = [python, "-m", "onnxruntime_genai.models.builder", "-i", str(source), "-o", str(out), *options, *settings]
    subprocess.run(command, check=True)


def optimum_fp32(source: Path, out: Path) -> None:
    """What Optimum exports by itself."""
    from optimum.exporters.onnx import onnx_export_from_model

    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    onnx_export_from_model(model, out, task="text-generation-with-past", do_validation=False)


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


# ---- loops


def memory_bandwidth(threads: int) -> float:
    """Bytes per second of reading 800 MB, the best of five."""
    values = torch.ones(200_000_000)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


Turn = tuple[float, float]  # seconds of the prefill, seconds of one decoding step


def take_turns(loop: str, names: list[str], rounds: int, turn: Callable[[str], Turn]) -> dict[str, list[Turn]]:
    """Whole generations in turn, forwards and backwards, so that the machine's moods hit all graphs alike.

    Stepping them in turn instead would let each session's threads spin into the next one's step.
    """
    found: dict[str, list[Turn]] = {name: [] for name in names}
    for number in tqdm(range(rounds), desc=loop):
        for name in names if number % 2 == 0 else names[::-1]:
            found[name].append(turn(name))
    return found


def bare_sessions(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """numpy in, numpy out, nothing shared between steps. The first prefill and steps of a turn only warm it up."""
    sessions = {name: session(folder, args.threads) for name, folder in folders.items()}
    ids = np.arange(1, args.prompt + 1)[None]

    def turn(name: str) -> Turn:
        opened = sessions[name]
        step(opened, ids, args.prompt, None)
        prefill, cache = step(opened, ids, args.prompt, None)
        times = []
        for length in range(args.prompt + 1, args.prompt + args.new + 1):
            taken, cache = step(opened, ids[:, :1], length, cache)
            times.append(taken)
        return prefill, median(times[_WARM_UP:])

    found = take_turns("bare session", list(sessions), args.rounds, turn)
    return rows_of("bare session", sizes_of(folders), found, args, bandwidth)


def session(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """One session with a fixed number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(
    opened: onnxruntime.InferenceSession, ids: Any, length: int, cache: dict[str, Any] | None
) -> tuple[float, dict[str, Any]]:
    """Run new tokens over a cache; the seconds ONNX Runtime took, and the new cache."""
    inputs = {value.name: value for value in opened.get_inputs()}
    outputs = opened.get_outputs()
    if cache is None:
        shapes = {value.name: value.shape for value in outputs}
        sizes = next(shape for name, shape in shapes.items() if name == "present.0.key")
        head = sizes[3] if isinstance(sizes[3], int) else 64
        cache = {n: np.zeros((1, sizes[1], 0, head), np.float32) for n in inputs if n.startswith("past")}
    feed = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **cache}
    if "position_ids" in inputs:
        feed["position_ids"] = np.arange(length - ids.shape[1], length)[None]
    start = time.perf_counter()
    made = opened.run(None, feed)
    taken = time.perf_counter() - start
    named = {value.name: array for value, array in zip(outputs, made, strict=True)}
    return taken, {n.replace("present", "past_key_values"): a for n, a in named.items() if n != "logits"}


def optimum_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """ORTModelForCausalLM.generate, torch limited to one thread: one new token, then all of them."""
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.arange(1, args.prompt + 1).unsqueeze(0)
    models = {}
    for name, folder in folders.items():
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        if not (folder / "config.json").is_file():  # GenAI's builder writes none
            (folder / "config.json").write_text((args.model / "config.json").read_text())
        models[name] = ORTModelForCausalLM.from_pretrained(folder, session_options=options)

    def seconds(name: str, new: int) -> float:
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False}
        start = time.perf_counter()
        models[name].generate(ids, min_new_tokens=new, max_new_tokens=new, **options)
        return time.perf_counter() - start

    def turn(name: str) -> Turn:
        seconds(name, 1)
        short = seconds(name, 1)
        return short, (seconds(name, args.new) - short) / (args.new - 1)

    found = take_turns("ORTModelForCausalLM", list(models), args.rounds, turn)
    torch.set_num_threads(args.threads)
    return rows_of("ORTModelForCausalLM", sizes_of(folders), found, args, bandwidth)


def genai_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """ONNX Runtime GenAI, where it is installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return []
    models = {}
    for name, folder in folders.items():
        if (folder / "genai_config.json").is_file():
            config = json.loads((folder / "genai_config.json").read_text())
            config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = args.threads
            (folder / "genai_config.json").write_text(json.dumps(config, indent=2))
            models[name] = genai.Model(str(folder))

    def turn(name: str) -> Turn:
        params = genai.GeneratorParams(models[name])
        length = args.prompt + args.new
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(models[name], params)
        start = time.perf_counter()
        generator.append_tokens(list(range(1, args.prompt + 1)))
        generator.generate_next_token()
        first = time.perf_counter() - start
        start, count = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1
        return first, (time.perf_counter() - start) / max(count, 1)

    found = take_turns("GenAI runtime", list(models), args.rounds, turn)
    return rows_of("GenAI runtime", sizes_of(folders), found, args, bandwidth)


def llama_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """llama.cpp, where it is installed and the model came as a GGUF file: SmolLM2."""
    if args.random or not importlib.util.find_spec("llama_cpp"):
        return []
    from llama_cpp import Llama

    files = {"GGUF Q4_1, as published": smollm2_gguf(), "GGUF Q4_1, merged adapter": merged_gguf(folders)}
    models = {
        name: Llama(str(file), n_ctx=args.prompt + args.new + 8, n_threads=args.threads, verbose=False)
        for name, file in files.items()
    }

    def seconds(name: str, tokens: list[int]) -> float:
        start = time.perf_counter()
        models[name].eval(tokens)
        return time.perf_counter() - start

    def turn(name: str) -> Turn:
        models[name].reset()
        first = seconds(name, list(range(1, args.prompt + 1)))
        return first, median(seconds(name, [1]) for _ in range(args.new))

    found = take_turns("llama.cpp", list(models), args.rounds, turn)
    return rows_of("llama.cpp", {name: file.stat().st_size for name, file in files.items()}, found, args, bandwidth)


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


# ---- report


def sizes_of(folders: dict[str, Path]) -> dict[str, int]:
    """Bytes of the graphs and their weights: what a token reads."""
    return {name: sum(path.stat().st_size for path in folder.glob("model.onnx*")) for name, folder in folders.items()}


def rows_of(
    loop: str, sizes: dict[str, int], found: dict[str, list[Turn]], args: argparse.Namespace, bandwidth: float
) -> list[Row]:
    """Median speeds, and the medians of the ratios to the first graph in the same turn."""
    rows, first = [], next(iter(found.values()))
    for name, turns in found.items():
        prefill, decode = (median(seconds) for seconds in zip(*turns, strict=True))
        ratios = [[theirs[i] / ours[i] for ours, theirs in zip(turns, first, strict=True)] for i in (0, 1)]
        rows.append(
            Row(
                graph=name,
                loop=loop,
                megabytes=sizes[name] / 1e6,
                prefill=args.prompt / prefill,
                decode=1 / decode,
                prefill_ratio=median(ratios[0]),
                decode_ratio=median(ratios[1]),
                bandwidth=sizes[name] / decode / bandwidth,
            )
        )
    return rows


def table(rows: list[Row]) -> str:
    """Text, with ratios to the first graph of each loop."""
    if not rows:
        return "(left out: not installed)"
    titles = ("loop", "graph", "MB", "prefill/s", "ratio", "decode/s", "ratio", "of RAM")
    lines = ["{:<20} {:<36} {:>7} {:>10} {:>6} {:>9} {:>6} {:>7}".format(*titles)]
    for row in rows:
        lines.append(
            f"{row.loop:<20} {row.graph:<36} {row.megabytes:>7.1f} {row.prefill:>10.1f} {row.prefill_ratio:>6.2f} "
            f"{row.decode:>9.1f} {row.decode_ratio:>6.2f} {row.bandwidth:>7.1%}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(make_parser().parse_args())
