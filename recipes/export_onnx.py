"""Deploy a fine-tuned 4-bit model: write the ONNX folder, check it, and let it answer.

    python recipes/export_onnx.py --model outputs/reuters/merged --output outputs/reuters/onnx --prompt "Hello"
    python recipes/export_onnx.py --model outputs/adapter --output outputs/onnx --provider cuda --dtype float16

`--model` is a merged model, or an adapter folder: its adapters then stay beside the 4-bit weights. The same folder runs
in ORTModelForCausalLM, which answers here where transformers is 4.57, and in ONNX Runtime GenAI, which does elsewhere.
torch and ONNX Runtime each keep a pool of threads; left to themselves they fight over the same cores, so both are set.
"""

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from qbl_trl.arguments import named, path
from qbl_trl.errors import one_line
from qbl_trl.onnx import options
from qbl_trl.tokenizers import holds_tokenizer, tokenizer_source


def make_parser() -> argparse.ArgumentParser:
    """What this recipe can be told."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", required=True, type=named, help="folder of a merged model, or of a trained adapter")
    parser.add_argument("--output", required=True, type=path, help="a new or empty folder")
    options.add_settings(parser, between="_")
    parser.add_argument("--prompt", help="generate an answer with the exported folder")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="length of the answer")
    parser.add_argument("--threads", type=int, default=2, help="of ONNX Runtime; torch gets one")
    return parser


def main(args: argparse.Namespace) -> None:
    """Export, print the report, and answer."""
    words = args.tokenizer or tokenizer_source(args.model)
    if args.prompt and Path(words).is_dir() and not holds_tokenizer(words):
        raise SystemExit(f"--prompt needs a tokenizer, and {words} has none; name one with --tokenizer")
    options.run(args)
    if args.prompt:
        optimum = importlib.util.find_spec("optimum.onnxruntime") if importlib.util.find_spec("optimum") else None
        answered = answer if optimum else answer_by_genai
        print(answered(args.output, args.prompt, args.provider, args.max_new_tokens, args.threads))


def answer(folder: Path, prompt: str, provider: str, max_new_tokens: int, threads: int) -> str:
    """Greedy continuation of a prompt by ORTModelForCausalLM."""
    import onnxruntime
    from optimum.onnxruntime import ORTModelForCausalLM
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    model = ORTModelForCausalLM.from_pretrained(
        folder,
        provider="CUDAExecutionProvider" if provider == "cuda" else "CPUExecutionProvider",
        session_options=options,
        use_io_binding=provider == "cuda",  # keeps the cache on the GPU between tokens
    )
    # Optimum sizes its buffers by a guess, wrong where heads have a size of their own (Qwen 3); the graph says it.
    cache = next(value.shape for value in model.session.get_outputs() if value.name == "present.0.key")
    model.num_key_value_heads, model.embed_size_per_head = cache[1], cache[3]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    made = model.generate(
        inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=max_new_tokens, do_sample=False
    )
    return tokenizer.decode(made[0][inputs.input_ids.shape[1] :], skip_special_tokens=True)


def answer_by_genai(folder: Path, prompt: str, provider: str, max_new_tokens: int, threads: int) -> str:
    """The same by ONNX Runtime GenAI."""
    import onnxruntime_genai as genai
    from transformers import AutoTokenizer

    if not (folder / "genai_config.json").is_file():
        raise SystemExit(f"--prompt: ONNX Runtime GenAI does not know the cache of this model; {folder} is written")
    config = genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    config.clear_providers()
    if provider == "cuda":
        config.append_provider("cuda")
    model, tokenizer = genai.Model(config), AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(prompt)["input_ids"]
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(tokens) + max_new_tokens, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(tokens)
    while not generator.is_done():
        generator.generate_next_token()
    return tokenizer.decode(generator.get_sequence(0)[len(tokens) :], skip_special_tokens=True)


if __name__ == "__main__":
    with one_line():
        main(make_parser().parse_args())
