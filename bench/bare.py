"""`python -m bench.bare FOLDER`: a trainer on FOLDER/spec.json with nobody around it.

Its socket is accepted and read; the lines are only kept in memory, and written to FOLDER/events when it has ended.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from bench.arms import pin


def main(folder: Path) -> int:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(json.loads((folder / "spec.json").read_text())["socket"])
    listener.listen(1)
    with (folder / "trainer.log").open("wb") as log:
        trainer = subprocess.Popen(
            [sys.executable, "-P", "-m", "trainer", str(folder / "spec.json")],
            cwd=folder,
            env=dict(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    pin(trainer.pid)
    listener.settimeout(120)
    connection, _ = listener.accept()
    connection.settimeout(None)
    blocks = []
    while block := connection.recv(65536):
        blocks.append(block)
    (folder / "events").write_bytes(b"".join(blocks))
    if code := trainer.wait():
        sys.stderr.write((folder / "trainer.log").read_text()[-4000:])
    return code


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
