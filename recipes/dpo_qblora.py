"""Preference tuning (DPO) of a 4-bit model with balanced adapters that merge exactly.

    accelerate launch recipes/dpo_qblora.py --config recipes/configs/dpo_qblora.yaml
    accelerate launch recipes/dpo_qblora.py \
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name trl-lib/ultrafeedback_binarized

The reference model is the same base with its adapters switched off: nothing is held twice.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from datasets import load_dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer, ScriptArguments, TrlParser

from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig
from qbl_trl.errors import one_line
from qbl_trl.trl.resume import asked_for


@dataclass
class DPOQBLoRAArguments:
    """The base and the adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model id or folder."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Type of what is not quantized."}
    )
    group_size: int = field(default=32, metadata={"help": "Weights of the base that share a scale."})
    algorithm: Literal["rtn", "mse", "hqq"] = field(default="rtn", metadata={"help": "How the base is quantized."})
    r: int = field(default=8, metadata={"help": "Nominal rank: that of the plain LoRA with as many parameters."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    out_factor: int | None = field(default=None, metadata={"help": "Outputs that share one; default: 2 or 1, by rank."})
    overwrite: bool = field(default=False, metadata={"help": "Replace what output_dir/merged holds."})


def make_parser() -> TrlParser:
    """Every flag of TRL's scripts and trainer, and those of DPOQBLoRAArguments."""
    return TrlParser((ScriptArguments, DPOConfig, DPOQBLoRAArguments), description=__doc__.split("\n\n")[0])


def main(script: ScriptArguments, training: DPOConfig, args: DPOQBLoRAArguments) -> None:
    """Load, train, save; merging and its check are the callback's."""
    if not args.model_name_or_path or not script.dataset_name:
        raise SystemExit("--model_name_or_path and --dataset_name are needed (or --config with both)")
    callback = QBLoRACallback(merged_output_dir=Path(training.output_dir, "merged"), overwrite=args.overwrite)
    callback.check_outputs(training)
    resume = asked_for(training)
    splits = [script.dataset_train_split] + [script.dataset_test_split] * (training.eval_strategy != "no")
    train, *test = (
        load_dataset(script.dataset_name, script.dataset_config, split=split, streaming=script.dataset_streaming)
        for split in splits
    )
    code = {"trust_remote_code": training.trust_remote_code}
    options: dict[str, Any] = {"dtype": getattr(torch, args.dtype)}
    if getattr(AutoConfig.from_pretrained(args.model_name_or_path, **code), "quantization_config", None) is None:
        options["quantization_config"] = GroupQuantConfig(group_size=args.group_size, algorithm=args.algorithm)
    model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, **options, **code)
    trainer = DPOTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=test[0] if test else None,
        processing_class=AutoTokenizer.from_pretrained(args.model_name_or_path, **code),
        peft_config=QBLoRAConfig(
            r=args.r,
            lora_alpha=args.lora_alpha,
            out_factor=args.out_factor,
            quantization_aware=True,
            task_type="CAUSAL_LM",
        ),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    with one_line():
        main(*make_parser().parse_args_and_config())
