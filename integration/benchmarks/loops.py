"""The loops that decode.py times: a bare session, ORTModelForCausalLM, ONNX Runtime GenAI, llama.cpp, torch.

Graphs of one loop take turns by whole generations, so that the machine's moods hit all of them alike. ONNX Runtime's
open theirs anew for every turn, alone: where the weights come to lie in memory makes the steps of one and the same
graph up to a tenth slower, for as long as its session lives.
"""

import argparse
import importlib.util
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

from integration.benchmarks.graphs import merged_gguf, packed_model, set_random_adapter_
from integration.demo.smollm2 import smollm2_gguf

_WARM_UP = 4  # steps
Turn = tuple[float, float]  # seconds of the prefill, seconds of one decoding step


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


def memory_bandwidth(threads: int) -> float:
    """Bytes per second of reading 800 MB, the best of five."""
    values = torch.ones(200_000_000)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


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
    ids = np.arange(1, args.prompt + 1)[None]

    def turn(name: str) -> Turn:
        opened, size = session(folders[name], args.threads), head_size(folders[name])
        step(opened, ids, args.prompt, size)
        prefill, cache = step(opened, ids, args.prompt, size)
        times = []
        for length in range(args.prompt + 1, args.prompt + args.new + 1):
            taken, cache = step(opened, ids[:, :1], length, cache)
            times.append(taken)
        return prefill, median(times[_WARM_UP:])

    found = take_turns("bare session", list(folders), args.rounds, turn)
    return rows_of("bare session", sizes_of(folders), found, args, bandwidth, unread_of(folders))


def head_size(folder: Path) -> int:
    """The size of heads that GenAI is told of, 64 where it is not."""
    file = folder / "genai_config.json"
    return int(json.loads(file.read_text())["model"]["decoder"]["head_size"]) if file.is_file() else 64


def session(folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """One session with a fixed number of threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])


def step(
    opened: onnxruntime.InferenceSession, ids: Any, length: int, cache: dict[str, Any] | int
) -> tuple[float, dict[str, Any]]:
    """Run new tokens over a cache; the seconds ONNX Runtime took, and the new cache.

    Args:
        cache: of an earlier step; for the first, the size of heads, which GenAI's graphs leave open.
    """
    inputs = {value.name: value for value in opened.get_inputs()}
    outputs = {value.name: value for value in opened.get_outputs()}
    pasts = {name: next(past for past in _pasts_of(name) if past in inputs) for name in outputs if name != "logits"}
    if isinstance(cache, int):
        cache = {past: _empty(inputs[past], outputs[name], cache) for name, past in pasts.items()}
    feed = {"input_ids": ids, "attention_mask": np.ones((1, length), np.int64), **cache}
    if "position_ids" in inputs:
        places = np.arange(length - ids.shape[1], length)
        feed["position_ids"] = np.broadcast_to(places, (1,) * (len(inputs["position_ids"].shape) - 1) + places.shape)
        if len(inputs["position_ids"].shape) == 3:  # of images, which text has three times
            feed["position_ids"] = feed["position_ids"].repeat(3, 0)
    start = time.perf_counter()
    made = opened.run(None, feed)
    taken = time.perf_counter() - start
    named = dict(zip(outputs, made, strict=True))
    return taken, {past: named[name] for name, past in pasts.items()}


def _pasts_of(name: str) -> list[str]:
    """Names that the input may have which takes what an output gives."""
    return [name.replace("present", past) for past in ("past_key_values", "past")]


def _empty(given: Any, made: Any, head: int) -> np.ndarray:
    """A cache of no token, or a state that holds nothing."""
    kinds = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
    grows = made.name.endswith((".key", ".value"))
    shape = [1, *(0 if grows and axis == 2 else size for axis, size in enumerate(made.shape[1:], 1))]
    return np.zeros([size if isinstance(size, int) else head for size in shape], kinds[given.type])


def optimum_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """ORTModelForCausalLM.generate, torch limited to one thread: one new token, then all of them."""
    from optimum.onnxruntime import ORTModelForCausalLM

    torch.set_num_threads(1)
    ids = torch.arange(1, args.prompt + 1).unsqueeze(0)

    for folder in folders.values():
        if not (folder / "config.json").is_file():  # GenAI's builder writes none
            (folder / "config.json").write_text((args.model / "config.json").read_text())

    def turn(name: str) -> Turn:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        return generation(ORTModelForCausalLM.from_pretrained(folders[name], session_options=options), ids, args)

    found = take_turns("ORTModelForCausalLM", list(folders), args.rounds, turn)
    torch.set_num_threads(args.threads)
    return rows_of("ORTModelForCausalLM", sizes_of(folders), found, args, bandwidth, unread_of(folders))


def generation(model: Any, ids: torch.Tensor, args: argparse.Namespace) -> Turn:
    """A turn of `generate`: one new token (the second time), then all of them."""

    def seconds(new: int) -> float:
        start = time.perf_counter()
        mask = torch.ones_like(ids)
        model.generate(ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False)
        return time.perf_counter() - start

    seconds(1)
    short = seconds(1)
    return short, (seconds(args.new) - short) / (args.new - 1)


def torch_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """torch itself: the float model and the packed one with a merged adapter, through `generate`."""
    ids = torch.arange(1, args.prompt + 1).unsqueeze(0)
    packed = packed_model(args.model, quantize_embeddings=True)
    set_random_adapter_(packed)
    models = {
        "float32": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        "4-bit groups, merged adapter": packed,
    }
    sizes = {name: model.get_memory_footprint() for name, model in models.items()}
    found = take_turns("torch", list(models), args.rounds, lambda name: generation(models[name], ids, args))
    return rows_of("torch", sizes, found, args, bandwidth)


def genai_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """ONNX Runtime GenAI, where it is installed."""
    try:
        import onnxruntime_genai as genai
    except ImportError:
        return []
    runnable = {name: folder / "genai_config.json" for name, folder in folders.items()}
    runnable = {name: file for name, file in runnable.items() if file.is_file()}
    for file in runnable.values():
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = args.threads
        file.write_text(json.dumps(config, indent=2))

    def turn(name: str) -> Turn:
        model = genai.Model(str(folders[name]))
        length = args.prompt + args.new

        def started() -> tuple[Any, float]:
            params = genai.GeneratorParams(model)
            params.set_search_options(max_length=length, min_length=length, do_sample=False)
            generator, start = genai.Generator(model, params), time.perf_counter()
            generator.append_tokens(list(range(1, args.prompt + 1)))
            generator.generate_next_token()
            return generator, time.perf_counter() - start

        started()
        generator, first = started()
        start, count = time.perf_counter(), 0
        while not generator.is_done():
            generator.generate_next_token()
            count += 1
        return first, (time.perf_counter() - start) / max(count, 1)

    found = take_turns("GenAI runtime", list(runnable), args.rounds, turn)
    return rows_of("GenAI runtime", sizes_of(folders), found, args, bandwidth, unread_of(folders))


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


def sizes_of(folders: dict[str, Path]) -> dict[str, int]:
    """Bytes of the graphs and their weights."""
    return {name: sum(path.stat().st_size for path in folder.glob("*.onnx*")) for name, folder in folders.items()}


def unread_of(folders: dict[str, Path]) -> dict[str, int]:
    """Those of these bytes that no step reads: weights that prompts have of their own."""
    graphs = {
        name: onnx.load(folder / "model.onnx", load_external_data=False).graph for name, folder in folders.items()
    }
    return {
        name: sum(math.prod(weight.dims) for weight in graph.initializer if weight.name.endswith("/int8"))
        for name, graph in graphs.items()
    }


def rows_of(
    loop: str,
    sizes: dict[str, int],
    found: dict[str, list[Turn]],
    args: argparse.Namespace,
    bandwidth: float,
    unread: Mapping[str, int] = MappingProxyType({}),
) -> list[Row]:
    """Median speeds, and the medians of the ratios to the first graph in the same turn.

    Args:
        unread: bytes of `sizes` that no step reads.
    """
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
                bandwidth=(sizes[name] - unread.get(name, 0)) / decode / bandwidth,
            )
        )
    return rows
