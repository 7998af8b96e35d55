"""Architectures that the export is tried with, as tiny models, and the attention that each is written with."""

import torch
import transformers

from qbl_trl.generation import BEFORE_5
from qbl_trl.quant.stacks import unstack_
from tests.onnx.models import PAD, quantize

WIDE = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
TOKENS = {"bos_token_id": 1, "eos_token_id": PAD, "pad_token_id": PAD}
GATED = {**WIDE, **TOKENS, "intermediate_size": 96, "max_position_embeddings": 64, "num_key_value_heads": 2}
GEMMA = {"head_dim": 32, "sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
MOE = {**GATED, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
DEEPSEEK = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 8, "v_head_dim": 16}
BART_SIDE = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
YARN = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "original_max_position_embeddings": 16}
FALCON = {**WIDE, **TOKENS, "max_position_embeddings": 64}
GPTJ = {"n_embd": 128, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "n_positions": 64, "vocab_size": 100}
BART = {f"{side}_{name}": size for side in ("encoder", "decoder") for name, size in BART_SIDE.items()}
BART |= {"d_model": 64, "vocab_size": 100, "max_position_embeddings": 64}
# transformers 5 caches what keys and values are made of, which no fused operator does.
LATENT_ATTENTION = "attention" if BEFORE_5 else "standard"
ARCHITECTURES = {
    "llama": ("Llama", GATED, "gqa"),
    "mistral with a window": ("Mistral", {**GATED, "sliding_window": 6}, "gqa"),
    "qwen2 with biases": ("Qwen2", GATED, "gqa"),
    "qwen3 with its own head size": ("Qwen3", {**GATED, "head_dim": 32}, "gqa"),
    "gemma2 with windows": ("Gemma2", {**GATED, **GEMMA}, "gqa"),
    "gemma2 with capped scores": ("Gemma2", {**GATED, **GEMMA, "attn_implementation": "eager"}, "gqa"),
    "phi3 with joined projections": ("Phi3", GATED, "gqa"),
    "gpt_neox with partial rotary": (
        "GPTNeoX",
        {**WIDE, **TOKENS, "intermediate_size": 96, "max_position_embeddings": 64, "rotary_pct": 0.25},
        "attention",
    ),
    "qwen3 with experts": ("Qwen3Moe", {**MOE, "num_experts": 4}, "gqa"),
    "gpt_oss with sinks and windows": (
        "GptOss",
        {**GATED, "head_dim": 32, "num_local_experts": 4, "sliding_window": 6, "rope_scaling": YARN},
        "gqa",
    ),
    "phimoe, which reads rows of whole rotary tables": (
        "Phimoe",
        {**GATED, "num_local_experts": 4, "sliding_window": 32},  # torch's cache is wrong beyond it
        "gqa",
    ),
    "mixtral, which asks the chosen experts": ("Mixtral", {**MOE, "num_local_experts": 4}, "gqa"),
    "granite with experts split by token counts": (
        "GraniteMoe",
        {
            **GATED,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "attention_multiplier": 0.125,
            "logits_scaling": 2.0,
        },
        "gqa",
    ),
    "granite with experts and one shared": (
        "GraniteMoeShared",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
        "gqa",
    ),
    "jetmoe, whose attention is a mixture too": (
        "JetMoe",
        {**GATED, "num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 16},
        "standard",
    ),
    "dbrx, whose experts lie in one matrix": (
        "Dbrx",
        {**TOKENS, "d_model": 128, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 100}
        | {
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
            "ffn_config": {"moe_top_k": 2, "ffn_hidden_size": 64},
        },
        "gqa",
    ),
    "deepseek with experts and latent heads": (
        "DeepseekV3",
        {**MOE, **DEEPSEEK, **LATENT, "num_key_value_heads": 4},
        LATENT_ATTENTION,
    ),
    "deepseek v2, which rotates by complex numbers": (
        "DeepseekV2",
        {**MOE, **DEEPSEEK, **LATENT, "num_key_value_heads": 4, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        LATENT_ATTENTION,
    ),
    "llama4, which attends in chunks": (
        "Llama4Text",
        {**GATED, "head_dim": 16, "num_local_experts": 4, "intermediate_size_mlp": 96, "attention_chunk_size": 5},
        "standard",
    ),
    "phi with grouped heads": ("Phi", GATED, "attention"),
    "phi, which rotates half of each head": ("Phi", {**GATED, "hidden_size": 128}, "gqa"),
    "stablelm, which calls torch's attention": (
        "StableLm",
        {**GATED, "hidden_size": 128, "partial_rotary_factor": 0.5},
        "gqa",
    ),
    "nemotron, which calls torch's attention": ("Nemotron", {**GATED, "hidden_size": 128}, "gqa"),
    "glm, which rotates half of each head in pairs": ("Glm", {**GATED, "head_dim": 32}, "gqa"),
    "ernie with pairs of neighbours": ("Ernie4_5", GATED, "gqa"),
    "olmo2 with norms behind": ("Olmo2", GATED, "gqa"),
    "gemma3 with norms of heads": ("Gemma3Text", {**GATED, "head_dim": 32, "sliding_window": 6}, "gqa"),
    "falcon with grouped heads": ("Falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}, "gqa"),
    "falcon with alibi": ("Falcon", {**FALCON, "alibi": True, "multi_query": False}, "gqa"),
    "falcon with alibi and one key head": ("Falcon", {**FALCON, "alibi": True}, "gqa"),
    "bloom, whose heads lie in turns": (
        "Bloom",
        {**TOKENS, "hidden_size": 96, "n_layer": 2, "n_head": 6, "vocab_size": 100},
        "gqa",
    ),
    "mpt, whose bias is a table": (
        "Mpt",
        {**TOKENS, "d_model": 64, "n_layers": 2, "n_heads": 4, "vocab_size": 100, "max_seq_len": 64},
        "gqa",
    ),
    "gpt_bigcode with one key head": (
        "GPTBigCode",
        {**TOKENS, "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 100},
        "gqa",
    ),
    "cohere2 with windows and interleaved angles": (
        "Cohere2",
        {**GATED, "sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
        "gqa",
    ),
    "starcoder2, which Optimum does not know": ("Starcoder2", {**GATED, "sliding_window": 6}, "gqa"),
    "gptj, which rotates in a way of its own": ("GPTJ", {**TOKENS, **GPTJ}, "gqa"),
    "codegen, whose heads lie in four parts": ("CodeGen", {**TOKENS, **GPTJ}, "gqa"),
    "gpt_neo with windows and unscaled": (
        "GPTNeo",
        {**WIDE, **TOKENS, "num_layers": 2, "num_heads": 4, "window_size": 6, "max_position_embeddings": 64}
        | {"attention_types": [[["global", "local"], 1]]},
        "gqa",
    ),
    "xglm with positions as sinusoids": (
        "XGLM",
        {**TOKENS, "d_model": 64, "num_layers": 2, "attention_heads": 4, "ffn_dim": 96, "vocab_size": 100}
        | {"max_position_embeddings": 64},
        "gqa",
    ),
    "biogpt, which makes its mask by itself": (
        "BioGpt",
        {**WIDE, **TOKENS, "intermediate_size": 96, "max_position_embeddings": 64},
        "gqa",
    ),
    "the decoder of bart": ("Bart", {**TOKENS, **BART}, "gqa"),
    "hunyuan with norms behind the rotation": ("HunYuanDenseV1", {**GATED, "head_dim": 16}, "gqa"),
    "opt with learned positions": (
        "OPT",
        {**WIDE, **TOKENS, "ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64},
        "gqa",
    ),
}

PER_LAYER = {"hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 100, "num_hidden_layers": 4}
PER_LAYER |= {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
NEWER = {  # which transformers 4.57 does not have, or whose caches it shares in a way of its own
    "gemma4 with shared caches": (
        "Gemma4Text",
        {**GATED, "head_dim": 16, "global_head_dim": 32, "sliding_window": 6, **PER_LAYER},
        "gqa",
    ),
    "gemma4 with experts": (
        "Gemma4Text",
        {**GATED, "head_dim": 16, "global_head_dim": 32, "sliding_window": 6, "hidden_size_per_layer_input": 0}
        | {
            "layer_types": ["sliding_attention", "full_attention"],
            "enable_moe_block": True,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
        },
        "gqa",
    ),
    "gemma3n with shared caches": (
        "Gemma3nText",
        {**GATED, "head_dim": 16, "sliding_window": 6, **PER_LAYER, "laurel_rank": 32, "altup_num_inputs": 2}
        | {"activation_sparsity_pattern": [0.0] * 4},
        "gqa",
    ),
    "ministral3, which scales queries behind the rotation": (
        "Ministral3",
        {**GATED, "head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1, "rope_theta": 1e4}},
        "gqa",
    ),
    "glm4 with experts": (
        "Glm4Moe",
        {**MOE, "head_dim": 32, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1}
        | {"n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5},
        "gqa",
    ),
    "granite with windows, sinks and two rotations": ("GraniteSWA", {**GATED, "sliding_window": 6}, "gqa"),
    "minimax_m2": ("MiniMaxM2", {**MOE, "num_local_experts": 4, "rotary_dim": 16}, "gqa"),
    "apertus, whose activation is learned": (
        "Apertus",
        {**GATED, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        "gqa",
    ),
}
LINEAR = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 32, "linear_conv_kernel_dim": 4, "head_dim": 64}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_n_groups": 2, "mamba_d_state": 16, "mamba_d_conv": 4}
LAYERS = {"layer_types": ["linear_attention", "full_attention"]}
CONVOLVED = {"layer_types": ["conv", "full_attention"]}
SHARED_EXPERT = {"num_experts": 4, "shared_expert_intermediate_size": 32}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
MROPE |= {"mrope_section": [3, 3, 2], "mrope_interleaved": True}
STATES = {  # whose layers keep states of fixed size
    "qwen3.5 with a delta rule": ("Qwen3_5Text", {**GATED, **LINEAR, **LAYERS, "rope_parameters": MROPE}, "gqa"),
    "qwen3-next with a delta rule and experts": ("Qwen3Next", {**MOE, **LINEAR, **LAYERS, **SHARED_EXPERT}, "gqa"),
    "olmo with a delta rule": ("OlmoHybrid", {**GATED, **LINEAR, **LAYERS, "head_dim": 16}, "gqa"),
    "kimi, whose decay is of every feature": (
        "KimiLinear",
        {**MOE, **LATENT, **LAYERS, "linear_num_heads": 4, "linear_head_dim": 32, "num_experts": 4}
        | {"num_key_value_heads": 4, "q_lora_rank": None, "first_k_dense_replace": 1},
        "standard",
    ),
    "granite with Mamba's recurrence": (
        "GraniteMoeHybrid",
        {**GATED, **MAMBA, **LAYERS, "mamba_n_groups": 1, "num_local_experts": 0, "num_experts_per_tok": 0}
        | {"shared_intermediate_size": 64},
        "gqa",
    ),
    "granite with Mamba's recurrence and experts": (
        "GraniteMoeHybrid",
        {**GATED, **MAMBA, **LAYERS, "num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
        "gqa",
    ),
    "bamba": ("Bamba", {**GATED, **MAMBA, "attn_layer_indices": [1]}, "attention"),
    "falcon, whose layers attend and recur": ("FalconH1", {**GATED, **MAMBA, "mamba_d_ssm": 128}, "gqa"),
    "nemotron, whose layers do one thing each": (
        "NemotronH",
        {**GATED, "layers_block_type": ["mamba", "attention", "mlp"], "mamba_num_heads": 8, "mamba_head_dim": 16}
        | {"n_groups": 2, "ssm_state_size": 16, "num_hidden_layers": 3},
        "gqa",
    ),
    "zamba2 with a shared layer": (
        "Zamba2",
        {**GATED, "mamba_d_state": 16, "mamba_ngroups": 2, "n_mamba_heads": 8, "num_hidden_layers": 3}
        | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"], "hybrid_layer_ids": [1]},
        "gqa",
    ),
    "mamba2, which never attends": (
        "Mamba2",
        {**WIDE, **TOKENS, "num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2},
        "standard",
    ),
    "mamba, whose features recur each for itself": (
        "Mamba",
        {**WIDE, **TOKENS, "state_size": 16, "time_step_rank": 4, "use_associative_scan": False},
        "standard",
    ),
    "falcon mamba": (
        "FalconMamba",
        {**WIDE, **TOKENS, "state_size": 16, "time_step_rank": 4, "use_associative_scan": False},
        "standard",
    ),
    "jamba with experts, whose features recur each for itself": (
        "Jamba",
        {**MOE, "num_experts": 4, "expert_layer_period": 2, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"mamba_dt_rank": 4},
        "gqa",
    ),
    "zamba, whose heads of features recur each for itself": (
        "Zamba",
        {**GATED, "mamba_dt_rank": 4, "num_hidden_layers": 4}
        | {"layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"]},
        "gqa",
    ),
    "lfm2 with convolutions": ("Lfm2", {**GATED, **CONVOLVED, "block_auto_adjust_ff_dim": False}, "gqa"),
    "lfm3 with convolutions and a rotation of a type": ("Lfm3", {**GATED, **CONVOLVED}, "gqa"),
    "lfm2 with convolutions and experts": (
        "Lfm2Moe",
        {**MOE, **CONVOLVED, "num_experts": 4, "num_dense_layers": 1},
        "gqa",
    ),
}
if not BEFORE_5:
    ARCHITECTURES |= NEWER | STATES

FUSED = [name for name, row in ARCHITECTURES.items() if row[2] == "gqa"]
PADDED = {  # fused too, and of interest for what they make of padding
    "gemma without positions": ("Gemma", {**GATED, "head_dim": 16}, "gqa"),
    "pegasus with positions as sinusoids": ("Pegasus", {**TOKENS, **BART}, "gqa"),
    "mixtral with a window": ("Mixtral", {**MOE, "num_local_experts": 4, "sliding_window": 6}, "gqa"),
}


def build_named(case):
    return build(*{**ARCHITECTURES, **PADDED}[case][:2])


def build(kind, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    decoder = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).eval()
    for name, parameter in decoder.named_parameters():
        if name.endswith(("sinks", "dt_bias", "conv1d.weight", "conv.weight")):
            parameter.data.normal_(std=0.5 if "conv" in name else 1.0)  # nearly zero until trained, or all alike
        if name.endswith("A_log"):
            parameter.data.uniform_(-1, 1)
    unstack_(decoder, untraceable=True)
    return quantize(decoder)


TOWER = {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
VISION = {
    "llava": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**GATED),
        vision_config=transformers.CLIPVisionConfig(hidden_size=32, **TOWER),
        image_token_index=99,
    ),
    "smolvlm": lambda: transformers.SmolVLMConfig(
        text_config=transformers.LlamaConfig(**GATED).to_dict(),
        vision_config={"hidden_size": 32, **TOWER},
        image_token_id=99,
    ),
    "qwen2-vl": lambda: transformers.Qwen2VLConfig(
        text_config={**GATED, "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2},
        image_token_id=99,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    ),
    "gemma3": lambda: transformers.Gemma3Config(
        text_config={**GATED, "head_dim": 16, "sliding_window": 6}, vision_config={"hidden_size": 32, **TOWER}
    ),
}
NEWER_VISION = {
    "gemma4, which reads a row of its embedding": lambda: transformers.Gemma4Config(
        text_config=NEWER["gemma4 with shared caches"][1],
        vision_config={"hidden_size": 32, "head_dim": 16, "num_key_value_heads": 2, **TOWER},
        audio_config=None,
        image_token_id=99,
        audio_token_id=98,
        video_token_id=97,
    ),
    "mistral3 over ministral3": lambda: transformers.Mistral3Config(
        text_config=transformers.Ministral3Config(**GATED, head_dim=16).to_dict(),
        vision_config=transformers.PixtralVisionConfig(hidden_size=32, **TOWER).to_dict(),
        image_token_index=99,
    ),
    "qwen3-vl": lambda: transformers.Qwen3VLConfig(
        text_config={**GATED, "head_dim": 16, "rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64}
        | {"deepstack_visual_indexes": [0]},
        image_token_id=99,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    ),
}
if not BEFORE_5:
    VISION |= NEWER_VISION
