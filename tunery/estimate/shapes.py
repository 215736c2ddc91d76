"""Shapes of common models, for estimates of a model that is not in the catalogue and known by its size alone."""

import math
from typing import Any

_COLUMNS = (
    "parameters", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size", "num_attention_heads",
    "num_key_value_heads", "tie_word_embeddings",
)  # fmt: skip
_SHAPES = (
    (134_515_008, 576, 30, 1536, 49_152, 9, 3, True),  # SmolLM2 135M
    (494_032_768, 896, 24, 4864, 151_936, 14, 2, True),  # Qwen2.5 0.5B
    (1_235_814_400, 2048, 16, 8192, 128_256, 32, 8, True),  # Llama 3.2 1B
    (3_212_749_824, 3072, 28, 8192, 128_256, 24, 8, True),  # Llama 3.2 3B
    (8_030_261_248, 4096, 32, 14_336, 128_256, 32, 8, False),  # Llama 3.1 8B
    (32_763_876_352, 5120, 64, 27_648, 152_064, 40, 8, False),  # Qwen2.5 32B
    (70_553_706_496, 8192, 80, 28_672, 128_256, 64, 8, False),  # Llama 3.1 70B
)


def of_size(parameters: int) -> dict[str, Any]:
    """The card of the model nearest in size, with this many parameters."""
    nearest = min(_SHAPES, key=lambda shape: abs(math.log(shape[0] / parameters)))
    return dict(zip(_COLUMNS, nearest, strict=True)) | {"parameters": parameters}
