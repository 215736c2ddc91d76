"""A base model for tests, made on the spot: a random 2-layer Llama with a byte-level tokenizer and a chat template."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from tunery.contracts.channel import read_lines, send_line
from tunery.contracts.events import EVENTS, Checkpoint, Event, Metrics, Stored, Tick
from tunery.contracts.spec import BaseModelRef, DataRef, Lineage, Recipe, TrainingSpec

AnyEvent = TypeVar("AnyEvent", bound=Event)

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


def spec_for(work: Path, base: Path, train: Path, validation: Path | None = None, **recipe: Any) -> TrainingSpec:
    """A spec in the folder `work`; `recipe` has the keys `adapter`, `training` and `evaluation`."""
    work.mkdir(parents=True, exist_ok=True)
    facts = json.loads((base / "base.json").read_text())
    return TrainingSpec(
        socket=str(work / "trainer.sock"),
        base=BaseModelRef(**{key: facts[key] for key in BaseModelRef.model_fields if key in facts}, path=str(base)),
        data=DataRef(train=str(train), validation=str(validation) if validation else None, train_sha256="0" * 64),
        recipe=Recipe.model_validate(recipe),
        lineage=Lineage(
            project_id="proj_test",
            job_id="ftjob-test",
            attempt_id="attempt-test",
            attempt_no=1,
            model_name="ft:tiny-llama:tests::1",
            training_file="file-train",
            tunery_version="0",
        ),
        checkpoints=str(work / "checkpoints"),
        output=str(work / "output"),
    )


class Listener:
    """A supervisor's end of a trainer's socket: ticks, stores checkpoints, keeps every event."""

    def __init__(self, connection: socket.socket, *, ticks: bool = True, stores: bool = True) -> None:
        self.events: list[Event] = []
        self.on_event: Callable[[Event], None] = lambda event: None
        self._connection, self._ticks, self._stores = connection, ticks, stores
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        if ticks:
            threading.Thread(target=self._tick, daemon=True).start()

    def send(self, command: BaseModel) -> None:
        send_line(self._connection, command)

    def wait(self, timeout_s: float = 60) -> list[Event]:
        """All events, once the trainer has closed its end."""
        self._thread.join(timeout_s)
        assert not self._thread.is_alive(), f"still talking after {timeout_s} s; last: {self.events[-1:]}"
        return self.events

    def of(self, kind: type[AnyEvent]) -> list[AnyEvent]:
        return [event for event in self.events if isinstance(event, kind)]

    def losses(self) -> dict[int, float]:
        """`train/loss` by step."""
        return {event.step: event.values["train/loss"] for event in self.of(Metrics)}

    def _listen(self) -> None:
        for line in read_lines(self._connection):
            event = EVENTS.validate_json(line)
            self.events.append(event)
            if isinstance(event, Checkpoint) and self._stores:
                self.send(Stored(step=event.step))
            self.on_event(event)

    def _tick(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.send(Tick())
                time.sleep(0.1)
