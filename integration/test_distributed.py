"""Two real processes on gloo: DDP, FSDP2 and DeepSpeed ZeRO, over our base and over bitsandbytes; nothing is mocked.

    python -m pytest integration/test_distributed.py -s        # prints the wall time of a step, too

Each case starts `torchrun --nproc_per_node 2` on this very file. Accelerate starts FSDP on accelerators only; the one
decision that says so is overruled in the worker (`_allow_fsdp_on_cpu`), everything after it is Accelerate's own.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import tiny_llama

ROOT = Path(__file__).resolve().parents[1]
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "LlamaDecoderLayer",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_USE_CPU": "false"}


def launch(output: Path, processes: int, environment: dict[str, str] | None = None, **options: Any) -> dict[str, Any]:
    """Run the worker below; what its main process found out."""
    result = output.with_suffix(".json")
    if options.get("base"):
        tiny_llama(vocab_size=32).save_pretrained(output.with_suffix(".base"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    if processes == 1:
        command = [sys.executable]
    done = subprocess.run(
        [*command, __file__, str(output), str(result), json.dumps(options)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        | {"HF_HUB_OFFLINE": "1"}
        | (environment or {}),
        capture_output=True,
        text=True,
        timeout=600,
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-6000:])
    return json.loads(result.read_text())


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("single") / "run", 1)


@pytest.fixture(scope="module")
def ddp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("ddp") / "run", 2)


@pytest.fixture(scope="module")
def fsdp(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("fsdp") / "run", 2, FSDP)


def test_one_and_two_processes_give_the_same_losses_for_the_same_global_batch(single, ddp, fsdp):
    assert (single["kind"], ddp["kind"], fsdp["kind"]) == ("NO", "MULTI_CPU", "FSDP")
    assert ddp["losses"] == pytest.approx(single["losses"], abs=2e-4)  # sums in another order; 4 digits are logged
    assert fsdp["losses"] == pytest.approx(single["losses"], abs=2e-4)


def test_every_decoder_layer_is_sharded_by_itself_codes_included(fsdp):
    assert fsdp["sharded_layers"] == fsdp["decoder_layers"] == 2
    assert fsdp["sharded_codes"]


@pytest.mark.parametrize("run", ["ddp", "fsdp"])
def test_the_merged_model_is_gathered_written_once_and_equal_to_the_single_process_one(run, single, request):
    found = request.getfixturevalue(run)
    report = json.loads((Path(found["output"]) / "qblora_report.json").read_text())
    assert report["world_size"] == 2
    assert report["merge"]["exact"]
    assert report["merge"]["parity"]["max_abs_difference"] <= 1e-5
    assert not [f for f in Path(found["output"]).iterdir() if f.name.startswith(".")]  # no process left a draft
    assert merged_logits(found) == pytest.approx(merged_logits(single), abs=2e-3)  # Adam turns rounding into steps


def test_the_metrics_of_a_sharded_adapter_are_those_of_the_whole_one(single, fsdp):
    for name, value in single["metrics"].items():
        assert fsdp["metrics"][name] == pytest.approx(value, rel=1e-2), name


@pytest.mark.parametrize(("saved", "resumed"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_one_world_size_resumes_on_another(tmp_path, single, saved, resumed):
    # The trainer takes the batch per process from the checkpoint: the global batch is kept by accumulation.
    launch(tmp_path / "run", saved, accumulate=True)
    again = launch(tmp_path / "run", resumed, accumulate=True, resume="checkpoint-2")
    assert again["losses"] == pytest.approx(single["losses"], abs=2e-4)


def test_a_sharded_run_resumes_from_its_checkpoint(tmp_path, fsdp):
    launch(tmp_path / "run", 2, FSDP)
    again = launch(tmp_path / "run", 2, FSDP, resume="checkpoint-2")
    assert again["losses"] == pytest.approx(fsdp["losses"], abs=2e-4)


@pytest.mark.parametrize("environment", [{}, FSDP], ids=["ddp", "fsdp2"])
@pytest.mark.parametrize("storage", ["uint8", "float32"])
def test_bitsandbytes_bases_train_on_two_processes(tmp_path, environment, storage):
    pytest.importorskip("bitsandbytes", reason="the [bnb] extra is not installed")
    alone = launch(tmp_path / "one", 1, base="bitsandbytes", storage=storage)
    both = launch(tmp_path / "two", 2, environment, base="bitsandbytes", storage=storage)
    assert both["losses"] == pytest.approx(alone["losses"], abs=5e-3)  # TRL trains these adapters in bfloat16
    assert "no exact merge" in both["merge"]["reason"]


def test_memory_efficient_loading_is_refused_with_the_setting_to_change(tmp_path):
    with pytest.raises(RuntimeError, match="fsdp_cpu_ram_efficient_loading: false"):
        launch(tmp_path / "run", 2, {**FSDP, "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"})


def test_a_sharded_run_that_rounds_saves_merged_models_on_its_way(tmp_path):
    found = launch(tmp_path / "run", 2, FSDP, callback={"stored_delta": "float16", "save_merged": True})
    assert (Path(found["output"]) / "checkpoint-2" / "merged").is_dir()


def test_checkpoints_without_tensors_are_refused_with_the_setting_to_change(tmp_path):
    with pytest.raises(RuntimeError, match="fsdp_activation_checkpointing"):
        launch(tmp_path / "run", 2, {**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"})


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_gives_the_same_losses_and_an_adapter_that_merges(tmp_path, single, stage):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    found = launch(tmp_path / "run", 2, DEEPSPEED, deepspeed=stage)
    assert found["kind"] == "DEEPSPEED"
    assert found["losses"] == pytest.approx(single["losses"], abs=2e-4)
    assert adapted_logits(Path(found["output"], "adapter")) == pytest.approx(merged_logits(single), abs=2e-3)


def test_zero_3_that_does_not_gather_what_it_saves_is_refused(tmp_path):
    pytest.importorskip("deepspeed", reason="deepspeed is not installed")
    with pytest.raises(RuntimeError, match="zero3_save_16bit_model: true"):
        launch(tmp_path / "run", 2, DEEPSPEED, deepspeed=3, gather=False)


def test_print_the_time_of_a_step(single, ddp, fsdp, capsys):
    with capsys.disabled():
        for name, found in (("1 process", single), ("2 processes, DDP", ddp), ("2 processes, FSDP2", fsdp)):
            print(f"\n{name}: {1000 * found['seconds_per_step']:.0f} ms a step (global batch of 4)", end="")
        print()


def merged_logits(found: dict[str, Any]) -> list[float]:
    import torch
    from transformers import AutoModelForCausalLM

    import qbl_trl  # noqa: F401 (registers the quantizer)
    from tests.tiny import tokens

    model = AutoModelForCausalLM.from_pretrained(Path(found["output"], "merged"))
    with torch.no_grad():
        return model(tokens(1, vocabulary=32)).logits.flatten()[:64].tolist()


def adapted_logits(adapter: Path) -> list[float]:
    """As `merged_logits`, of the adapter that a run saved, merged over the base here."""
    import torch
    from peft import PeftModel

    from qbl_trl import merge
    from tests.tiny import tokens
    from tests.trl.runs import base

    with torch.no_grad():
        model = merge(PeftModel.from_pretrained(base(), adapter))
        return model(tokens(1, vocabulary=32)).logits.flatten()[:64].tolist()


# -- what runs in each process ---------------------------------------------------------------------------------------


def _allow_fsdp_on_cpu() -> None:
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.fsdp_plugin, self.distributed_type = fsdp_plugin, DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = init


def _allow_deepspeed_on_cpu() -> None:
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_CPU)


def _nf4_base(folder: Path, storage: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=getattr(torch, storage)
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings)


def worker(output: Path, result: Path, options: dict[str, Any]) -> None:
    import torch
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    if os.environ.get("ACCELERATE_USE_FSDP"):
        _allow_fsdp_on_cpu()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED"):
        _allow_deepspeed_on_cpu()
    # With several CPU processes the trainer loads its optimizer onto "cpu:0", a place torch.load does not know.
    torch.serialization.register_package(
        0, lambda storage: None, lambda storage, place: storage if place.startswith("cpu:") else None
    )
    from qbl_trl import QBLoRACallback
    from tests.trl.runs import adapter, losses, sft

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = {"per_device_train_batch_size": 4 // processes, "save_strategy": "steps", "save_steps": 2}
    if options.get("accumulate"):
        settings.update(per_device_train_batch_size=2, gradient_accumulation_steps=2 // processes)
    if options.get("deepspeed"):
        settings["deepspeed"] = {
            "zero_optimization": {
                "stage": options["deepspeed"],
                "stage3_gather_16bit_weights_on_model_save": options.get("gather", True),
            },
            "zero_allow_untested_optimizer": True,
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "bf16": {"enabled": False},
        }
    if options.get("base") == "bitsandbytes":
        model = _nf4_base(output.with_suffix(".base"), options["storage"])
        trainer = sft(
            output, QBLoRACallback(), model, peft_config=adapter(quantization_aware=False), bf16=False, **settings
        )
    else:
        merged = None if options.get("deepspeed") == 3 else output / "merged"
        callback = QBLoRACallback(adapter(), merged_output_dir=merged, overwrite=True, **options.get("callback", {}))
        trainer = sft(output, callback, **settings)
    if options.get("deepspeed"):
        # The trainer makes two groups of adapters, one of them empty; DeepSpeed drops the empty one, and the schedulers
        # of torch 2.13 then miss it.
        original = trainer.create_optimizer

        def one_group() -> Any:
            optimizer = original()
            optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
            return optimizer

        trainer.create_optimizer = one_group
    start = time.perf_counter()
    resume = options.get("resume")
    trainer.train(resume_from_checkpoint=str(output / resume) if resume else None)
    seconds = time.perf_counter() - start
    if options.get("deepspeed"):
        trainer.save_model(output / "adapter")  # on every process: ZeRO-3 gathers what it saves
    layers = [m for m in trainer.model.modules() if "LlamaDecoderLayer" in type(m).__name__]
    codes = [p for n, p in trainer.model.named_parameters() if n.endswith("base_layer.weight")]
    if trainer.is_world_process_zero():
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        content = {
            "output": str(output),
            "kind": trainer.accelerator.distributed_type.value,
            "losses": losses(trainer),
            "metrics": {key: value for key, value in history[-1].items() if key.startswith("qbl/")},
            "merge": json.loads((output / "qblora_report.json").read_text())["merge"],
            "decoder_layers": len(layers),
            "sharded_layers": sum(isinstance(layer, FSDPModule) for layer in layers),
            "sharded_codes": all(isinstance(p, DTensor) and p.to_local().numel() < p.numel() for p in codes),
            "seconds_per_step": seconds / trainer.state.global_step,
        }
        result.write_text(json.dumps(content))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    worker(Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]))
