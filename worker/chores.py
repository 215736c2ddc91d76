"""The node's CPU work: checking a job's rows, importing a base model. Leased, fenced, repeatable."""

import json
import shutil
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy.exc import DBAPIError, NoResultFound
from sqlalchemy.orm import Session

from tunery import budgets, catalogue, datasets, durations, failpoints, ids, jobs, leases, tasks
from tunery.datasets import Dataset, Report
from tunery.db import Sessions, transaction
from tunery.errors import Unavailable
from tunery.events import Entry
from tunery.files import File
from tunery.jobs import Inputs
from tunery.settings import MIB, NodeSettings
from tunery.states import FailureCode
from tunery.storage import CorruptObject, Storage, manifest
from tunery.tasks import Lease, TaskFenced
from tunery.telemetry import tracing
from worker import model_store
from worker.isolation import fetching
from worker.isolation.host import Ways
from worker.patience import passing

log = structlog.get_logger(__name__)

_IMPORT_S = 3600


class Rejected(Exception):
    """The user's data cannot be trained on."""

    def __init__(self, code: FailureCode, message: str, param: str) -> None:
        super().__init__(message)
        self.code, self.message, self.param = code, message, param


@dataclass(frozen=True)
class Checked:
    """Rows stored below the task's own prefix, not recorded yet; or a dataset that is already known."""

    source: File
    known: uuid.UUID | None
    key: str = ""
    sha256: str = ""
    size: int = 0
    report: Report | None = None


class Chores:
    """Runs one task at a time on the calling thread; never raises."""

    def __init__(
        self, node_id: uuid.UUID, settings: NodeSettings, sessions: Sessions, storage: Storage, ways: Ways
    ) -> None:
        self._node_id, self._settings, self._ways = node_id, settings, ways
        self._sessions, self._storage = sessions, storage

    def run(self, lease: Lease) -> None:
        named = {"job": ids.encode(ids.JOB, lease.job_id)} if lease.job_id else {}
        told = log.bind(task=str(lease.id), kind=lease.kind, tries=lease.tries, **named)
        told.info("task started")
        try:
            with self._kept(lease):
                work = {tasks.CHECK_DATA: self._check_data, tasks.IMPORT_BASE: self._import_base}[lease.kind]
                work(lease)
            told.info("task done")
        except TaskFenced:
            told.warning("task was taken away")
        except Unavailable as error:
            told.warning("a server is away; the task waits for it", error=str(error)[:300])
            self._postpone(lease, str(error))
        except DBAPIError as error:
            told.warning("task will be tried again", exc_info=True)
            if passing(error):
                self._postpone(lease, "the database was away")
            else:
                self._give_up(lease, "the database did not take the result", retry=True)
        except (CorruptObject, OSError) as error:
            told.warning("task will be tried again", error=str(error)[:300])
            self._give_up(lease, str(error), retry=True)
        except Exception as error:  # noqa: BLE001 - the edge of a task: the node must go on
            told.exception("task failed")
            self._give_up(lease, f"{type(error).__name__}: {error}", retry=True)

    # ---- check_data ---------------------------------------------------------------------------------------------

    def _check_data(self, lease: Lease) -> None:
        assert lease.job_id is not None
        with transaction(self._sessions) as session:
            inputs = jobs.inputs(session, lease.job_id)
        about = {"tunery.job.id": ids.encode(ids.JOB, lease.job_id), "tunery.try": lease.tries}
        with tracing.span("tunery.job.validate", parent=inputs.job.traceparent, kind="consumer", attributes=about):
            self._check_inputs(lease, inputs)

    def _check_inputs(self, lease: Lease, inputs: Inputs) -> None:
        assert lease.job_id is not None
        try:
            checked = [
                self._check(
                    lease, inputs.training, FailureCode.INVALID_TRAINING_FILE, "training_file", datasets.MIN_ROWS
                )
            ]
            if inputs.validation is not None:
                code = FailureCode.INVALID_VALIDATION_FILE
                checked.append(self._check(lease, inputs.validation, code, "validation_file", 1))
        except Rejected as problem:
            with transaction(self._sessions) as session:
                job = jobs.lock(session, lease.job_id)
                task = tasks.hold(session, lease)
                leases.reject(session, job, problem.code, problem.message, problem.param)
                tasks.finish(task)
            return
        failpoints.reach("task.checked")
        with transaction(self._sessions) as session:
            job = jobs.lock(session, lease.job_id)
            task = tasks.hold(session, lease)
            known = [self._record(session, lease, one) for one in checked]
            recipe = jobs.resolve(session, job, inputs.base, known[0], known[1] if len(known) > 1 else None)
            _, expected_s = durations.expected(session, job)
            budgets.refine(session, job, expected_s)
            said = [Entry(_describe(name, one, rows)) for name, one, rows in zip(_NAMES, checked, known, strict=False)]
            data = {"kind": "recipe", "recipe": recipe.model_dump(mode="json")}
            leases.enqueue(session, job, [*said, Entry("Hyperparameters resolved", data=data)])
            tasks.finish(task)

    def _check(self, lease: Lease, source: File, code: FailureCode, param: str, least: int) -> Checked:
        with transaction(self._sessions) as session:
            known = datasets.find(session, lease.project_id, source.sha256)
            if known is not None:
                _enough(known.rows, least, code, param)
                return Checked(source, known.id)
        with tempfile.TemporaryDirectory(prefix="rows-", dir=self._settings.home) as folder:
            given, path = Path(folder) / "given", Path(folder) / "rows.jsonl"
            try:
                # by its hash: a byte that the store changed is not the user's mistake, and is not to be trained on
                self._storage.fetch(source.object_key, given, source.sha256)
            except KeyError:
                raise Rejected(code, f"File '{source.filename}' was deleted before it was read.", param) from None
            with given.open("rb") as stream, path.open("wb") as out:
                report = datasets.normalise(iter(partial(stream.read, MIB), b""), out)
            given.unlink()
            if report.error_count:
                raise Rejected(code, _say(source.filename, report), param)
            _enough(report.rows, least, code, param)
            with path.open("rb") as stream:
                size, sha256 = datasets.digest(stream)
            key = f"a/{lease.project_id}/{lease.id}/datasets/{sha256}"
            self._storage.put_verified(key, path, sha256)
        return Checked(source, None, key, sha256, size, report)

    def _record(self, session: Session, lease: Lease, one: Checked) -> Dataset:
        if one.known is not None:
            return datasets.get(session, one.known)
        assert one.report is not None
        return datasets.record(
            session,
            lease.project_id,
            source_sha256=one.source.sha256,
            sha256=one.sha256,
            object_key=one.key,
            size=one.size,
            report=one.report,
        )

    # ---- import_base ----------------------------------------------------------------------------------------------

    def _import_base(self, lease: Lease) -> None:
        assert lease.base_model_id is not None
        store = self._settings.model_store or self._settings.home / "models"
        store.mkdir(parents=True, exist_ok=True)
        folder = store / f"{lease.base_model_id}.import-{lease.fence}"
        try:
            problem = self._run_import(lease, folder)
            if problem is not None:
                self._fail_import(lease, problem)
                return
            card = json.loads((folder / "base.json").read_text())
            self._store_base(lease, folder, card)
            model_store.adopt(store, lease.base_model_id, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run_import(self, lease: Lease, folder: Path) -> str | None:
        """Start the one trainer program that has a network, and no tenant's data. None, or what went wrong."""
        wanted = lease.payload
        command = [sys.executable, "-P", "-m", "trainer.import_base", "--out", str(folder)]
        options = {"source": "source", "name": "id", "path": "path", "repo": "repo", "revision": "revision"}
        for field, option in options.items():
            if wanted.get(field):
                command += [f"--{option}", str(wanted[field])]
        scratch = folder.with_name(f"{folder.name}.tmp")
        scratch.mkdir(exist_ok=True)
        try:
            done = subprocess.run(
                fetching.command(self._ways.fetcher, command, folder.parent, scratch, self._settings),
                env=fetching.environment(scratch),
                cwd=folder.parent,
                capture_output=True,
                text=True,
                timeout=_IMPORT_S,
            )
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        if done.returncode == 0:
            return None
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        try:
            said = json.loads(lines[-1])
            return f"{said['message']} {said.get('fix', '')}".strip()
        except (ValueError, KeyError, IndexError):
            return "\n".join(lines[-5:]) or f"the import ended with exit code {done.returncode}"

    def _store_base(self, lease: Lease, folder: Path, card: dict[str, Any]) -> None:
        # under the fence: an importer that lost its lease must not write over what another one published
        key = f"a/base/{lease.base_model_id}/{lease.fence}"
        card["files"] = [file.model_dump() for file in manifest(folder)]
        for file in card["files"]:
            self._storage.put_verified(f"{key}/{file['name']}", folder / file["name"], file["sha256"])
        with transaction(self._sessions) as session:
            task = tasks.hold(session, lease)
            catalogue.ready(catalogue.by_id(session, task.base_model_id or uuid.UUID(int=0)), card, key)
            tasks.finish(task)

    def _fail_import(self, lease: Lease, problem: str) -> None:
        with transaction(self._sessions) as session:
            task = tasks.hold(session, lease)
            catalogue.failed(catalogue.by_id(session, task.base_model_id or uuid.UUID(int=0)), problem)
            tasks.fail(task, problem, retry=False)

    # ---- leases -----------------------------------------------------------------------------------------------------

    @contextmanager
    def _kept(self, lease: Lease) -> Iterator[None]:
        """Renew the task's lease while the work goes on."""
        over = threading.Event()

        def keep() -> None:
            while not over.wait(self._settings.renew_s):
                try:
                    with transaction(self._sessions) as session:
                        tasks.renew(session, lease, self._settings.lease_s)
                except TaskFenced:
                    return  # the work finds out when it wants to write
                except DBAPIError:
                    log.warning("could not renew a task", task=str(lease.id))

        thread = threading.Thread(target=keep, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join(timeout=5)

    def _postpone(self, lease: Lease, problem: str) -> None:
        try:
            with transaction(self._sessions) as session:
                tasks.postpone(tasks.hold(session, lease), problem, self._settings.poll_s)
        except (TaskFenced, DBAPIError) as error:
            log.warning("could not hand a task back; its lease runs out", task=str(lease.id), error=str(error)[:200])

    def _give_up(self, lease: Lease, problem: str, *, retry: bool) -> None:
        """Hand the task back for another try; when its tries are used up, its job or model fails with it."""
        try:
            with transaction(self._sessions) as session:
                job = jobs.lock(session, lease.job_id) if lease.job_id else None
                if not tasks.fail(tasks.hold(session, lease), problem, retry=retry):
                    return
                if job is not None:
                    leases.reject(
                        session, job, FailureCode.INTERNAL, f"The data check failed: {problem}", "training_file"
                    )
                if lease.base_model_id is not None:
                    catalogue.failed(catalogue.by_id(session, lease.base_model_id), problem)
        except (TaskFenced, DBAPIError, NoResultFound) as error:  # another node may have the task, and the job, by now
            log.warning("could not hand a task back; its lease runs out", task=str(lease.id), error=str(error)[:200])


_NAMES = ("Training", "Validation")


def _enough(rows: int, least: int, code: FailureCode, param: str) -> None:
    if rows < least:
        raise Rejected(code, f"The file has {rows} rows; at least {least} are needed.", param)


def _say(name: str, report: Report) -> str:
    total = report.rows + report.error_count
    listed = "; ".join(str(error) for error in report.errors[:5])
    more = f"; and {report.error_count - 5} more" if report.error_count > 5 else ""
    return f"'{name}' has {report.error_count} invalid rows of {total}: {listed}{more}"


def _describe(name: str, one: Checked, rows: Dataset) -> str:
    source = "already checked" if one.known else "checked"
    return f"{name} file {source}: {rows.rows} rows ({rows.shape}), sha256 {rows.sha256[:12]}"
