"""The loops that decode.py times: a bare session, ORTModelForCausalLM, ONNX Runtime GenAI, llama.cpp, torch."""

import argparse
import importlib.util
import json
import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from transformers import AutoModelForCausalLM

from integration.benchmarks.graphs import merged_gguf, packed_model, set_random_adapter_
from integration.benchmarks.turns import Player, Row, rows_of, take_turns
from integration.demo.smollm2 import smollm2_gguf


def memory_bandwidth(threads: int) -> float:
    """Bytes per second of reading 800 MB, the best of five."""
    values = torch.ones(200_000_000)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - start)
    return values.nbytes / best


def measured(
    loop: str,
    folders: dict[str, Path],
    opened: Mapping[str, Callable[[], Player]],
    args: argparse.Namespace,
    bandwidth: float,
) -> list[Row]:
    """What a loop found of graphs in folders."""
    found = take_turns(loop, opened, args.rounds, args.new)
    return rows_of(loop, sizes_of(folders), found, args.prompt, bandwidth, unread_of(folders))


def bare_sessions(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """numpy in, numpy out, nothing shared between steps."""
    opened = {name: partial(BareSession, folder, args) for name, folder in folders.items()}
    return measured("bare session", folders, opened, args, bandwidth)


class BareSession:
    """Seconds are those inside `run`."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self._session, self._empty = session(folder, args.threads), head_size(folder)
        self._ids = np.arange(1, args.prompt + 1)[None]
        self._length = args.prompt
        self._cache: dict[str, Any] = {}

    def prefill(self) -> float:
        taken, self._cache = step(self._session, self._ids, self._length, self._empty)
        return taken

    def steps(self, count: int) -> list[float]:
        times = []
        for _ in range(count):
            self._length += 1
            taken, self._cache = step(self._session, self._ids[:, :1], self._length, self._cache)
            times.append(taken)
        return times

    def close(self) -> None:
        del self._session, self._cache


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
    """ORTModelForCausalLM.generate, torch limited to one thread."""
    from optimum.onnxruntime import ORTModelForCausalLM

    for folder in folders.values():
        if not (folder / "config.json").is_file():  # GenAI's builder writes none
            (folder / "config.json").write_text((args.model / "config.json").read_text())

    def opened(folder: Path) -> Generating:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = args.threads
        return Generating(ORTModelForCausalLM.from_pretrained(folder, session_options=options), args)

    torch.set_num_threads(1)
    graphs = {name: partial(opened, folder) for name, folder in folders.items()}
    rows = measured("ORTModelForCausalLM", folders, graphs, args, bandwidth)
    torch.set_num_threads(args.threads)
    return rows


class Generating:
    """`generate` of one text, greedily, in a thread that stands still between blocks of steps.

    It hands its tokens to this object, as to a streamer: there it waits until more steps are asked for.
    """

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self._model, self._new = model, args.new + 1  # the first belongs to the prompt
        self._ids = torch.arange(1, args.prompt + 1).unsqueeze(0)
        self._asked, self._done = queue.Queue[int](), queue.Queue[list[float]]()
        self._thread = threading.Thread(target=self._generate_slowly, daemon=True)
        self._left, self._since, self._times = 0, 0.0, list[float]()
        self._failure: Exception | None = None

    def _generate(self, new: int, **options: Any) -> None:
        mask = torch.ones_like(self._ids)
        self._model.generate(
            self._ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, **options
        )

    def _generate_slowly(self) -> None:
        try:
            self._generate(self._new, streamer=self)
        except Exception as failure:
            self._failure = failure
            self._done.put([])

    def prefill(self) -> float:
        return seconds(self._generate, 1)

    def steps(self, count: int) -> list[float]:
        if not self._thread.is_alive():
            self._thread.start()
            self._ask(1)  # reads the prompt
        return self._ask(count)

    def _ask(self, count: int) -> list[float]:
        self._asked.put(count)
        times = self._done.get()
        if self._failure is not None:
            raise self._failure
        return times

    def put(self, tokens: torch.Tensor) -> None:
        """Of the prompt first, then of every step; waits where no step is left."""
        if self._left:
            self._times.append(time.perf_counter() - self._since)
            self._left -= 1
            if not self._left:
                self._done.put(self._times)
        if not self._left:
            self._left, self._times = self._asked.get(), []
        self._since = time.perf_counter()

    def end(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        if self._thread.is_alive():
            self._asked.put(self._new + 1)  # more than there are: it runs to its end
            self._thread.join()
        del self._model


def torch_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """torch itself, over a cache: the float model and the packed one with a merged adapter."""
    packed = packed_model(args.model, quantize_embeddings=True)
    set_random_adapter_(packed)
    models = {
        "float32": AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32),
        "4-bit groups, merged adapter": packed,
    }
    sizes = {name: model.get_memory_footprint() for name, model in models.items()}
    opened = {name: partial(Torch, model, args) for name, model in models.items()}
    found = take_turns("torch", opened, args.rounds, args.new)
    return rows_of("torch", sizes, found, args.prompt, bandwidth)


class Torch:
    """A model of transformers."""

    def __init__(self, model: Any, args: argparse.Namespace) -> None:
        self._model, self._ids = model, torch.arange(1, args.prompt + 1).unsqueeze(0)
        self._cache: Any = None

    def prefill(self) -> float:
        self._cache = None
        return self._run(self._ids)

    def steps(self, count: int) -> list[float]:
        return [self._run(self._ids[:, :1]) for _ in range(count)]

    @torch.inference_mode()
    def _run(self, ids: torch.Tensor) -> float:
        start = time.perf_counter()
        made = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        taken = time.perf_counter() - start
        self._cache = made.past_key_values
        return taken

    def close(self) -> None:
        del self._cache


def genai_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """ONNX Runtime GenAI, where it is installed."""
    if not importlib.util.find_spec("onnxruntime_genai"):
        return []
    runnable = {name: folder for name, folder in folders.items() if (folder / "genai_config.json").is_file()}
    for folder in runnable.values():
        file = folder / "genai_config.json"
        config = json.loads(file.read_text())
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = args.threads
        file.write_text(json.dumps(config, indent=2))
    opened = {name: partial(GenAI, folder, args) for name, folder in runnable.items()}
    return measured("GenAI runtime", folders, opened, args, bandwidth)


class GenAI:
    """A generator of ONNX Runtime GenAI, over a buffer for as many tokens as are measured."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        import onnxruntime_genai as genai

        self._genai, self._model = genai, genai.Model(str(folder))
        self._prompt, self._length = args.prompt, args.prompt + 1 + args.new
        self._generator: Any = None

    def prefill(self) -> float:
        params = self._genai.GeneratorParams(self._model)
        params.set_search_options(max_length=self._length, min_length=self._length, do_sample=False)
        self._generator = self._genai.Generator(self._model, params)
        start = time.perf_counter()
        self._generator.append_tokens(list(range(1, self._prompt + 1)))
        self._generator.generate_next_token()
        return time.perf_counter() - start

    def steps(self, count: int) -> list[float]:
        return [seconds(self._generator.generate_next_token) for _ in range(count)]

    def close(self) -> None:
        del self._generator, self._model


def llama_loop(folders: dict[str, Path], args: argparse.Namespace, bandwidth: float) -> list[Row]:
    """llama.cpp, where it is installed and the model came as a GGUF file: SmolLM2."""
    if args.random or not importlib.util.find_spec("llama_cpp"):
        return []
    files = {"GGUF Q4_1, as published": smollm2_gguf(), "GGUF Q4_1, merged adapter": merged_gguf(folders)}
    opened = {name: partial(LlamaCpp, file, args) for name, file in files.items()}
    found = take_turns("llama.cpp", opened, args.rounds, args.new)
    return rows_of(
        "llama.cpp", {name: file.stat().st_size for name, file in files.items()}, found, args.prompt, bandwidth
    )


class LlamaCpp:
    """A GGUF file."""

    def __init__(self, file: Path, args: argparse.Namespace) -> None:
        from llama_cpp import Llama

        length = args.prompt + args.new + 8
        self._model = Llama(str(file), n_ctx=length, n_threads=args.threads, verbose=False)
        self._prompt = list(range(1, args.prompt + 1))

    def prefill(self) -> float:
        self._model.reset()
        return seconds(self._model.eval, self._prompt)

    def steps(self, count: int) -> list[float]:
        return [seconds(self._model.eval, [1]) for _ in range(count)]

    def close(self) -> None:
        self._model.close()


def seconds(call: Callable[..., Any], *args: Any) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(*args)
    return time.perf_counter() - start


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
