"""As a node does it: find what walls this host gives, put a trainer behind them, say what came of it.

    python -m tests.isolated_node HOME SPEC [name=value ...]

A process of its own, so that a test can be it as another user, or kill it. Prints one JSON object.
"""

import json
import os
import socket
import sys
import time
import uuid
from pathlib import Path
from types import SimpleNamespace

import structlog
from pydantic import SecretStr

from tunery.settings import NodeSettings
from tunery.unreadable import hide_from_same_user
from worker import processes
from worker.isolation.host import decide
from worker.trainers import DedicatedTrainer
from worker.workspace import Workspace


def main(home: Path, wanted: dict, more: list[str]) -> None:
    hide_from_same_user()
    processes.become_subreaper()
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    given = dict(one.split("=", 1) for one in more)
    secret = SecretStr("unused")
    settings = NodeSettings(
        home=home,
        database_url=secret,
        redis_url=secret,
        s3_access_key_id=secret,
        s3_secret_access_key=secret,
        trainer_module="tests.hostile_trainer",
        **given,
    )
    ways, shown = decide(settings)
    attempt = str(uuid.uuid4())
    workspace = Workspace(home / "attempts" / attempt)
    for name in ("data", "checkpoints", "tmp"):
        (workspace.root / name).mkdir(parents=True)
    (workspace.root / "data" / "train.jsonl").write_text("rows")
    wanted |= {"pids": [*wanted["pids"], os.getpid()], "node_uid": os.getuid()}
    workspace.spec.write_text(json.dumps(wanted))
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(workspace.socket))
    work = SimpleNamespace(attempt_id=attempt, devices=(), engine_socket=None)
    trainer = DedicatedTrainer(work, workspace, settings, ways)  # type: ignore[arg-type]
    trainer.start()
    print(json.dumps({"shown": shown, "attempt": attempt}), flush=True)
    while (code := trainer.exit_code()) is None:
        time.sleep(0.02)
    gone = trainer.end()
    text = workspace.log.read_text()
    owner = workspace.owner()
    workspace.remove()
    print(json.dumps({"code": code, "gone": gone, "log": text, "owner": owner, "removed": not workspace.root.exists()}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:])
