"""A base model for tests, made on the spot: a random 2-layer Llama with a byte-level tokenizer and a chat template."""

import json
from pathlib import Path
from typing import Any

HUB_ID = "tunery-tests/tiny-llama"
REVISION = "0123456789abcdef0123456789abcdef01234567"

PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GENERATION_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tiny_tokenizer(template: str = PLAIN_TEMPLATE) -> Any:
    """One token a byte, and `<|endoftext|>`, `<|im_start|>`, `<|im_end|>` (ids 0, 1, 2; the last ends a turn)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {token: number for number, token in enumerate(specials + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_model(seed: int = 0) -> Any:
    """Random weights, float32, about 30,000 parameters; the same for the same seed."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config)


def write_tiny_base(directory: Path, template: str = PLAIN_TEMPLATE) -> dict[str, Any]:
    """Write a base model as `trainer.import_base` would, `base.json` with it, and return what that says."""
    from trainer.import_base import describe

    directory.mkdir(parents=True, exist_ok=True)
    tiny_model().save_pretrained(directory)
    tiny_tokenizer(template).save_pretrained(directory)
    facts = {"name": "tiny-llama", "hub_id": HUB_ID, "revision": REVISION, "source": "tests", "license": "apache-2.0"}
    base = {**facts, **describe(directory)}
    (directory / "base.json").write_text(json.dumps(base))
    return base


def chat_rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Short conversations with something to learn: the answer repeats the number in words of one digit each."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    return [
        {
            "messages": [
                {"role": "user", "content": f"say {number}"},
                {"role": "assistant", "content": " ".join(words[int(digit)] for digit in str(number))},
            ]
        }
        for number in range(start, start + count)
    ]


def write_jsonl(file: Path, rows: list[dict[str, Any]]) -> Path:
    """One JSON object a line."""
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
