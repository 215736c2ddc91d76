"""The same training twice: by the platform, and by a bare trainer whose events nobody reads."""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from bench import cpu
from bench.deployment import Deployment, until

ROOT = Path(__file__).parents[1]
_NOT_FOR_BARE = ("TUNERY_ATTEMPT", "TUNERY_SUPERVISOR_PID")


def model(folder: Path) -> None:
    """A random Llama whose step, with 4 x 128 tokens on one thread, takes some tens of milliseconds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.tiny_model import tiny_tokenizer

    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=259,
            hidden_size=192,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    ).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)


def training(steps: int) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }


def rows(variant: int = 0) -> bytes:
    """Every variant has the same rows in another spelling: a new file to the platform, the same data to a trainer."""
    lines = []
    for number in range(64):
        turns = [
            {"role": "user", "content": f"What is {number} plus {number + 1}?"},
            {"role": "assistant", "content": f"{number} plus {number + 1} is {2 * number + 1}, which is odd. " * 3},
        ]
        lines.append(json.dumps({"messages": turns}) + " " * variant)
    return ("\n".join(lines) + "\n").encode()


@dataclass(frozen=True)
class Trained:
    """One run: Unix time and loss by step."""

    steps: dict[int, tuple[float, float]]

    @property
    def step_s(self) -> float:
        """Median time from one step's event to the next one's."""
        times = [self.steps[step][0] for step in sorted(self.steps)]
        return statistics.median(later - sooner for sooner, later in pairwise(times))

    @property
    def losses(self) -> list[float]:
        return [self.steps[step][1] for step in sorted(self.steps)]


@dataclass(frozen=True)
class Captured:
    """What the platform gave its trainer, so that a bare one gets the same."""

    spec: dict[str, Any]
    environment: dict[str, str]


def pin(pid: int) -> None:
    """To the last core, where there are several: the same for both arms. Everything else runs where it likes."""
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        for task in Path(f"/proc/{pid}/task").iterdir():
            os.sched_setaffinity(int(task.name), {max(cores)})


def _trains(pid: int) -> bool:
    """The trainer itself, not what puts walls around it."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return b"trainer" in words and words[0].rpartition(b"/")[2].startswith(b"python")


class Platform:
    def __init__(self, running: Deployment, up: int, folder: Path) -> None:
        self._running, self._up, self._folder = running, up, folder
        self._variant = 0
        self.captured: Captured | None = None
        self.last: Trained | None = None
        self.starts: list[dict[str, float]] = []
        """Seconds between acceptance and each milestone on the way to the trainer."""

    def train(self, steps: int) -> Trained:
        job_id, accepted = self.start(steps)
        assert self._running.ends(job_id) == "succeeded", self._running.home.root
        times = self._running.milestones(job_id)
        self.starts.append({name: at - accepted for name, at in times.items()})
        self.last = Trained(self._running.steps(job_id))
        return self.last

    def start(self, steps: int) -> tuple[str, float]:
        """Submit a file that the platform has not seen; returns when its trainer runs on its core."""
        self._variant += 1
        file_id = self._running.upload(rows(self._variant))
        time.sleep(0.5)  # an idle machine, not one that has just stored a file
        job_id = self._running.submit(file_id, training(steps))
        accepted = time.time()
        trainer = until(lambda: next(filter(_trains, cpu.trainers(self._up)), None))
        pin(trainer)
        if self.captured is None:
            self.captured = self._capture(trainer)
        return job_id, accepted

    def _capture(self, trainer: int) -> Captured:
        def look() -> Captured | None:
            words = Path(f"/proc/{trainer}/environ").read_bytes().decode().split("\0")
            environment = dict(word.split("=", 1) for word in words if "=" in word)
            specs = list((self._running.home.node / "attempts").glob("*/spec.json"))
            return Captured(json.loads(specs[0].read_text()), environment) if specs and environment else None

        found = until(look)
        data = self._folder / "train.jsonl"
        data.write_bytes(Path(found.spec["data"]["train"]).read_bytes())
        found.spec["data"]["train"] = str(data)
        return found


class Bare:
    """`python -P -m trainer` on a captured spec, started by `bench.bare`, which reads its lines and forgets them."""

    def __init__(self, captured: Captured) -> None:
        self._captured = captured

    def train(self) -> Trained:
        with tempfile.TemporaryDirectory(prefix="bare-") as name:
            folder = Path(name)
            spec = self._captured.spec | {
                "socket": str(folder / "s"),
                "checkpoints": str(folder / "checkpoints"),
                "output": str(folder / "output"),
            }
            (folder / "tmp").mkdir()
            (folder / "spec.json").write_text(json.dumps(spec))
            kept = {key: value for key, value in self._captured.environment.items() if key not in _NOT_FOR_BARE}
            more = {"HOME": name, "TMPDIR": f"{name}/tmp", "TUNERY_TICK_TIMEOUT_S": "3600"}
            command = [sys.executable, "-m", "bench.bare", str(folder)]
            subprocess.run(command, cwd=ROOT, env=kept | more, check=True, timeout=600)
            said = [json.loads(line) for line in (folder / "events").read_text().splitlines()]
        found = {one["step"]: (one["time"], one["values"]["train/loss"]) for one in said if one["type"] == "metrics"}
        return Trained(found)
