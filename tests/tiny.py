"""Tiny random models for the tests: real architectures, no downloads."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

SIZES: dict[str, object] = {  # two layers of width 64 with grouped-query attention
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
}


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    """A Llama of SIZES."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).eval()


def tiny_gpt2(seed: int = 0) -> GPT2LMHeadModel:
    """Two layers whose linear weights are stored transposed (Conv1D)."""
    torch.manual_seed(seed)
    return GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=100, n_positions=64)).eval()


def tokens(batch: int = 2, length: int = 9, seed: int = 0, vocabulary: int = 100) -> torch.Tensor:
    """(batch, length) random token ids."""
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Logits without a graph."""
    with torch.no_grad():
        return model(ids).logits


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each of a hundred words, w0 to w99; what it does not know is w0."""
    words = {f"w{index}": index for index in range(100)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", pad_token="w2", bos_token="w1")
