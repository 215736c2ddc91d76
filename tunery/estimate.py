"""How much memory a job needs on its device, in closed form. One place; measurements will correct it."""

from typing import Any

from tunery.contracts.spec import Recipe

_CONTEXT = 1 << 30
"""CUDA context, cuBLAS workspaces, the fused head's tile (256 MiB)."""
_MARGIN = 1.15


def required_bytes(card: dict[str, Any], recipe: Recipe, longest_row_bytes: int, device: str = "cuda") -> int:
    """Peak bytes of supervised LoRA without gradient checkpointing.

    `card` is the base model's (`hidden_size`, `num_hidden_layers`, `intermediate_size`, `vocab_size`, `parameters`).
    Weights in bf16 (fp32 on a CPU), adapters with fp32 weights, gradients and two Adam moments (16 bytes each), and
    activations of eager attention blocks: 2 bytes x tokens x layers x (12 x hidden + 4 x intermediate).
    """
    width = 4 if device == "cpu" else 2
    hidden, layers, inner = card["hidden_size"], card["num_hidden_layers"], card["intermediate_size"]
    # a token is rarely shorter than two bytes; the longest row bounds every row
    longest = min(recipe.training.max_length, max(16, longest_row_bytes // 2))
    tokens = recipe.training.per_device_train_batch_size * longest
    activations = width * tokens * layers * (12 * hidden + 4 * inner)
    return int((width * card["parameters"] + 16 * lora_parameters(card, recipe) + activations + _CONTEXT) * _MARGIN)


def lora_parameters(card: dict[str, Any], recipe: Recipe) -> int:
    """Trainable parameters of LoRA on all seven linears of a Llama-like layer; fewer targets cost less."""
    hidden, layers, inner = card["hidden_size"], card["num_hidden_layers"], card["intermediate_size"]
    heads, groups = card.get("num_attention_heads", 1), card.get("num_key_value_heads", 1)
    narrow = hidden * groups // heads
    attention = 2 * (hidden + hidden) + 2 * (hidden + narrow)
    return recipe.adapter.r * layers * (attention + 3 * (hidden + inner))
