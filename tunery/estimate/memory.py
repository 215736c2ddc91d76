"""How much memory a run needs on each of its devices, in closed form. Bytes throughout.

    weights     2 a parameter (bf16), 4 (fp32, and on a CPU), 0.516 of what is linear and 2 of the rest (NF4)
    trainable   16 a trained parameter: fp32 weight, gradient and two Adam moments
    activations tokens x layers x (12 hidden + 4 inner) values of eager LoRA; with checkpointing one hidden vector a
                token and layer, and one layer live
    head        the fused head's fp32 gradient, 4 a token and hidden value; its tile lies in the context
    temporary   NF4: the largest linear in bf16, twice
    context     1 GiB: CUDA context or Python with torch, cuBLAS workspaces, the head's tile

Data-parallel devices hold all of it each.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from tunery.contracts.spec import LoraSpec, Recipe

CONTEXT_BYTES = 1 << 30
ADAM_BYTES = 16
"""fp32 weight, gradient and two moments."""
NF4_BYTES = 0.516
"""A parameter, its block's scale included (double quantisation: 4.127 bits)."""
BYTES_PER_TOKEN = 4
"""Of JSON, typically; a token is rarely shorter than half of it."""

Kind = Literal["cuda", "cpu"]


class Method(StrEnum):
    """What is trained, and over what."""

    LORA = "lora"
    QLORA = "qlora"
    """LoRA over a base in NF4."""
    FULL = "full"


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on each device, by what they are for."""

    weights: int
    trainable: int
    activations: int
    head: int
    temporary: int
    context: int = CONTEXT_BYTES

    @property
    def total(self) -> int:
        return self.own + self.weights + self.temporary + self.context

    @property
    def own(self) -> int:
        """What is this run's alone where several share one resident base."""
        return self.trainable + self.activations + self.head


def closed_form(
    card: dict[str, Any],
    *,
    method: Method,
    trained: int,
    tokens: int,
    precision: str = "auto",
    kind: Kind = "cuda",
    checkpointing: bool = False,
) -> Memory:
    """Peak memory on one device.

    `card` is the base model's shape (`hidden_size`, `num_hidden_layers`, `intermediate_size`, `vocab_size`,
    `parameters`); `trained` counts trainable parameters, `tokens` those of the largest micro-batch, padding included.
    """
    hidden, layers, inner = card["hidden_size"], card["num_hidden_layers"], card["intermediate_size"]
    width = value_bytes(precision, kind)
    a_layer = 12 * hidden + 4 * inner
    kept = layers * hidden + a_layer if checkpointing else layers * a_layer
    quantised = method is Method.QLORA
    return Memory(
        weights=_weights(card, method, width),
        trainable=ADAM_BYTES * trained,
        activations=width * tokens * kept,
        head=4 * tokens * hidden,
        temporary=2 * 2 * hidden * inner if quantised else 0,
    )


def of_recipe(
    card: dict[str, Any], recipe: Recipe, longest_row_bytes: int, *, kind: Kind = "cuda", checkpointing: bool = False
) -> Memory:
    """Peak memory on each device of a resolved recipe, whose longest row has so many bytes."""
    return closed_form(
        card,
        method=method_of(recipe),
        trained=lora_parameters(card, recipe.adapter),
        tokens=recipe.training.per_device_train_batch_size * longest_row(recipe, longest_row_bytes),
        precision=recipe.training.precision,
        kind=kind,
        checkpointing=checkpointing,
    )


def method_of(recipe: Recipe) -> Method:
    """Recipes know LoRA alone today."""
    return Method(recipe.adapter.type)


def value_bytes(precision: str, kind: Kind) -> int:
    """Of a weight and of an activation: `auto` is bf16 on a GPU and fp32 on a CPU."""
    return 4 if precision == "fp32" or (precision == "auto" and kind == "cpu") else 2


def longest_row(recipe: Recipe, longest_row_bytes: int) -> int:
    """Tokens of the longest row, at most: a token is rarely shorter than two bytes."""
    return min(recipe.training.max_length, max(16, 2 * longest_row_bytes // BYTES_PER_TOKEN))


def lora_parameters(card: dict[str, Any], adapter: LoraSpec) -> int:
    """Trainable parameters of LoRA on the named linears of a Llama-like model; a name that it lacks counts as all."""
    hidden, inner = card["hidden_size"], card["intermediate_size"]
    heads, groups = card.get("num_attention_heads") or 1, card.get("num_key_value_heads") or 1
    narrow = hidden * groups // heads
    sides = {
        "q_proj": hidden + hidden,
        "k_proj": hidden + narrow,
        "v_proj": hidden + narrow,
        "o_proj": hidden + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    asked = adapter.target_modules
    named = sides if isinstance(asked, str) or not set(asked) <= sides.keys() else {name: sides[name] for name in asked}
    return adapter.r * card["num_hidden_layers"] * sum(named.values())


def _weights(card: dict[str, Any], method: Method, width: int) -> int:
    parameters = card["parameters"]
    match method:
        case Method.QLORA:
            embedding = card["hidden_size"] * card["vocab_size"] * (1 if card.get("tie_word_embeddings") else 2)
            linear = max(0, parameters - embedding)
            return int(NF4_BYTES * linear) + 2 * (parameters - linear)
        case Method.FULL:
            return 0  # the 16 bytes of a trained parameter have it: bf16 with its gradient, fp32 master and moments
        case Method.LORA:
            return width * parameters
