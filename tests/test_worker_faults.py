"""Narrow faults of the parts of a node, each once a defect: lost replies, hung servers, full sockets, odd bytes."""

import os
import signal
import socket
import threading
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from pydantic import SecretStr
from sqlalchemy import func, select, text, update

from scheduler.service import Scheduler
from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tunery import attempt_logs, leases, nodes, progress
from tunery import queue as tunery_queue
from tunery.contracts.events import FileEntry, Finished, Stopped, Warning
from tunery.db import PrivilegedRole, await_own_role, make_engine, make_sessions, transaction
from tunery.models import Checkpoint, Job, Task
from tunery.models import Node as Model
from tunery.settings import SchedulerSettings
from tunery.states import FailureCode, StopReason
from tunery.storage import Storage
from worker.ending import Ending
from worker.keeper import Keeper
from worker.node import Node, _doorbell
from worker.recorder import Recorder
from worker.uploads import LogUploads
from worker.workspace import Workspace


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is on this model."""


def scheduler(database: Database) -> Scheduler:
    settings = SchedulerSettings(database_url=SecretStr("unused"), redis_url=SecretStr("unused"))
    return Scheduler(database.sessions("tunery_scheduler"), None, settings, f"a scheduler {time.monotonic_ns()}")  # type: ignore[arg-type]


def test_publishing_may_begin_twice_when_the_first_reply_was_lost(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    for _ in range(2):
        with work.node.transaction() as session:
            leases.begin_publishing(session, leases.hold(session, work.attempt_id, work.fence))
    assert factories.attempt(work).state == "publishing"


def test_a_claim_whose_reply_was_lost_is_found_again_by_its_own_claimer_alone(project: Tenant, node: FleetNode) -> None:
    work = factories.assigned(project, node)
    with work.node.transaction() as session:
        assert leases.claim(session, work.attempt_id, "me", 45) is not None
    with work.node.transaction() as session:
        assert leases.claim(session, work.attempt_id, "somebody else", 45) is None
        assert leases.claim(session, work.attempt_id, "me", 45) is not None


@pytest.mark.parametrize("tries", [1, 4])
def test_a_data_check_whose_node_fell_silent_is_tried_again_until_its_tries_are_used_up(
    project: Tenant, node: FleetNode, database: Database, tries: int
) -> None:
    work = factories.submitted(project, node)
    mine = Task.job_id == work.job_id
    with transaction(database.sessions("owner")) as session:
        session.execute(update(Task).where(mine).values(tries=tries))
    factories._take_task(node, work.job_id)
    with transaction(database.sessions("owner")) as session:
        session.execute(text("UPDATE leader SET expires_at = now() - interval '1 second'"))
    leader = scheduler(database)
    leader.lead()
    leader.sweep()  # the first look after a silence of every scheduler forgives; the next one does not
    with transaction(database.sessions("owner")) as session:
        session.execute(update(Task).where(mine).values(lease_expires_at=func.now() - timedelta(seconds=999)))
    leader.sweep()
    with transaction(database.sessions("owner")) as session:
        task, job = session.scalars(select(Task).where(mine)).one(), session.get_one(Job, work.job_id)
        over = tries == 4
        assert (task.state, job.state) == (("failed", "failed") if over else ("queued", "validating"))


def test_an_event_that_postgres_refuses_takes_no_other_with_it(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.claimed(project, node)
    recorder = Recorder(work, database.sessions("tunery_worker", node_id=node.id))  # type: ignore[arg-type]
    for event in (factories.started(1), Warning(seq=2, code="x", message="a\0b"), factories.metrics(3, 1)):
        recorder.add(event)
    recorder.start()
    recorder.finish(5)
    assert factories.attempt(work).last_event_seq == 3
    assert recorder.dropped == 1


def ending(work: factories.Work, database: Database, log: Path) -> Ending:
    sessions = database.sessions("tunery_worker", node_id=work.node.id)
    return Ending(work, SimpleNamespace(log=log), None, sessions, SimpleNamespace(outage_grace_s=5))  # type: ignore[arg-type]


def test_a_log_full_of_zeros_is_no_reason_to_wait(
    project: Tenant, node: FleetNode, database: Database, tmp_path: Path
) -> None:
    work = factories.running(project, node)
    ending(work, database, tmp_path / "x").fail(FailureCode.TRAINER_CRASHED, "exit code 1 \0\0\0")
    assert factories.attempt(work).failure_message == "exit code 1 \ufffd\ufffd\ufffd"


def test_a_trainer_that_will_not_die_keeps_its_device(
    project: Tenant, node: FleetNode, database: Database, tmp_path: Path
) -> None:
    work = factories.running(project, node)
    end = ending(work, database, tmp_path / "x")
    end.settle(Stopped(reason=StopReason.CANCEL), StopReason.PREEMPT, trainer_gone=False)
    assert factories.attempt(work).state == "preempted"
    assert factories.free_bytes(node) == 0


def test_the_step_of_a_discarded_checkpoint_can_be_stored_again(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.running(project, node)
    factories.checkpoint(work, 10)
    factories.fault(work, FailureCode.TRAINER_CRASHED)
    second = factories.claim(factories.assign(work))
    with second.node.transaction() as session:
        held = leases.hold(session, second.attempt_id, second.fence)
        progress.discard_checkpoint(session, held)
        leases.fail(session, held, FailureCode.CORRUPT_CHECKPOINT, "damaged")
    third = factories.tell(factories.claim(factories.assign(work)), factories.started())
    factories.checkpoint(third, 10)
    kept = select(func.count()).where(Checkpoint.job_id == work.job_id, Checkpoint.deleted_at.is_(None))
    with transaction(database.sessions("owner")) as session:
        assert session.scalar(kept) == 1


def test_a_signal_is_handled_while_the_doorbell_is_full(tmp_path: Path) -> None:
    node = Node.__new__(Node)
    node._bell, node._bell_path = _doorbell(tmp_path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ringer:
        ringer.setblocking(False)
        with pytest.raises(BlockingIOError):
            while True:
                ringer.sendto(b"ring", node._bell_path)
    handler = threading.Thread(target=lambda: node._on_signal(signal.SIGTERM, None), daemon=True)
    handler.start()
    handler.join(3)
    assert not handler.is_alive()


def test_ticks_go_on_and_the_outage_is_noticed_while_postgres_hangs(
    project: Tenant, node: FleetNode, database: Database
) -> None:
    work = factories.running(project, node)
    sessions = make_sessions(make_engine(database.url("tunery_worker"), pool_size=1), node_id=node.id)
    with transaction(sessions) as session:
        backend = session.scalar(text("SELECT pg_backend_pid()"))
    assert backend is not None
    ticks: list[float] = []
    told: list[StopReason] = []
    clocks: Any = SimpleNamespace(tick_s=0.05, renew_s=0.1, lease_s=45, outage_grace_s=1)
    keeper = Keeper(
        work,  # type: ignore[arg-type]
        sessions,
        clocks,
        on_stop=lambda reason, _within_s: told.append(reason),
        on_fenced=lambda: None,
        tick=lambda: ticks.append(time.monotonic()),
        on_late=lambda: None,
    )
    os.kill(backend, signal.SIGSTOP)
    try:
        keeper.start()
        deadline = time.monotonic() + 10
        while not told and time.monotonic() < deadline:
            time.sleep(0.05)
        assert told == [StopReason.OUTAGE]
        assert len(ticks) > 10
    finally:
        os.kill(backend, signal.SIGCONT)
        keeper.stop()


# ---- a host or a server in trouble --------------------------------------------------------------------------------


def test_a_node_whose_disk_is_full_gets_no_work_until_there_is_room(
    project: Tenant, node: FleetNode, tmp_path: Path
) -> None:
    self: Any = Node.__new__(Node)
    self._settings, self._full = SimpleNamespace(home=tmp_path, model_store=None, min_free_disk_bytes=1 << 60), False
    queued = factories.queued(project, node)
    with node.transaction() as session:
        boot_id = session.scalars(select(Model.boot_id).where(Model.id == node.id)).one()
    for least, usable in ((1 << 60, False), (0, True)):
        self._settings.min_free_disk_bytes = least
        with node.transaction() as session:
            assert nodes.heartbeat(session, node.id, boot_id, self._room())
        with transaction(node.database.sessions("tunery_scheduler")) as session:
            world = tunery_queue.snapshot(session, silent_after_s=45)
        seen = next(each for each in world.nodes if each.id == node.id)
        assert (seen.schedulable, seen.why_not) == (usable, "" if usable else "its disk is full")
    assert queued.job_id in {job.id for job in world.jobs}


def test_a_program_waits_for_its_database_and_never_for_a_forbidden_role(
    database: Database,
) -> None:
    url = database.url("tunery_scheduler")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    real = urlsplit(url)

    def open_later() -> None:
        time.sleep(0.3)
        proxy = socket.create_server(("127.0.0.1", port))
        with proxy:
            near, _ = proxy.accept()
            far = socket.create_connection((real.hostname or "", real.port or 5432))
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()

    threading.Thread(target=open_later, daemon=True).start()
    place = f"{real.username}:{real.password}@127.0.0.1:{port}"
    engine = make_engine(real._replace(netloc=place).geturl())
    await_own_role(engine)  # without waiting it would have raised at once
    engine.dispose()
    with pytest.raises(PrivilegedRole):
        await_own_role(make_engine(database.url("tunery_migrate")))


def _pump(source: socket.socket, sink: socket.socket) -> None:
    while data := source.recv(65536):
        sink.sendall(data)


def test_a_log_chunk_that_may_have_been_stored_is_sent_again_as_it_was(
    project: Tenant, node: FleetNode, storage: Storage, tmp_path: Path
) -> None:
    work = factories.running(project, node)
    sessions = node.database.sessions("tunery_worker", node_id=node.id)
    broken = make_sessions(make_engine("postgresql://nobody@127.0.0.1:1/x"))
    workspace = Workspace(tmp_path)
    workspace.log.write_bytes(b"first")
    mine: Any = SimpleNamespace(project_id=project.project_id, attempt_id=work.attempt_id, fence=work.fence)
    uploads = LogUploads(mine, workspace, storage, broken, SimpleNamespace(max_log_bytes=1 << 20))  # type: ignore[arg-type]
    assert not uploads._ship()  # stored, and not noted
    with workspace.log.open("ab") as log:
        log.write(b" and second")
    uploads._sessions = sessions  # type: ignore[assignment]
    assert uploads._ship() and uploads._ship() and not uploads._ship()
    prefix = attempt_logs.chunk_prefix(project.project_id, work.attempt_id)
    assert [storage.get_bytes(key) for key in storage.keys(prefix)] == [b"first", b" and second"]
    assert factories.attempt(work).log_bytes == 16


def test_a_trainer_that_finishes_without_weights_fails_its_job(project: Tenant, node: FleetNode) -> None:
    work = factories.running(project, node)
    sessions: Any = node.database.sessions("tunery_worker", node_id=node.id)
    ending = Ending(work, None, None, sessions, SimpleNamespace(outage_grace_s=5))  # type: ignore[arg-type]
    said = FileEntry(name="notes.txt", bytes=1, sha256=factories.SHA)
    ending.settle(Finished(path="/w/output", files=[said], tokens=1), None, trainer_gone=True)
    assert factories.attempt(work).failure_code == "corrupt_artifact"
