"""What becomes of a trained adapter at 4 bits: merged exactly, or added to the weights and quantized again."""

import dataclasses

from peft import get_peft_model
from torch import nn

from integration.benchmarks import judging
from integration.benchmarks.cells import METHODS, Cell
from integration.benchmarks.models import split_of, task_, tokenizer_, trained_tensors
from qbl_trl.adapter.layer import adapter_layers
from qbl_trl.merging import merge
from qbl_trl.quant.gptq import gptq_model_
from qbl_trl.quant.hf_quantizer import quantize_model_
from qbl_trl.quant.targets import target_layers
from qbl_trl.wrapped import unwrap

CALIBRATION = 128  # training prompts


def deployed(cell: Cell, model: nn.Module, route: str) -> tuple[judging.Split, nn.Module]:
    """A trained model on its way to affine groups of the cell's bits and size: the lower part and the packed upper one.

    - "merged": the adapters over the packed base, through qbl_trl.merge: exact.
    - an algorithm, "rtn", "mse", "hqq" or "gptq" (calibrated on training prompts): the adapters added to the weights
      they were trained on, and quantized again.
    - "float+" and an algorithm: added to the float weights instead, as merging scripts do that reload the float model.

    Layers without adapters, and the lower part, are the affine base's own.

    Raises:
        MergeError: if "merged" is asked of a method whose in_factor is no multiple of the group.
    """
    lower = split_of(cell, "affine")
    if route == "merged":
        packed = judging.sharing_copy(split_of(cell, "float").upper)
        quantize_model_(packed, cell.affine)
        peft_model = get_peft_model(packed, cell.adapter(packed, quantization_aware=True))
        peft_model.load_state_dict(trained_tensors(model), strict=False)
        return lower, merge(peft_model)
    start, _, algorithm = route.rpartition("+")
    summed = judging.sharing_copy(split_of(cell, start or METHODS[cell.method].base).upper)
    for name, layer in adapter_layers(unwrap(model)).items():
        target = summed.get_submodule(name)
        target.weight = nn.Parameter(target.weight + layer.get_delta_weight("default").detach(), requires_grad=False)
    if algorithm == "gptq":
        sequences = [
            tokenizer_()(item.prompt)["input_ids"] for item in task_(cell.task, cell.tokens).train[:CALIBRATION]
        ]
        calibration = [{"inputs_embeds": states[None]} for states in lower.hidden(sequences)]
        config = dataclasses.replace(cell, algorithm="gptq").affine
        config.calibration = calibration
        gptq_model_(summed, config, target_layers(summed, config))
        return lower, summed
    return lower, quantize_model_(summed, dataclasses.replace(cell, algorithm=algorithm).affine)
