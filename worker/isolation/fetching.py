"""The one trainer program with a network: it fetches base models, and sees no tenant's data and no secret of ours."""

import os
from collections.abc import Sequence
from pathlib import Path

from tunery.settings import NodeSettings
from worker.isolation import sight, walls
from worker.isolation.walls import Program, Way

_NOT_FOR_IT = ("TUNERY_", "AWS_", "PG", "REDIS", "S3_")
"""It keeps the operator's proxies, certificates, package index and hub token."""


def command(way: Way | None, argv: Sequence[str], store: Path, scratch: Path, settings: NodeSettings) -> list[str]:
    """The command line that starts `argv` where it can write `store` and nothing else."""
    if way is None:
        return list(argv)
    hidden = [str(settings.home), *filter(None, settings.trainer_hidden.split(os.pathsep))]
    program = Program(
        argv=argv,
        cwd=store,
        scratch=scratch,
        readable=[*sight.readable("trainer"), *filter(None, settings.trainer_readable.split(os.pathsep))],
        writable=[str(store)],
        hidden=hidden,
    )
    return walls.command(way, program)


def environment(scratch: Path) -> dict[str, str]:
    """The operator's own, without what belongs to us or opens a store or a database."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_NOT_FOR_IT)}
    return kept | {
        "PYTHONPATH": str(sight.ROOT),
        "TUNERY_SUPERVISOR_PID": str(os.getpid()),
        "TMPDIR": str(scratch),
        "HF_XET_CACHE": str(scratch / "xet"),
        "HF_ASSETS_CACHE": str(scratch / "assets"),
    }
