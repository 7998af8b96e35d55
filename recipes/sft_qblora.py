"""Fine-tune over a bitsandbytes NF4 base with balanced adapters (Q-BLoRA).

    accelerate launch recipes/sft_qblora.py --config recipes/configs/sft_qblora.yaml
    accelerate launch recipes/sft_qblora.py --model_name_or_path Qwen/Qwen2.5-0.5B --dataset_name trl-lib/Capybara

NF4 has no zero point to fold into: the adapter stays an adapter. Deploy it exactly with recipes/export_onnx.py (the
low-rank branch is kept), or anywhere with `qbl-trl to-lora`, which writes the same adapter as plain LoRA files.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from transformers.utils import is_bitsandbytes_available
from trl import ScriptArguments, SFTConfig, SFTTrainer, TrlParser

from qbl_trl import QBLoRACallback, QBLoRAConfig
from qbl_trl.errors import one_line
from qbl_trl.trl.resume import asked_for


@dataclass
class QBLoRAArguments:
    """The base and the adapter."""

    model_name_or_path: str | None = field(default=None, metadata={"help": "Model id or folder."})
    dtype: Literal["float32", "bfloat16", "float16"] = field(
        default="bfloat16", metadata={"help": "Type of what is computed in."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2 ..."})
    double_quant: bool = field(default=True, metadata={"help": "Quantize the scales of the base too."})
    r: int = field(default=64, metadata={"help": "Nominal rank: that of the plain LoRA with as many parameters."})
    lora_alpha: int = field(default=16, metadata={"help": "The adapter is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout on the pooled input."})
    in_factor: int = field(default=2, metadata={"help": "Inputs pooled into one."})
    out_factor: int = field(default=2, metadata={"help": "Outputs that share one adapter output."})


def make_parser() -> TrlParser:
    """Every flag of TRL's scripts and trainer, and those of QBLoRAArguments."""
    return TrlParser((ScriptArguments, SFTConfig, QBLoRAArguments), description=__doc__.split("\n\n")[0])


def main(script: ScriptArguments, training: SFTConfig, args: QBLoRAArguments) -> None:
    """Load, train, save the adapter."""
    if not args.model_name_or_path or not script.dataset_name:
        raise SystemExit("--model_name_or_path and --dataset_name are needed (or --config with both)")
    if not is_bitsandbytes_available():
        raise SystemExit('this recipe trains over bitsandbytes: pip install "qbl-trl[bnb]"')
    resume = asked_for(training)
    adapter = QBLoRAConfig(
        r=args.r,
        lora_alpha=args.lora_alpha,
        lora_dropout=args.lora_dropout,
        in_factor=args.in_factor,
        out_factor=args.out_factor,
        task_type="CAUSAL_LM",
    )
    splits = [script.dataset_train_split] + [script.dataset_test_split] * (training.eval_strategy != "no")
    train, *test = (
        load_dataset(script.dataset_name, script.dataset_config, split=split, streaming=script.dataset_streaming)
        for split in splits
    )
    dtype, code = getattr(torch, args.dtype), {"trust_remote_code": training.trust_remote_code}
    model = AutoModelForCausalLM.from_pretrained(
        args.model_name_or_path,
        **code,
        dtype=dtype,
        attn_implementation=args.attn_implementation,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=args.double_quant,
        ),
    )
    trainer = SFTTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=test[0] if test else None,
        processing_class=AutoTokenizer.from_pretrained(args.model_name_or_path, **code),
        peft_config=adapter,
        callbacks=[QBLoRACallback()],
    )
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(training.output_dir)


if __name__ == "__main__":
    with one_line():
        main(*make_parser().parse_args_and_config())
