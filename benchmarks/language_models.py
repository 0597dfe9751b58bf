"""The small language models over bytes that the benchmarks train, about 0.86M parameters, and how they do."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

CONTEXT = 128
VALIDATION_WINDOWS = 128


def gpt2() -> nn.Module:
    """GPT-2's architecture: Conv1D, learned positions, biases, LayerNorm, head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=CONTEXT,
            n_embd=128,
            n_layer=4,
            n_head=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def llama() -> nn.Module:
    """Llama's architecture: nn.Linear, rotary positions, SwiGLU, RMSNorm, no biases, a head of its own."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            max_position_embeddings=CONTEXT,
            hidden_size=128,
            intermediate_size=344,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


MODELS = {"llama": llama, "gpt2": gpt2}


def schedule(steps: int) -> Any:
    """Factor of the learning rate: linear warm-up over a twentieth of the steps, then a cosine to 0.1."""
    warmup = max(steps // 20, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1))

    return factor
