"""`tunery backup`: a dump at one snapshot, and every object that its rows refer to.

Objects are immutable, so they may be copied after the snapshot, while jobs run; what is deleted meanwhile stays in the
store until the hold is let go.
"""

import hmac
import json
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import psycopg
from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery import __version__, references
from tunery.backup import postgres
from tunery.backup.deployment import Source
from tunery.backup.folder import Entry, Folder, Manifest, is_whole, sha256
from tunery.db import make_engine, refuse_privileged_role
from tunery.embedded.home import write_private
from tunery.embedded.problems import Refused
from tunery.errors import Unavailable
from tunery.references import Log, Reference
from tunery.storage import CorruptObject, Storage

_HOLD_S, _RENEW_S = 600, 60
_COPIES = 4
_PATIENCE_S = 60
T = TypeVar("T")


def pepper_check(pepper: str | None) -> str | None:
    """A pepper is 32 random bytes: this tells nothing about it."""
    return hmac.new(pepper.encode(), b"tunery backup", "sha256").hexdigest() if pepper else None


def make(source: Source, root: Path, *, include_secrets: bool) -> Manifest:
    """Raises Refused, errors.Unavailable, psycopg.Error."""
    folder = Folder(root)
    folder.refuse_strangers()
    with folder.lock(), _hold(source.url) as hold:
        number = uuid.uuid4().hex[:12]
        dump = root / f"database-{number}.dump"
        major = postgres.server_major(source.url)
        with _snapshot(source.url) as (session, snapshot):
            postgres.dump(source.url, snapshot, dump, major)
            schema = session.execute(text("SELECT version_num FROM alembic_version")).scalar_one()
            wanted = {each.key: each for each in references.objects(session)}
            logs = list(references.logs(session))
            counts = references.counts(session)
        said(f"database dumped, {dump.stat().st_size:,} bytes; it refers to {len(wanted)} objects and {len(logs)} logs")
        objects, lost = _copy_all(source.storage, folder, wanted, logs)
        hold.check()
        manifest = Manifest(
            id=number,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tunery=__version__,
            schema=schema,
            postgres=major,
            dump=dump.name,
            dump_sha256=sha256(dump),
            counts=dict(counts),
            objects=objects,
            lost=lost,
            pepper_check=pepper_check(source.secrets.get("key_pepper")),
        )
        _keep_secrets(folder, source, include_secrets)
        folder.write(manifest)
        folder.prune(manifest)
    return manifest


class _Hold:
    """Renewed until it is let go. `check` tells whether it ever broke."""

    def __init__(self, connection: psycopg.Connection) -> None:
        self._connection, self._name = connection, f"backup {uuid.uuid4().hex[:12]}"
        self._broken: str | None = None
        self._over = threading.Event()
        self._renew()
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _renew(self) -> None:
        row = self._connection.execute("SELECT hold_deletions(%s, %s)", [self._name, _HOLD_S]).fetchone()
        if row != (True,):
            self._broken = "The hold ran out before it was renewed."

    def _keep(self) -> None:
        while not self._over.wait(_RENEW_S):
            try:
                self._renew()
            except psycopg.Error as error:
                self._broken = f"The hold could not be renewed: {error}"
                return

    def check(self) -> None:
        """Raises Refused if something may have been deleted while it was copied."""
        if self._broken is not None:
            raise Refused(
                "the backup is not complete",
                why=f"{self._broken} Objects that the dump refers to may have been deleted.",
                fix="run it again; what is copied already is kept",
                reference="docs/backup.md",
            )

    def release(self) -> None:
        self._over.set()
        self._thread.join(timeout=10)
        self._connection.execute("SELECT release_deletions(%s)", [self._name])


@contextmanager
def _hold(url: str) -> Iterator[_Hold]:
    with psycopg.connect(url, autocommit=True, connect_timeout=10) as connection:
        hold = _Hold(connection)
        try:
            yield hold
        finally:
            hold.release()


@contextmanager
def _snapshot(url: str) -> Iterator[tuple[Session, str]]:
    """A session, and the name under which pg_dump sees the same rows."""
    engine = make_engine(url, pool_size=1, statement_timeout_s=0)
    try:
        refuse_privileged_role(engine)
        with Session(engine.execution_options(isolation_level="REPEATABLE READ")) as session, session.begin():
            yield session, session.execute(text("SELECT pg_export_snapshot()")).scalar_one()
    finally:
        engine.dispose()


def _copy_all(
    storage: Storage, folder: Folder, wanted: dict[str, Reference], logs: list[Log]
) -> tuple[dict[str, Entry], list[str]]:
    """Objects by key, and those that the store has lost."""
    known = folder.previous()
    tasks: list[tuple[Any, ...]] = [(_copy, storage, folder, each) for each in wanted.values()]
    tasks += [(_copy_log, storage, folder, log, known) for log in logs]
    objects: dict[str, Entry] = {}
    lost: list[str] = []
    with ThreadPoolExecutor(_COPIES) as pool:
        for done, (found, missing) in enumerate(pool.map(lambda task: task[0](*task[1:]), tasks), 1):
            objects |= found
            lost += missing
            if done % 1000 == 0:
                said(f"{done} of {len(tasks)} copied")
    return dict(sorted(objects.items())), sorted(lost)


def _copy(storage: Storage, folder: Folder, wanted: Reference) -> tuple[dict[str, Entry], list[str]]:
    path = folder.place(wanted.key)
    if not path.is_file() or sha256(path) != wanted.sha256:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _patiently(lambda: storage.fetch(wanted.key, path, wanted.sha256))
        except (KeyError, CorruptObject):
            return {}, [wanted.key]
    # the hash decides: the size in a row is what a trainer once said
    return {wanted.key: Entry(path.stat().st_size, wanted.sha256)}, []


def _copy_log(
    storage: Storage, folder: Folder, log: Log, known: dict[str, Entry]
) -> tuple[dict[str, Entry], list[str]]:
    """A release before 0.2 may have stored a chunk anew with more in it; either makes no difference to a reader."""
    found: dict[str, Entry] = {}
    for stored in _patiently(lambda: list(storage.objects(log.prefix))):
        offset = stored.key.removeprefix(log.prefix)
        if not offset.isdigit() or int(offset) >= log.bytes:
            continue
        path, before = folder.place(stored.key), known.get(stored.key)
        if before is None or before.bytes != stored.bytes or not is_whole(path, before):
            path.parent.mkdir(parents=True, exist_ok=True)
            data = _patiently(lambda key=stored.key: storage.get_bytes(key))
            if data is None:
                return found, [stored.key]
            path.write_bytes(data)
            before = Entry(len(data), sha256(path))
        found[stored.key] = before
    return found, []


def _patiently(call: Callable[[], T]) -> T:
    """A store that has just started, or starts anew, answers after a while. Raises errors.Unavailable."""
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        try:
            return call()
        except Unavailable:
            if time.monotonic() > deadline:
                raise
        time.sleep(0.5)


def _keep_secrets(folder: Folder, source: Source, wanted: bool) -> None:
    if wanted and not source.secrets.get("key_pepper"):
        raise Refused(
            "the secrets are not known here",
            why="The deployment is given by URL, and TUNERY_KEY_PEPPER is not set.",
            fix="export TUNERY_KEY_PEPPER, or leave out --include-secrets and keep the pepper elsewhere",
            reference="docs/backup.md",
        )
    if wanted:
        write_private(folder.secrets_file, json.dumps(source.secrets, indent=1))
    else:
        folder.secrets_file.unlink(missing_ok=True)


def said(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
