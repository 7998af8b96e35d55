"""Foreign checkpoints of a tiny model, packed code by code from the published layouts: the importers' oracles.

Everything here is written one integer at a time, on purpose in another way than the package unpacks it. Files that
the formats' own libraries wrote are read in integration/test_importers.py.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qbl_trl.quant.affine import Affine, dequantize
from tests.tiny import tiny_llama

GROUP = 32
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def linear_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}


def random_affine(rows: int, columns: int, bits: int, seed: int, *, zeros="integer", dtype=torch.float16, group=GROUP):
    """Codes, scales and zero points as a quantizer might leave them."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    shape = (rows, -(-columns // group))
    scales = (torch.rand(shape, generator=generator) * 0.02 + 0.01).to(dtype)
    if zeros == "half":
        points = torch.full(shape, 1 << (bits - 1), dtype=torch.uint8)
    elif zeros == "float":
        points = (torch.rand(shape, generator=generator) * ((1 << bits) - 1)).to(dtype)
    else:
        points = torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)
    return Affine(codes, scales, points)


def word_matrix(values: Tensor, bits: int, order=None, *, whole=False) -> Tensor:
    """(R, C) integers -> (R, C bits / 32) int32, each word filled field by field along a row.

    Args:
        whole: of bits that do not fill a word, leave the rest of it empty; else a row is one long number.
    """
    if 32 % bits and not whole:
        numbers = [sum(value << (bits * index) for index, value in enumerate(row)) for row in values.tolist()]
        count = -(-values.shape[1] * bits // 32)
        words = [[number >> (32 * index) & 0xFFFFFFFF for index in range(count)] for number in numbers]
        return torch.tensor(words).to(torch.int32)
    per_word = 32 // bits
    order = order or range(per_word)
    rows = []
    for row in values.tolist():
        row = row + [0] * (-len(row) % per_word)
        words = []
        for start in range(0, len(row), per_word):
            word = 0
            for field, column in enumerate(order):
                word |= row[start + column] << (bits * field)
            words.append(word - (1 << 32) if word >= 1 << 31 else word)
        rows.append(words)
    return torch.tensor(rows, dtype=torch.int32)


def gptq_tensors(affine: Affine, bits: int, *, v1: bool = True, act_order=False, group=GROUP) -> dict[str, Tensor]:
    codes, scales, zeros = affine
    words = word_matrix((zeros.T + 7) % 8 if v1 and bits == 3 else zeros.T, bits)
    if v1 and bits != 3:  # the library subtracts one from every field by subtracting this word, borrows included
        words = words - sum(1 << shift for shift in range(0, 32, bits))
    index = torch.arange(codes.shape[1]) // group
    return {
        "qweight": word_matrix(codes, bits).T.contiguous(),
        "qzeros": words,
        "scales": scales.T.contiguous(),
        "g_idx": (index.flip(0) if act_order else index).int(),
    }


def awq_tensors(affine: Affine, version: str = "gemm") -> dict[str, Tensor]:
    codes, scales, zeros = affine
    if version == "gemm":
        return {
            "qweight": word_matrix(codes.T, 4, AWQ_ORDER),
            "qzeros": word_matrix(zeros.T, 4, AWQ_ORDER),
            "scales": scales.T.contiguous(),
        }
    padded = torch.zeros(len(scales), -(-scales.shape[1] // 8) * 8, dtype=scales.dtype)
    padded[:, : scales.shape[1]] = scales
    return {"qweight": word_matrix(codes, 4), "qzeros": word_matrix(zeros, 4), "scales": padded}


def compressed_tensors(affine: Affine, bits: int, *, symmetric: bool, whole=False) -> dict[str, Tensor]:
    codes, scales, zeros = affine
    tensors = {
        "weight_packed": word_matrix(codes, bits, whole=whole),
        "weight_scale": scales,
        "weight_shape": torch.tensor(codes.shape),
    }
    if symmetric:
        return tensors
    return tensors | {"weight_zero_point": word_matrix(zeros.T, bits, whole=whole).T.contiguous()}


def signed_zeros(affine: Affine) -> dict[str, Tensor]:
    """As compressed-tensors kept zero points before 0.9.4; an order that was never set is minus one."""
    tensors = compressed_tensors(affine, 4, symmetric=False)
    zeros = {"weight_zero_point": (affine.zeros.short() - 8).to(torch.int8)}
    return tensors | zeros | {"weight_g_idx": torch.full((affine.codes.shape[1],), -1, dtype=torch.int32)}


def hqq_tensors(affine: Affine, bits: int, axis: int = 1) -> dict[str, Tensor]:
    codes, scales, zeros = affine
    rows = codes.reshape(-1, GROUP).tolist()
    lanes, kind, name = (10, torch.int32, "3bit_32") if bits == 3 else (8 // bits, torch.uint8, f"{bits}bit_u8")
    rows += [[0] * GROUP] * (-len(rows) % lanes)
    step = len(rows) // lanes
    packed = [
        [sum(rows[lane * step + r][c] << (bits * (lanes - lane - 1)) for lane in range(lanes)) for c in range(GROUP)]
        for r in range(step)
    ]
    text = torch.tensor(list(name.encode()), dtype=torch.uint8)
    numbers = {"nbits": bits, "group_size": GROUP, "axis": axis, "quant_scale": 0, "quant_zero": 0}
    return {
        "W_q": torch.tensor(packed, dtype=kind),
        "scale": scales.reshape(-1, 1),
        "zero": zeros.reshape(-1, 1),
        "shape": torch.tensor(codes.shape),
        "packing": text,
        **{key: torch.tensor(value, dtype=torch.int32) for key, value in numbers.items()},
    }


def write_folder(folder: Path, tensors_of, quantization: dict, affine_of, *, shards: int = 1, dtype=torch.float32):
    """A checkpoint folder of the tiny model.

    Args:
        tensors_of: Affine -> the tensors of one layer.
        affine_of: (rows, columns, seed) -> Affine.

    Returns:
        The float model that the checkpoint stands for, and each layer's Affine.
    """
    model, affines, tensors = tiny_llama(attention_bias=True), {}, {}
    for seed, (name, layer) in enumerate(linear_layers(model).items()):
        affines[name] = affine_of(*layer.weight.shape, seed)
        group = -(-layer.weight.shape[1] // affines[name].scales.shape[1])
        layer.weight.data = dequantize(*affines[name], group)
        tensors |= {f"{name}.{key}": value.contiguous() for key, value in tensors_of(affines[name]).items()}
        if layer.bias is not None:
            torch.nn.init.normal_(layer.bias)
            tensors[f"{name}.bias"] = layer.bias.data
    own = {f"{name}.weight" for name in affines} | {"lm_head.weight"}
    tensors |= {name: value.to(dtype) for name, value in model.state_dict().items() if name not in {*own, *tensors}}
    folder.mkdir()
    if model.config.tie_word_embeddings is False:
        tensors["lm_head.weight"] = model.lm_head.weight.data.to(dtype)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    else:
        parts = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
        where = {name: parts[i % shards] for i, name in enumerate(names)}
        for part in parts:
            save_file({n: tensors[n] for n in names if where[n] == part}, folder / part, metadata={"format": "pt"})
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    named = {"architectures": [type(model).__name__], "torch_dtype": "float32"}
    config = model.config.to_dict() | named | {"quantization_config": quantization}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text("{}")
    return model, affines


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"}
AUTO_ROUND = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False}
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 32}
COMPRESSED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
    "ignore": ["lm_head"],
}
HQQ = {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4, "group_size": 32, "axis": 1}}}


def symmetric_compressed():
    return COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS | {"symmetric": True}}}}


def affines(bits=4, **changes):
    return lambda rows, columns, seed: random_affine(rows, columns, bits, seed, **changes)


def compressed_group(**changes):
    return COMPRESSED | {"config_groups": {"group_0": {"weights": WEIGHTS} | changes}}


def write_layer(folder, columns, size, settings, **changes):
    """One GPTQ layer `layer` of 8 rows in groups of `size`, and its codes."""
    affine = random_affine(8, columns, 4, 0, group=size)
    made = gptq_tensors(affine, 4, group=size)
    made.pop("g_idx", None)  # AutoRound writes none
    folder.mkdir()
    save_file({f"layer.{key}": value for key, value in (made | changes).items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": settings}))
    return affine
