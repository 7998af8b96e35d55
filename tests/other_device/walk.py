"""The whole path on another device than the CPU; run in a process of its own, for that device stays registered.

python -m tests.other_device.walk core | trainer FOLDER
"""

import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from qbl_trl import GroupQuantConfig, QBLoRACallback, QBLoRAConfig, export_onnx, merge, verify
from qbl_trl.quant.float_offsets import folded
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.trl import gather
from tests.other_device.device import DEVICE, NAME, present, register
from tests.tiny import logits, tiny_llama, tokens

IDS = tokens()
CONFIGS = (
    QBLoRAConfig(quantization_aware=True, r=4),
    QBLoRAConfig(quantization_aware=True, r=4, adapter="block"),
    QBLoRAConfig(r=4, lora_dropout=0.1),
)


def base(device: str, algorithm: str = "rtn") -> Any:
    """A packed Llama, quantized where it lies."""
    return quantize_model_(tiny_llama().to(device), GroupQuantConfig(algorithm=algorithm))


def trained(device: str, config: QBLoRAConfig) -> Any:
    """An adapter after two steps."""
    torch.manual_seed(1)
    model = get_peft_model(base("cpu").to(device), config).eval()
    adapter = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(adapter, lr=3.0)  # Adam goes by signs at first, of what is nearly zero too
    for _ in range(2):
        model(input_ids=IDS.to(device), labels=IDS.to(device)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The arithmetic is the CPU's, by other kernels in places."""
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)


def core(folder: Path) -> None:
    """Quantize, adapt, train, save, load, merge, write: as on the CPU."""
    ids = IDS.to(DEVICE)
    for algorithm in ("rtn", "mse", "hqq"):
        close(logits(base(DEVICE, algorithm), ids), logits(base("cpu", algorithm), IDS))
    for number, config in enumerate(CONFIGS):
        model, expected = trained(DEVICE, config), logits(trained("cpu", config), IDS)
        close(logits(model, ids), expected)
        model.save_pretrained(folder / f"adapter-{number}")
        loaded = PeftModel.from_pretrained(base("cpu"), folder / f"adapter-{number}")  # files are opened on the CPU
        close(logits(loaded.to(DEVICE).eval(), ids), expected)
        if config.quantization_aware:
            merged = merge(model)
            assert {parameter.device.type for parameter in merged.parameters()} == {NAME}
            close(logits(merged, ids), expected)
            assert merged.generate(ids, max_new_tokens=3, pad_token_id=0).device.type == NAME
            merged.save_pretrained(folder / f"merged-{number}")
            close(logits(AutoModelForCausalLM.from_pretrained(folder / f"merged-{number}"), IDS), expected)
            export_onnx(folder / f"merged-{number}", folder / f"graph-{number}")
            assert verify(merged, folder / f"graph-{number}", ids).max_abs_difference < 1e-4
            first, second = (one.model.layers[0].mlp.up_proj for one in (merged, merge(trained("cpu", config))))
            close(folded(first).zeros, folded(second).zeros)
            close(logits(merged.dequantize(), ids), expected)
    sums_of_adapters()
    gathered()


def sums_of_adapters() -> None:
    """Two adapters as one, as on the CPU."""
    made = []
    for device in (DEVICE, "cpu"):
        model = trained(device, CONFIGS[0])
        torch.manual_seed(2)
        model.add_adapter("second", QBLoRAConfig(quantization_aware=True, r=4, init_lora_weights=False))
        model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "both", combination_type="svd")
        model.set_adapter("both")
        made.append(logits(model.eval(), IDS.to(device)))
    close(*made)


def gathered() -> None:
    """A model that was sharded there, whole on the CPU: sharding moves buffers in place."""
    expected = logits(trained("cpu", CONFIGS[0]), IDS)
    model = trained("cpu", CONFIGS[0]).to(DEVICE)
    model.register_buffer("steps", torch.zeros(1, device=DEVICE))
    gatherer = gather.Gatherer(model)  # whose buffers are the model's, there
    model.steps = model.steps + 1  # another tensor from here on
    weights = {name: value.detach().cpu() for name, value in model.state_dict().items()}
    with (
        mock.patch.object(gather, "is_sharded", return_value=True),
        mock.patch.object(gather, "get_model_state_dict", return_value=weights),
    ):
        whole = gatherer.whole(model, True)
    assert {tensor.device.type for tensor in (*whole.parameters(), *whole.buffers())} == {"cpu"}
    assert whole.steps == 1
    close(logits(merge(whole), IDS), expected)


def trainer(folder: Path) -> None:
    """SFTTrainer with everything that the callback does, and resuming."""
    from tests.trl import data, runs

    def run(steps: int, **options: Any) -> Any:
        callback = QBLoRACallback(runs.adapter(), eval_merged_loss=True, **options)
        settings = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        settings |= {"use_cpu": False, "dataloader_pin_memory": False, "max_steps": steps}
        return runs.sft(folder / "run", callback, eval_dataset=data.texts(), **settings)

    run(2, save_merged=True, stored_delta="float16").train()
    resumed = run(4, merged_output_dir=folder / "merged")
    resumed.train(resume_from_checkpoint=True)
    assert {parameter.device.type for parameter in resumed.model.parameters()} == {NAME}
    ids = IDS % 32
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    close(logits(resumed.model.eval(), ids.to(DEVICE)), logits(merged, ids))


if __name__ == "__main__":
    os.environ["ACCELERATE_TORCH_DEVICE"] = DEVICE
    register()
    with present():
        {"core": core, "trainer": trainer}[sys.argv[1]](Path(sys.argv[2]))
