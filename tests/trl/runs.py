"""Short training runs on a tiny 4-bit model."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from trl import SFTConfig, SFTTrainer

from qbl_trl.config import GroupQuantConfig, QBLoRAConfig
from qbl_trl.quant.hf_quantizer import quantize_model_
from tests.tiny import tiny_llama
from tests.trl import data


def base(**changes: Any) -> PreTrainedModel:
    """A two-layer Llama at 4 bits in groups of 32, always the same."""
    return quantize_model_(tiny_llama(vocab_size=32, **changes), GroupQuantConfig())


def adapter(**changes: Any) -> QBLoRAConfig:
    """QA-BLoRA of nominal rank 4."""
    return QBLoRAConfig(**{"r": 4, "quantization_aware": True, "out_factor": 2, "task_type": "CAUSAL_LM", **changes})


def settings(output: Path, **changes: Any) -> dict[str, Any]:
    """Training arguments every trainer takes: four steps of two rows on one CPU, in float32."""
    return {
        "output_dir": str(output),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 5e-3,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
        **changes,
    }


def sft(output: Path, callback: Any, model: Any = None, **changes: Any) -> SFTTrainer:
    """An SFTTrainer over `base()`; keywords of SFTTrainer are told from those of SFTConfig by name."""
    names = ("train_dataset", "eval_dataset", "peft_config", "callbacks", "optimizers", "optimizer_cls_and_kwargs")
    own = {key: changes.pop(key) for key in names if key in changes}
    own.setdefault("train_dataset", data.texts())
    own["callbacks"] = [*([] if callback is None else [callback]), *own.get("callbacks", [])]
    return SFTTrainer(
        base() if model is None else model,
        args=SFTConfig(**settings(output, **changes)),
        processing_class=data.tokenizer(),
        **own,
    )


def losses(trainer: Any) -> list[float]:
    """Training losses as they were logged."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


class Exported:
    """What `export_onnx` answers, for runs without ONNX: two layers, and a graph with 8-bit activations."""

    def to_dict(self) -> dict[str, Any]:
        exact = {
            "tokens": 18,
            "max_abs_difference": 2e-6,
            "mean_abs_difference": 1e-7,
            "kl_per_token": 1e-9,
            "top1_agreement": 1.0,
            "ties": 0,
        }
        return {
            "path": "x",
            "provider": "cpu",
            "dtype": "float32",
            "attention": "gqa",
            "attention_reason": "",
            "layers": ({"name": "one"}, {"name": "two"}),
            "operators": {"MatMulNBits": 2},
            "kv_cache_dtype": "int8",
            "fallbacks": (),
            "bytes": 123456,
            "seconds": 4.2,
            "parity": exact,
            "parity_cached": exact,
            "parity_embeddings": None,
            "parity_as_written": {**exact, "max_abs_difference": 3e-2},
        }

    def lowerings(self) -> dict[str, int]:
        return {"MatMulNBits + block delta in 8 bits": 2}
