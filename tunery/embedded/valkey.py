"""Embedded Valkey: a doorbell and a cache, yet with an append-only file, so that a restart forgets nothing."""

import os
import signal
import socket
from pathlib import Path

from tunery.embedded import binaries, ports
from tunery.embedded.home import Home
from tunery.embedded.process import Child, Command


class Valkey:
    name = "valkey"

    def __init__(self, home: Home, port: int) -> None:
        self.home, self.port = home, port
        self.program = binaries.find("valkey")
        self.password = home.secrets().made("valkey")

    @property
    def url(self) -> str:
        return f"redis://:{self.password}@{ports.HOST}:{self.port}/0"

    def prepare(self) -> Child:
        folder = self.home.owned_folder("valkey")
        config = folder / "valkey.conf"
        self.home.owned_file(config, self._config(folder))
        command = Command(
            name=self.name,
            argv=[binaries.placed(self.program, self.home), config],
            environment={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
            cwd=folder,
            run_as=self.home.run_as,
            orphan_signal=signal.SIGTERM,
        )
        return Child(command, self.home.logs / "valkey.log", self._ready)

    def _config(self, folder: Path) -> str:
        lines = (
            f"bind {ports.HOST}",
            f"port {self.port}",
            f"requirepass {self.password}",  # in a 0600 file: argv is readable by everybody
            f'dir "{folder}"',
            "appendonly yes",
            "appendfsync everysec",
            'save ""',
            "maxmemory-policy noeviction",  # an evicted key is a lost job of RQ
            "daemonize no",
        )
        return "\n".join(lines) + "\n"

    def _ready(self) -> bool:
        """PING needs the password; a server still reading its file answers -LOADING."""
        try:
            with socket.create_connection((ports.HOST, self.port), timeout=1) as connection:
                connection.sendall(f"AUTH {self.password}\r\nPING\r\n".encode())
                said = b""
                while said.count(b"\r\n") < 2 and (part := connection.recv(256)):
                    said += part
        except OSError:
            return False
        return b"+PONG" in said
