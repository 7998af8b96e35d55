"""TRL's generating trainers, a kill in the middle of a save, and a script of TRL's own with two changed lines.

python -m pytest integration/test_trainers.py
"""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from datasets import DatasetDict
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from qbl_trl import QBLoRACallback
from qbl_trl.trl.checkpoints import NOTE, check_checkpoint, last_whole_checkpoint
from tests.tiny import tiny_llama
from tests.trl import data
from tests.trl.runs import adapter, base, settings

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "ACCELERATE_USE_CPU": "true",
}


LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1"]


def length_reward(completions, **kwargs):
    """More words are better: enough to have a gradient."""
    return [float(len(text.split())) for text in completions]


@pytest.mark.parametrize(
    ("trainer_class", "config_class", "beta", "placed"),
    [
        (GRPOTrainer, GRPOConfig, 0.0, False),
        (GRPOTrainer, GRPOConfig, 0.1, True),
        (RLOOTrainer, RLOOConfig, 0.0, False),
        (RLOOTrainer, RLOOConfig, 0.05, True),
    ],
    ids=["grpo", "grpo-with-reference", "rloo", "rloo-with-reference"],
)
def test_generating_trainers_train_and_merge(tmp_path, trainer_class, config_class, beta, placed):
    arguments = settings(tmp_path, max_steps=2, num_generations=2, max_completion_length=8, beta=beta)
    trainer = trainer_class(
        base(),
        reward_funcs=length_reward,
        args=config_class(**arguments),
        train_dataset=data.prompts(),
        processing_class=data.tokenizer(),
        peft_config=adapter() if placed else None,
        callbacks=[QBLoRACallback(None if placed else adapter())],
    )
    assert trainer.ref_model is None
    trainer.train()
    report = json.loads((tmp_path / "qblora_report.json").read_text())
    assert report["merge"]["exact"]
    assert report["merge"]["parity"]["max_abs_difference"] <= 1e-5  # fp32 rounding
    history = [entry for entry in report["log_history"] if "reward" in entry]
    assert len(history) == 2
    assert all("qbl/adapter_norm" in entry for entry in history)


# -- killed while saving ----------------------------------------------------------------------------------------------

CHILD = """
import os, signal, sys
from pathlib import Path
from transformers import Trainer
from qbl_trl import QBLoRACallback
from qbl_trl.trl import callback
from tests.trl.runs import adapter, losses, sft

output, moment = Path(sys.argv[1]), sys.argv[2]


def kill_in(owner, name, when):
    original = getattr(owner, name)

    def wrapped(*args, **kwargs):
        if (output / "checkpoint-4").is_dir():
            if when == "after":
                original(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*args, **kwargs)

    setattr(owner, name, wrapped)


if moment == "before-optimizer":
    kill_in(Trainer, "_save_optimizer_and_scheduler", "before")
elif moment == "before-random-state":
    kill_in(Trainer, "_save_rng_state", "before")
elif moment == "before-note":
    kill_in(callback.checkpoints, "mark_whole", "before")
trainer = sft(output, QBLoRACallback(adapter(lora_dropout=0.1)), save_strategy="steps", save_steps=2, max_steps=6)
trainer.train(resume_from_checkpoint=True if moment == "resume" else None)
print("LOSSES", losses(trainer))
"""


def child(output: Path, moment: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, str(output), moment],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(output: Path, moment: str) -> list[float]:
    process = child(output, moment)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    return json.loads(re.search(r"LOSSES (\[.*\])", out)[1])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return finish(tmp_path_factory.mktemp("whole") / "run", "never")


@pytest.mark.parametrize("moment", ["before-optimizer", "before-random-state", "before-note"])
def test_a_run_killed_while_saving_resumes_from_a_whole_checkpoint_with_identical_losses(
    tmp_path, uninterrupted, moment
):
    output = tmp_path / "run"
    process = child(output, moment)
    process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL
    assert (output / "checkpoint-4").is_dir()
    assert not (output / "checkpoint-4" / NOTE).exists()
    whole = last_whole_checkpoint(output)
    # Killed before the note only: every file of checkpoint-4 is there, and nothing needs to be done again.
    assert Path(whole).name == ("checkpoint-4" if moment == "before-note" else "checkpoint-2")
    assert finish(output, "resume") == uninterrupted
    assert (output / "incomplete-checkpoint-4").is_dir() == (moment != "before-note")
    check_checkpoint(output / "checkpoint-6")


@pytest.mark.parametrize("delay", [0.0, 0.01, 0.03])
def test_whenever_the_kill_comes_no_part_is_taken_for_a_whole(tmp_path, uninterrupted, delay):
    output = tmp_path / "run"
    process = child(output, "never")
    while not (output / "checkpoint-4").is_dir() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    whole = last_whole_checkpoint(output)
    assert whole is not None
    check_checkpoint(whole)
    assert finish(output, "resume") == uninterrupted


# -- scripts ----------------------------------------------------------------------------------------------------------


def local_files(folder: Path, quantized: bool) -> tuple[Path, Path]:
    """A model with its tokenizer, and a dataset, as a script would name them."""
    model, dataset = folder / "model", folder / "dataset"
    (base() if quantized else tiny_llama(vocab_size=32)).save_pretrained(model)
    data.tokenizer().save_pretrained(model)
    dataset.mkdir()
    splits = DatasetDict({"train": data.texts(), "test": data.texts(4)})
    for name, rows in splits.items():
        rows.to_json(dataset / f"{name}.jsonl")
    return model, dataset


def test_trls_own_sft_script_takes_the_callback_with_two_changed_lines(tmp_path):
    import trl.scripts.sft as script

    original = Path(script.__file__).read_text()
    changed = original.replace(
        "import argparse\n", "import argparse\nfrom qbl_trl import QBLoRACallback, QBLoRAConfig\n", 1
    ).replace(
        "        peft_config=get_peft_config(model_args),\n",
        "        callbacks=[QBLoRACallback(QBLoRAConfig(quantization_aware=True))],\n",
        1,
    )
    # The model's folder is what `qbl-trl quantize` writes; so the script needs no line for that.
    before, after = original.splitlines(), changed.splitlines()
    assert len([line for line in after if line not in before]) == 2
    model, dataset = local_files(tmp_path, quantized=True)
    (tmp_path / "sft.py").write_text(changed)
    arguments = f"--model_name_or_path {model} --dataset_name {dataset} --output_dir {tmp_path / 'out'} --max_steps 2 "
    arguments += "--use_cpu true --bf16 false --report_to none --logging_steps 1 --per_device_train_batch_size 2 "
    arguments += "--gradient_checkpointing false --eos_token </s>"
    done = subprocess.run(
        [*LAUNCH, "sft.py", *arguments.split()],
        env=ENVIRONMENT,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "out" / "qblora_report.json").read_text())
    assert report["step"] == 2
    assert report["merge"]["exact"]


def test_a_script_that_holds_nothing_of_ours_but_the_callback_trains(tmp_path):
    model, dataset = local_files(tmp_path, quantized=False)
    script = f"""
        from datasets import load_dataset
        from transformers import AutoModelForCausalLM
        from trl import SFTConfig, SFTTrainer
        from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig

        model = AutoModelForCausalLM.from_pretrained({str(model)!r}, quantization_config=GroupQuantConfig())
        trainer = SFTTrainer(
            model,
            args=SFTConfig({str(tmp_path / "out")!r}, max_steps=2, use_cpu=True, bf16=False, report_to="none"),
            train_dataset=load_dataset({str(dataset)!r}, split="train"),
            callbacks=[QBLoRACallback(QBLoRAConfig(quantization_aware=True))],
        )
        trainer.train()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "out" / "qblora_report.json").read_text())["merge"]["exact"]
