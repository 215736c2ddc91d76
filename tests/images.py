"""What a Dockerfile would put into its image, made in a folder: there need not be a container engine to know it.

It carries out the instructions that we use: paths below `/app` and `/opt` are mapped into the folder, a later stage
sees of an earlier one only what it copies, and the interpreter stands for the base image's.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent
DOCKERFILES = ("Dockerfile.api", "Dockerfile.worker")
_NEEDS_ROOT = ("groupadd ", "install -d -o ")
"""Users, and the folders that volumes take their owner from."""


def compose() -> dict[str, Any]:
    return yaml.safe_load((ROOT / "docker-compose.yml").read_text())


def instructions(dockerfile: str) -> Iterator[tuple[str, str]]:
    """Each keyword with its words, continuation lines joined and comments left out."""
    lines = [line for line in (ROOT / dockerfile).read_text().splitlines() if not line.lstrip().startswith("#")]
    for line in "\n".join(lines).replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, _, words = line.strip().partition(" ")
            yield keyword, " ".join(words.split())


def copied(dockerfile: str) -> list[str]:
    """Paths of the context that the image takes."""
    words = [shlex.split(words) for keyword, words in instructions(dockerfile) if keyword == "COPY"]
    return [source for one in words if not one[0].startswith("--from") for source in one[:-1]]


class Image:
    """`build`, then `run` commands in it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "image"
        self.stages: dict[str, Path] = {}
        self.workdir = "/"
        (python := folder / "bin").mkdir()
        (python / "python").symlink_to(Path(sys.base_prefix) / "bin" / "python3")
        self.environment = {"PATH": f"{python}:/usr/bin:/bin"}

    def build(self, dockerfile: str) -> None:
        stage = ""
        base = dict(self.environment)
        for keyword, words in instructions(dockerfile):
            match keyword:
                case "FROM":
                    if stage:
                        self.stages[stage] = self.root.rename(self.root.with_name(f"stage-{stage}"))
                    stage = words.partition(" AS ")[2] or "final"
                    self.root.mkdir()
                    self.environment = dict(base)
                case "WORKDIR":
                    self.workdir = words
                    self._inside(words).mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(shlex.split(words))
                case "ENV":
                    for name, value in (word.split("=", 1) for word in shlex.split(words)):
                        self.environment[name] = self.mapped(value).replace("$PATH", self.environment["PATH"])
                case "RUN" if not words.startswith(_NEEDS_ROOT):
                    self.run("sh", "-c", re.sub(r"--mount=\S+ ", "", words), check=True)

    def run(self, *command: str, check: bool = False) -> "subprocess.CompletedProcess[str]":
        done = subprocess.run(
            [self.mapped(word) for word in command],
            cwd=self._inside(self.workdir),
            env=self._environment({}),
            capture_output=True,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done

    def start(self, command: list[str], environment: dict[str, str], log: Path) -> "subprocess.Popen[bytes]":
        with log.open("ab") as out:
            return subprocess.Popen(
                [shutil.which(command[0], path=self.environment["PATH"]) or command[0], *command[1:]],
                cwd=self._inside(self.workdir),
                env=self._environment(environment),
                stdout=out,
                stderr=out,
            )

    def mapped(self, text: str) -> str:
        return re.sub(r"(?<![\w./])/(app|opt)\b", lambda found: f"{self.root}{found[0]}", text)

    def _environment(self, more: dict[str, str]) -> dict[str, str]:
        """pip's own settings are the build's network, not the image's content."""
        kept = ("PIP_", "SSL_", "HOME")
        network = {name: value for name, value in os.environ.items() if name.startswith(kept)}
        return network | self.environment | more

    def _copy(self, words: list[str]) -> None:
        context = ROOT
        if words[0].startswith("--from="):
            context = self.stages[words.pop(0).removeprefix("--from=")]
        *sources, target = words
        place = self._inside(target if target.startswith("/") else f"{self.workdir}/{target}")
        for source in sources:
            path = context / source.lstrip("/")
            if path.is_dir():
                ignored = shutil.ignore_patterns("__pycache__") if context == ROOT else None
                shutil.copytree(path, place, symlinks=True, ignore=ignored, dirs_exist_ok=True)
            else:
                place.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, place / path.name)

    def _inside(self, path: str) -> Path:
        return self.root / path.lstrip("/")
