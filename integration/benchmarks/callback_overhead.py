"""What watching costs: seconds spent in QBLoRACallback beside seconds of training, in one run.

    python -m integration.benchmarks.callback_overhead              # 6 blocks of SmolLM2-135M's shapes, random weights
    python -m integration.benchmarks.callback_overhead --blocks 30 --steps 40

Both grow with the number of blocks, so the ratio of a part is that of the whole. Logging every 10 steps is TRL's
default. Every event of the callback is timed; merging and verifying at the end happen once and are told apart.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig
from qbl_trl.quant.hf_quantizer import quantize_model_

RESULTS = Path(__file__).parent / "results" / "callback_overhead.json"
EVENTS = ("on_init_end", "on_train_begin", "on_log", "on_save", "on_evaluate", "on_train_end")
ALLOWED = 0.01


class TimedCallback(QBLoRACallback):
    """The callback as it is, and the seconds each of its events took."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.spent = dict.fromkeys(EVENTS, 0.0)
        for event in EVENTS:
            setattr(self, event, self._timed(event))

    def _timed(self, event: str) -> Any:
        inner = getattr(super(), event)

        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.spent[event] += time.perf_counter() - start

        return run


def smollm2_blocks(blocks: int) -> LlamaForCausalLM:
    """Blocks of SmolLM2-135M's shapes with random weights, at 4 bits; a small vocabulary, so that blocks dominate."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=blocks,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=512,
        max_position_embeddings=512,
    )
    return quantize_model_(LlamaForCausalLM(config), GroupQuantConfig())


def measure(blocks: int, steps: int, rows: int, length: int, logging_steps: int) -> dict[str, Any]:
    """Train once; seconds of training and of the callback's events."""
    tokens = torch.randint(0, 512, (rows * 4, length), generator=torch.Generator().manual_seed(0)).tolist()
    callback = TimedCallback(QBLoRAConfig(quantization_aware=True))
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=rows,
            logging_steps=logging_steps,
            save_strategy="no",
            report_to="none",
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
        )
        dataset = [{"input_ids": row, "labels": row} for row in tokens]
        trainer = Trainer(smollm2_blocks(blocks), args, train_dataset=dataset, callbacks=[callback])
        start = time.perf_counter()
        trainer.train()
        total = time.perf_counter() - start
    training = total - callback.spent["on_train_end"]
    watching = callback.spent["on_log"] + callback.spent["on_train_begin"]
    return {
        "blocks": blocks,
        "tokens_per_step": rows * length,
        "steps": steps,
        "logging_steps": logging_steps,
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "seconds_per_step": training / steps,
        "seconds_per_log": callback.spent["on_log"] / max(1, steps // logging_steps),
        "overhead": watching / (training - watching),
        "probe_seconds": callback.spent["on_init_end"],
        "merge_and_verify_seconds": callback.spent["on_train_end"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--logging-steps", type=int, default=10)
    args = parser.parse_args()
    found = measure(args.blocks, args.steps, args.rows, args.length, args.logging_steps)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    print(json.dumps(found, indent=1))
    verdict = "within" if found["overhead"] <= ALLOWED else "OVER"
    print(f"overhead {found['overhead']:.2%} of training: {verdict} the allowed {ALLOWED:.0%}")


if __name__ == "__main__":
    main()
