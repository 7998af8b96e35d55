"""One loaded layer of another quantizer becomes a GroupQuantLinear with its codes, without going through a file.

| kind | read where |
| --- | --- |
| hqq | axis = 1 |
| gptq, awq | the kernel keeps the checkpoint's layout (GPTQModel's plain torch kernels do; many repack for speed) |
| torchao, quanto | see `subclasses.py` |

The layer's own answer to random inputs decides whether it was read right.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qbl_trl.arithmetic import plain_arithmetic
from qbl_trl.errors import CheckpointError
from qbl_trl.quant.importers.awq import AWQReader
from qbl_trl.quant.importers.folders import FolderReader
from qbl_trl.quant.importers.gptq import GPTQReader
from qbl_trl.quant.importers.hqq import HQQReader
from qbl_trl.quant.importers.shards import LoadedTensors
from qbl_trl.quant.importers.subclasses import read_layer
from qbl_trl.quant.linear import GroupQuantLinear

_READERS: dict[str, type[FolderReader]] = {"hqq": HQQReader, "gptq": GPTQReader, "awq": AWQReader}
LAYER_KINDS = frozenset({*_READERS, "torchao", "quanto"})  # of layers that `take_over` knows
_PROBE_ROWS = 4
_ROUNDINGS = 8  # of the layer's own dtype: of weights, sums and outputs, relative to the largest output


def take_over(layer: nn.Module, kind: str, name: str) -> GroupQuantLinear:
    """The same codes, scales, zero points and bias as a layer of ours, on the layer's device.

    Args:
        kind: one of LAYER_KINDS.
        name: full name of the layer, for messages.

    Raises:
        CheckpointError: if the layer does not hold its codes in a layout that is known, or computes something else.
    """
    source = Path(type(layer).__name__)
    tensors = {f"{name}.{key}": value for key, value in layer.state_dict().items()}
    try:
        if kind in _READERS:
            ours = _READERS[kind](source, _settings(layer, kind), LoadedTensors(source, tensors)).layer(name)
        else:
            ours = read_layer(layer)
        ours.to(next(iter(tensors.values())).device).train(layer.training)
        difference, allowed = _difference(ours, layer)
    except (CheckpointError, RuntimeError, ValueError, OSError) as error:  # OSError: quanto builds kernels on first use
        raise CheckpointError(f"{name}: the codes of this {kind} layer cannot be taken over: {error}") from error
    if not difference <= allowed:
        convert = " Convert the checkpoint first, code for code: qbl-trl quantize --from FOLDER OUTPUT"
        raise CheckpointError(
            f"{name}: read code for code, this {type(layer).__name__} computes something else (relative difference "
            f"{difference:.1e}, its dtype allows {allowed:.1e}): its kernel keeps another layout."
            f"{convert if kind in _READERS else ''}"
        )
    return ours


def _settings(layer: Any, kind: str) -> dict[str, Any]:
    """What the checkpoint's configuration would say of this layer."""
    if kind == "hqq":
        return {}  # in its tensors
    settings = {"bits": layer.bits, "group_size": layer.group_size}
    if kind == "gptq":
        second = getattr(layer, "qzero_format", lambda: 1)() == 2
        settings |= {"sym": layer.sym, "checkpoint_format": "gptq_v2" if second else "gptq"}
    return settings


def _difference(ours: GroupQuantLinear, layer: nn.Module) -> tuple[float, float]:
    """Of the two layers' answers, relative to the largest, and what the layer's dtype allows."""
    dtype = next((t.dtype for t in _floats(layer)), torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_PROBE_ROWS, ours.in_features, generator=generator, dtype=torch.float32, device="cpu")
    x = x.to(ours.weight.device, dtype)
    with torch.no_grad(), plain_arithmetic(x.device.type):
        expected = layer(x).float()
        difference = float((ours(x.float()) - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
    return difference, _ROUNDINGS * torch.finfo(dtype).eps


def _floats(layer: nn.Module) -> list[Tensor]:
    dtype = getattr(layer, "compute_dtype", None)  # HQQ
    if isinstance(dtype, torch.dtype):
        return [torch.empty(0, dtype=dtype)]
    return [tensor for tensor in layer.state_dict().values() if tensor.is_floating_point()]
