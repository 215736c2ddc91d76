"""What a trainer prints, on its way to disk: redacted, and capped so that no trainer fills the node's disk."""

import math
import os
import select
import threading
import time
from pathlib import Path

from tunery.redaction import OVERLAP, Redactor, redact

_TAIL = 32 * 1024
"""Of what came after the cap, so much of the end is kept: a traceback stands there."""
_READ = 64 * 1024
_LAST_WORDS_S = 5.0
"""What a trainer wrote before it ended is read for so long: a survivor of it may write for ever."""


class TrainerLog:
    """The reading end of a trainer's output. A trainer never waits for more than one write to the disk."""

    def __init__(self, path: Path, most_bytes: int) -> None:
        self._most = max(0, most_bytes - _TAIL - 200)
        # not through a link: what a trainer may write to, it must not choose
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        self._read, self._write = os.pipe()
        self._size = os.fstat(self._file).st_size
        self._left_out = 0
        self._tail = b""
        self._redactor = Redactor()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="trainer-log", daemon=True)

    def start(self) -> int:
        """Begin to read; returns the descriptor to give to the trainer. Close ours with `handed_over`."""
        os.set_blocking(self._read, False)
        self._thread.start()
        return self._write

    def handed_over(self) -> None:
        """The trainer has its end now; ours would keep the pipe open."""
        os.close(self._write)

    def finish(self) -> None:
        """When the trainer is gone: write what it said last. Something of it that lives on is not waited for."""
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        until = math.inf
        while time.monotonic() < until:
            if (over := self._over.is_set()) and until == math.inf:
                until = time.monotonic() + _LAST_WORDS_S
            ready, _, _ = select.select([self._read], [], [], 0 if over else 0.2)
            if ready:
                if not (data := os.read(self._read, _READ)):
                    break
                self._hear(data)
            elif over:
                break
        self._keep(self._redactor.rest())
        self._close()

    def _hear(self, data: bytes) -> None:
        if self._size < self._most:
            self._keep(self._redactor.feed(data))
        else:
            self._leave_out(data)  # looking for secrets in what nobody will read would only slow a flood down

    def _keep(self, text: bytes) -> None:
        room = max(0, self._most - self._size)
        self._put(text[:room])
        if rest := text[room:]:
            self._leave_out(rest)

    def _leave_out(self, data: bytes) -> None:
        self._left_out += len(data)
        self._tail = (self._tail + data)[-_TAIL - OVERLAP :]

    def _close(self) -> None:
        if self._left_out:
            # a secret may have been cut in two where this begins
            tail = redact(self._tail)[OVERLAP if self._left_out > _TAIL + OVERLAP else 0 :]
            self._put(b"\n[tunery: %d bytes were left out here]\n" % max(0, self._left_out - len(tail)) + tail)
        os.close(self._file)
        os.close(self._read)

    def _put(self, text: bytes) -> None:
        try:
            while text:
                text = text[os.write(self._file, text) :]
                # the file alone counts: what a full disk refused is left out, and the trainer goes on
            self._size = os.fstat(self._file).st_size
        except OSError:
            self._left_out += len(text)
