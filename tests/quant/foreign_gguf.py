"""GGUF files of tiny models, as llama.cpp's converter lays them out: the oracle of the GGUF importer.

Q4 and Q8 blocks are quantized by the package gguf; which rows, transposes and shifts an architecture has is written
down here a second time.
"""

from pathlib import Path

import numpy as np
import torch

SUFFIXES = (".weight", ".bias")
K_QUANTS = {  # bytes of a block of 256 weights, and where its float16 factors lie: those of the scales, of the minima
    "Q2_K": (84, {80: 1e-2, 82: 2e-2}),
    "Q3_K": (110, {108: 1e-3}),
    "Q4_K": (144, {0: 3e-4, 2: 2e-3}),
    "Q5_K": (176, {0: 1e-4, 2: 2e-3}),
    "Q6_K": (210, {208: 3e-5}),
}
SHIFTED = ("gemma2", "gemma3", "nemotron")  # their norms are stored as w + 1


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Row order in which llama.cpp stores q and k."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(
    path: Path, model, types: dict[str, str], default: str = "Q4_1", rope=None, architecture="llama", fields=None
) -> None:
    """A tiny model as a GGUF file; `types` by part of the tensor's name.

    `rope`: factors of the rotary angles (by the tensor's name, or of the usual one), or one factor of linear scaling.
    `fields`: metadata beside the usual.
    """
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_name("tiny")
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 1", "t 2"])
    writer.add_bos_token_id(1)
    writer.add_pad_token_id(0)  # that of Phi 3 would lie outside a tiny vocabulary
    if isinstance(rope, float):
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope)
    elif rope is not None:
        for name, factors in (rope if isinstance(rope, dict) else {"rope_freqs.weight": rope}).items():
            writer.add_tensor(name, factors)
    for key, value in {**usual_fields(config), **(fields or {})}.items():
        name = key if key.startswith("split.") else f"{architecture}.{key}"
        (writer.add_float32 if isinstance(value, float) else writer.add_uint32)(name, value)
    names = gguf.get_tensor_name_map(
        next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture), config.num_hidden_layers
    )
    stacks = {f"model.layers.{i}.mlp.experts.{part}.weight": values for i, part, values in stacks_of(model)}
    plain = {name: value.float().numpy() for name, value in model.state_dict().items() if ".experts." not in name}
    for name, value in (plain | stacks).items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = laid_out(architecture, name, value, config)
        known = name.replace("e_score_correction_bias", "e_score_correction.bias")
        place = names.get_name(known.removeprefix("transformer.") if architecture == "bloom" else known, SUFFIXES)
        usual = default if values.ndim >= 2 and not name.endswith(".gate.weight") else "F32"  # routers stay in float
        kind = next((kind for part, kind in types.items() if part in name), usual)
        if kind == "F32":
            writer.add_tensor(place, values)
        else:
            qtype = gguf.GGMLQuantizationType[kind]
            blocks = k_quants(values.shape, kind) if kind in K_QUANTS else gguf.quants.quantize(values, qtype)
            writer.add_tensor(place, blocks, raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stacks_of(model) -> list[tuple[int, str, np.ndarray]]:
    """(layer, gate_proj, up_proj or down_proj, (experts, rows, columns)), whichever way transformers holds experts."""
    found = []
    for index, layer in enumerate(getattr(getattr(model, "model", None), "layers", ())):
        block = getattr(layer, "block_sparse_moe", None) or layer.mlp
        experts = getattr(block, "experts", None)
        if isinstance(experts, torch.nn.ModuleList):
            for part, other in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                layers = [getattr(expert, part, None) or getattr(expert, other) for expert in experts]
                found.append((index, part, torch.stack([layer.weight for layer in layers])))
        elif experts is not None:
            gate, up = experts.gate_up_proj.chunk(2, dim=1)
            found += [(index, "gate_proj", gate), (index, "up_proj", up), (index, "down_proj", experts.down_proj)]
    return [(index, part, values.detach().float().contiguous().numpy()) for index, part, values in found]


def k_quants(shape: tuple[int, ...], kind: str) -> np.ndarray:
    """Random bytes of a K quant for a tensor of this shape, which the package gguf reads and does not write."""
    size, halves = K_QUANTS[kind]
    generator = np.random.default_rng(0)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // 256, size), dtype=np.uint8)
    for at, largest in halves.items():
        factor = generator.uniform(0.5, 1, (*blocks.shape[:-1], 1)) * largest
        blocks[..., at : at + 2] = factor.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)


def usual_fields(config) -> dict[str, int | float]:
    """Metadata that files of every architecture have."""
    heads, width = config.num_attention_heads, config.hidden_size
    return {
        "block_count": config.num_hidden_layers,
        "context_length": getattr(config, "max_position_embeddings", 64),
        "embedding_length": width,
        "feed_forward_length": getattr(config, "intermediate_size", 4 * width),
        "attention.head_count": heads,
        "attention.head_count_kv": getattr(config, "num_key_value_heads", None) or heads,
        "attention.layer_norm_rms_epsilon": float(getattr(config, "rms_norm_eps", 1e-5)),
        "attention.layer_norm_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": width // heads,
        "vocab_size": config.vocab_size,
    }


def laid_out(architecture: str, name: str, values: np.ndarray, config) -> np.ndarray:
    """One tensor's values the way the architecture's files hold them."""
    heads = config.num_attention_heads
    if architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
        return permuted(values, heads if "q_proj" in name else config.num_key_value_heads)
    if name.endswith("shared_expert_gate.weight"):
        return values[0]
    if architecture == "gpt2" and values.ndim == 2 and ".h." in name:
        return np.ascontiguousarray(values.T)
    if architecture == "bloom" and "query_key_value" in name:
        return values.reshape(heads, 3, -1, *values.shape[1:]).swapaxes(0, 1).reshape(values.shape)
    if architecture in SHIFTED and name.endswith("norm.weight"):
        return values + 1
    return values


def put_on_grid_(model, seed: int = 0) -> None:
    """Matrices that Q8_0 holds without a loss (multiples of 2**-10, 127 of them in every group), norms that differ."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2:
            codes = torch.randint(-127, 128, (*parameter.shape,), generator=generator).float()
            codes[..., ::32, :] = 127  # of rows and of columns: some architectures store the transpose
            codes[..., ::32] = 127
            parameter.data = codes * 2.0**-10
        else:
            parameter.data += torch.randn(parameter.shape, generator=generator) * (0.3 if "norm" in name else 0.1)
