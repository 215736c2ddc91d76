"""Checkpoints and logs on their way to the object store, while training goes on."""

import math
import os
import queue
import threading
from collections.abc import Callable
from pathlib import Path

import structlog
from sqlalchemy.exc import DBAPIError

from tunery import attempt_logs, failpoints, progress
from tunery.contracts.events import Checkpoint, FileEntry
from tunery.db import Sessions, transaction
from tunery.errors import Unavailable
from tunery.leases import Fenced
from tunery.settings import NodeSettings
from tunery.storage import CorruptObject, Storage
from tunery.telemetry import tracing
from worker import folders
from worker.meters import Meters
from worker.patience import OutageTooLong, persist
from worker.workspace import Work, Workspace

log = structlog.get_logger(__name__)

STORAGE_GRACE_S = 1800
"""A finished attempt waits so long for the object store before it gives up."""
_CHUNK_BYTES = 4 * 1024 * 1024


def prefix(work: Work) -> str:
    """Below this an attempt may write."""
    return f"a/{work.project_id}/{work.attempt_id}"


class CheckpointUploads:
    """One at a time, in order. A stored checkpoint is announced, then removed from the disk."""

    def __init__(
        self,
        work: Work,
        workspace: Workspace,
        storage: Storage,
        sessions: Sessions,
        settings: NodeSettings,
        meters: Meters,
        *,
        write_through: Callable[[int], None],
        on_stored: Callable[[int], None],
    ) -> None:
        self._work, self._root = work, workspace.root
        self._storage, self._sessions, self._settings = storage, sessions, settings
        self._meters = meters
        self._write_through, self._on_stored = write_through, on_stored
        self._waiting: queue.Queue[Checkpoint | None] = queue.Queue()
        self._abort = threading.Event()
        self._thread = threading.Thread(target=self._run, name="checkpoints", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, said: Checkpoint) -> None:
        self._waiting.put(said)

    def finish(self, *, abandon: bool = False) -> None:
        """Wait until everything said so far is stored; or, when the attempt is not ours any more, do not."""
        if abandon:
            self._abort.set()
        deadline = threading.Timer(self._settings.outage_grace_s, self._abort.set)
        deadline.daemon = True
        deadline.start()
        self._waiting.put(None)
        self._thread.join()
        deadline.cancel()

    def _run(self) -> None:
        while (said := self._waiting.get()) is not None:
            if self._abort.is_set():
                continue
            try:
                attributes = {"tunery.step": said.step, "tunery.bytes": sum(file.bytes for file in said.files)}
                with (
                    self._meters.uploads.time(),
                    tracing.span("tunery.checkpoint.upload", kind="client", attributes=attributes),
                ):
                    self._store(said)
            except Fenced:
                return
            except (OutageTooLong, CorruptObject, OSError, DBAPIError) as error:
                log.warning("checkpoint given up", step=said.step, error=str(error)[:200])
                folders.remove(self._root, said.path)
                self._on_stored(said.step)  # not stored, but gone: the trainer may make the next one
            except Exception:
                log.exception("checkpoint given up", step=said.step)
                self._on_stored(said.step)

    def _store(self, said: Checkpoint) -> None:
        key = f"{prefix(self._work)}/checkpoints/step-{said.step}"
        # training goes on through an outage, and so do we: only the end of the attempt has a deadline
        upload(self._storage, self._root, said.path, said.files, key, math.inf, self._abort)
        failpoints.reach("checkpoint.uploaded")

        def record() -> None:
            # whoever resumes from here repeats none of these steps: their losses must not die with us
            self._write_through(said.seq)
            with transaction(self._sessions) as session:
                progress.store_checkpoint(session, self._work.attempt_id, self._work.fence, said, key, said.files)

        persist("recording a checkpoint", record, math.inf, self._abort)
        failpoints.reach("checkpoint.recorded")
        self._on_stored(said.step)
        folders.remove(self._root, said.path)


def upload(
    storage: Storage,
    root: Path,
    folder: str,
    files: list[FileEntry],
    key: str,
    grace_s: float,
    stop: threading.Event | None = None,
) -> None:
    """Store files of a folder that a trainer named below its workspace `root`, each read back and compared.

    Raises:
        CorruptObject: a file is not what the trainer said, or the store returned other bytes than it was given.
        OSError: a file is not there, is no file, or a link lies on the way to it.
        OutageTooLong: the store stayed away for `grace_s`.
    """
    with folders.opened(root, folder) as inside:
        for file in files:
            with folders.opened_file(inside, file.name) as descriptor:
                if (size := os.fstat(descriptor).st_size) != file.bytes:
                    raise CorruptObject(f"'{file.name}' has {size} bytes, not {file.bytes}")
                held = Path(f"/proc/self/fd/{descriptor}")
                persist(
                    f"storing {file.name}",
                    lambda held=held, file=file: storage.put_verified(f"{key}/{file.name}", held, file.sha256),
                    grace_s,
                    stop,
                )


class LogUploads:
    """The trainer's log in chunks, each an object named by its offset; capped, and outliving the workspace."""

    def __init__(
        self, work: Work, workspace: Workspace, storage: Storage, sessions: Sessions, settings: NodeSettings
    ) -> None:
        self._work, self._log, self._storage = work, workspace.log, storage
        self._sessions, self._settings = sessions, settings
        self._sent, self._chunk = 0, b""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self) -> None:
        self._over.set()
        self._thread.join()
        while self._ship():
            pass

    def _run(self) -> None:
        while not self._over.wait(self._settings.log_chunk_s):
            self._ship()

    def _ship(self) -> bool:
        """True if there may be more. Best effort: what cannot be stored now is tried again with the next chunk."""
        try:
            # one that was sent and perhaps stored is sent again as it was: objects never change
            self._chunk = chunk = self._chunk or self._next()
            if not chunk:
                return False
            self._storage.put_bytes(
                attempt_logs.chunk_key(self._work.project_id, self._work.attempt_id, self._sent), chunk
            )
            with transaction(self._sessions) as session:
                size = self._sent + len(chunk)
                attempt_logs.note_size(session, self._work.attempt_id, self._work.fence, size)
            self._sent, self._chunk = size, b""
            return True
        except Fenced:
            self._over.set()
        except (Unavailable, DBAPIError, OSError) as error:
            log.warning("log chunk not stored", error=str(error)[:200])
        return False

    def _next(self) -> bytes:
        room = self._settings.max_log_bytes - self._sent
        if room <= 0 or not self._log.exists():
            return b""
        with self._log.open("rb") as stream:
            stream.seek(self._sent)
            return stream.read(min(room, _CHUNK_BYTES))
