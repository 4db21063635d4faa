"""Causal LMs with random weights, small enough for a test, one of each architecture that the README names."""

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 64
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
NEW_STYLE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,  # of 16 values each, the least that flex_attention takes on a GPU
    "initializer_range": 0.3,  # far from uniform: a wrong position or mask is nats away, not noise
    **IDS,
}
GROUPED = {**NEW_STYLE, "num_key_value_heads": 1}
OLD_STYLE = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 64,
    "initializer_range": 0.3,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
    **IDS,
}

BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**GROUPED)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**GROUPED, sliding_window=6)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**GROUPED, tie_word_embeddings=True)),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEW_STYLE)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**OLD_STYLE)),
    "gptj": lambda: GPTJForCausalLM(GPTJConfig(**OLD_STYLE, rotary_dim=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**GROUPED, head_dim=16)),  # soft-caps its logits
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**GROUPED, logits_scaling=2.0)),  # divides them
}
SUPPORTED = ["llama", "mistral", "qwen2_tied", "gpt_neox", "gpt2", "gptj"]
# Before transformers 5.18 GPT-J has an attention of its own alone, which packed rows cannot take the place of.
WITH_SDPA = [name for name in SUPPORTED if name != "gptj" or GPTJForCausalLM._supports_sdpa]
PACKABLE = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            name not in WITH_SDPA,
            reason="GPT-J has no sdpa in this version of transformers: it is trained with packing=false",
        ),
    )
    for name in SUPPORTED
]


def tiny_model(name: str = "llama", *, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.nn.Module:
    """A model in eval mode. GPT-J's output bias, zero by default, is random, too."""
    torch.manual_seed(seed)
    model = BUILDERS[name]()
    if name == "gptj":
        torch.nn.init.normal_(model.lm_head.bias)
    return model.to(dtype).eval()


def exact_norms(model: torch.nn.Module) -> torch.nn.Module:
    """Compute RMS norms of a float64 model in float64, in place.

    Those of the Llama family round to float32 inside, and so do their gradients: the last bit of a float64 sum decides
    there about the last bit of a float32.
    """
    for module in list(model.modules()):
        for key, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data.copy_(child.weight.data)
                setattr(module, key, norm)
    return model
