"""The small language models over bytes that the benchmarks train, about 0.86M parameters, and how they do."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from benchmarks import text

CONTEXT = 128
VALIDATION_WINDOWS = 128


def gpt2(
    vocabulary: int = 256, context: int = CONTEXT, width: int = 128, layers: int = 4, heads: int = 4
) -> nn.Module:
    """GPT-2's architecture: Conv1D, learned positions, biases, LayerNorm, head tied to the embedding."""
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=vocabulary,
            n_positions=context,
            n_embd=width,
            n_layer=layers,
            n_head=heads,
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


@torch.no_grad()
def validation_loss(model: nn.Module, validation: Tensor, windows: int = VALIDATION_WINDOWS) -> float:
    """Mean loss over fixed windows of the validation text, in nats per byte; the model is trained on."""
    model.eval()
    tokens = text.windows(validation, windows, CONTEXT, seed=1)
    total = sum(model(input_ids=t, labels=t).loss.item() * len(t) for t in tokens.split(16))
    model.train()
    return total / len(tokens)


def schedule(steps: int, warmup: int | None = None) -> Any:
    """Factor of the learning rate: linear warm-up, by default over a twentieth; then a cosine to 0.1."""
    warmup = max(steps // 20 if warmup is None else warmup, 1)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * min((step - warmup) / max(steps - warmup, 1), 1))

    return factor
