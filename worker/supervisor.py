"""One process per attempt: `python -m worker.supervisor <attempt id>`. It outlives the node process.

    claim -> workspace -> trainer -> events, checkpoints, logs -> outcome -> publish -> end

The main thread owns the trainer and decides; the keeper renews, the recorder writes events, two uploaders store
checkpoints and logs. They talk to the main thread through one queue.
"""

import os
import queue
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import structlog
from sqlalchemy.engine import Engine

from tunery import failpoints, ids, leases, nodes
from tunery.contracts.events import (
    OUTCOMES,
    Checkpoint,
    Event,
    Failed,
    Finished,
    Stop,
    Stopped,
    Stored,
    Tick,
)
from tunery.db import Sessions, make_engine, make_sessions, refuse_privileged_role, transaction
from tunery.leases import Fenced
from tunery.settings import NodeSettings, load
from tunery.states import FailureCode, StopReason
from tunery.storage import CorruptObject, Storage
from tunery.telemetry import bind_process, configure_logs, tracing
from tunery.telemetry.tracing import Span
from tunery.unreadable import hide_from_same_user
from worker import launch_guard, locks, processes, trainers
from worker.claiming import claim
from worker.ending import Ending, NoOutcome
from worker.isolation.host import Ways
from worker.keeper import Keeper
from worker.launch_guard import Driver, Nvml
from worker.line import Line
from worker.meters import Meters
from worker.patience import OutageTooLong, persist
from worker.recorder import Recorder
from worker.sampling import Sampler, source_of
from worker.trace import TrainingTrace
from worker.uploads import CheckpointUploads, LogUploads
from worker.workspace import Work, Workspace

log = structlog.get_logger(__name__)

_CONNECT_S = 120
"""A trainer connects before it loads anything heavy."""

_HANDLED = {signal.SIGUSR1, signal.SIGTERM}
"""Blocked from before our pid can be known until we can handle them: their default action is to end us."""


class Supervisor:
    """Runs one claimed attempt to its end."""

    def __init__(
        self,
        work: Work,
        workspace: Workspace,
        storage: Storage,
        sessions: Sessions,
        settings: NodeSettings,
        driver: Driver | None = None,
    ) -> None:
        self._work, self._workspace, self._storage = work, workspace, storage
        self._driver = driver or Nvml()
        self._sessions, self._settings = sessions, settings
        self._meters, self._trace = Meters(workspace.root.with_suffix(".prom")), TrainingTrace()
        self._line = Line(workspace)
        self._trainer = trainers.choose(work, workspace, settings, Ways.inherited(settings))
        # renewals must not wait behind anybody's slow statement
        own = make_engine(settings.database_url.get_secret_value(), pool_size=1, statement_timeout_s=5)
        self._keeper = Keeper(
            work,
            make_sessions(own, node_id=sessions.kw["info"]["node_id"]),
            settings,
            on_stop=self._on_stop,
            on_fenced=self._on_fenced,
            tick=lambda: self._line.tell(Tick()),
            on_late=self._meters.late_renewals.inc,
        )
        self._recorder = Recorder(work, sessions)
        self._sampler = Sampler(work, sessions, settings, source_of(work, settings))
        self._checkpoints = CheckpointUploads(
            work,
            workspace,
            storage,
            sessions,
            settings,
            self._meters,
            write_through=self._recorder.write_through,
            on_stored=lambda step: self._line.tell(Stored(step=step)),
        )
        self._logs = LogUploads(work, workspace, storage, sessions, settings)
        self._interrupted = threading.Event()
        """Somebody wants this attempt to stop: what waits for a server need not wait any longer."""
        self._asked: list[StopReason] = []
        self._shutdown = False
        self._fenced = False
        self._stop: StopReason | None = None
        self._kill_at: float | None = None
        self._gone_by: dict[StopReason, float] = {}
        """By when whoever asked wants the trainer gone."""

    def run(self) -> None:
        """Everything between the claim and the end of the attempt. Never raises: every path ends somewhere."""
        signal.signal(signal.SIGTERM, self._on_sigterm)
        signal.signal(signal.SIGUSR1, lambda *_: self._keeper.poke())
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
        ending = Ending(self._work, self._workspace, self._storage, self._sessions, self._settings)
        try:
            self._keeper.start()
            with tracing.span("tunery.job.prepare") as span:
                if (failed := self._prepare()) is not None:
                    span.fail(failed[1])
            if failed is not None:
                ending.fail(*failed)
                return
            if self._interrupted.is_set():
                self._before_training(ending)
                return
            if self._refused_by_device():
                return
            self._line.open()
            self._trainer.start()
            log.info("trainer started")
            for helper in (self._line, self._recorder, self._checkpoints, self._logs, self._sampler):
                helper.start()
            outcome = self._blame(self._watch())
            self._trace.over("the trainer went without a word" if isinstance(outcome, NoOutcome) else None)
            self._sampler.finish()
            gone = self._trainer.end()
            self._line.hang_up()
            if self._fenced:
                self._checkpoints.finish(abandon=True)
                log.warning("fenced; the attempt belongs to somebody else now")
                return
            if gone:
                persist("freeing the device", self._free, self._settings.outage_grace_s)
            self._checkpoints.finish(abandon=self._stop is StopReason.CANCEL)
            self._recorder.finish(self._settings.outage_grace_s)
            self._logs.finish()
            with tracing.span("tunery.job.settle", attributes={"tunery.outcome": _name(outcome)}):
                ending.settle(outcome, self._stop, trainer_gone=gone)
        except Fenced:
            log.warning("fenced while ending; nothing more to do")
        except OutageTooLong:
            log.error("a server stayed away too long; the lease runs out and the job goes on elsewhere")
        except OSError as error:
            ending.fail(self._trainer.lost, f"The trainer could not be started: {error}")
        finally:
            # a poke inside stop() would wait for a lock that this very thread holds
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)
            self._trainer.end()
            self._line.close()
            self._keeper.stop()
            self._meters.save(now=True)
            self._workspace.remove()

    def _prepare(self) -> tuple[FailureCode, str] | None:
        """Build the workspace, waiting out storage outages. A failure code and message if that is not to be."""
        store = self._settings.model_store or self._settings.home / "models"
        try:
            persist(
                "fetching the inputs",
                lambda: self._workspace.build(self._work, self._storage, store),
                self._settings.outage_grace_s,
                self._interrupted,
            )
        except OutageTooLong:
            if self._interrupted.is_set():
                return None
            return FailureCode.STORAGE_UNAVAILABLE, "The object store stayed away while the inputs were fetched."
        except (CorruptObject, KeyError) as error:
            resumed = self._work.resume is not None and self._work.resume.prefix in str(error)
            return (FailureCode.CORRUPT_CHECKPOINT if resumed else FailureCode.CORRUPT_ARTIFACT), str(error)
        except OSError as error:
            return FailureCode.DISK_FULL, f"The workspace could not be written: {error.strerror}"
        return None

    def _refused_by_device(self) -> bool:
        """Somebody else is on our GPU: the job goes back unharmed, and the GPU gets no more work until it is clean."""
        if not any(kind == "cuda" for kind, _ in self._work.devices) or self._work.engine_socket is not None:
            return False
        node_id = self._sessions.kw["info"]["node_id"]

        def ask() -> list[uuid.UUID]:
            with transaction(self._sessions) as session:
                return nodes.neighbours(session, self._work.attempt_id)

        neighbours = persist("asking who shares the devices", ask, self._settings.outage_grace_s)
        reasons = launch_guard.look(self._driver, self._work.devices, neighbours)
        if not reasons:
            return False

        def give_back() -> None:
            with transaction(self._sessions) as session:
                held = leases.hold(session, self._work.attempt_id, self._work.fence)
                nodes.mark_dirty(session, node_id, reasons)
                why = "; ".join(f"{device}: {reason}" for device, reason in reasons.items())
                leases.give_back(session, held, why)

        log.error("a GPU is not clean; the attempt goes back", reasons=reasons)
        persist("giving the attempt back", give_back, self._settings.outage_grace_s)
        return True

    def _watch(self) -> Event | NoOutcome:
        """Until the trainer has said how it ended, or is gone, or has to go."""
        began = heard = time.monotonic()
        while True:
            if self._fenced:
                self._line.tell(Stop(reason=StopReason.FENCED, checkpoint=False, deadline_s=0))
                return NoOutcome(None, self._trainer.lost)
            self._meters.save()
            if (reason := self._reason()) is not None and reason is not self._stop:
                self._ask_to_stop(reason)
            if self._kill_at is not None and time.monotonic() > self._kill_at:
                return NoOutcome(None, self._trainer.lost)  # also of a trainer that talks on and on
            try:
                said = self._line.hear(0.5)
            except queue.Empty:
                if not self._line.connected:
                    heard = time.monotonic()  # whoever never connects has a time limit of its own
                    if heard - began > _CONNECT_S:
                        return NoOutcome(self._trainer.exit_code(), self._trainer.lost)
                if (code := self._trainer.exit_code()) is not None:
                    return self._drain(NoOutcome(code, self._trainer.lost))
                if time.monotonic() - heard > self._settings.hang_s:
                    return NoOutcome(None, FailureCode.TRAINER_HUNG)
                continue
            if isinstance(said, type):
                return self._drain(NoOutcome(self._wait_for_exit(), self._trainer.lost))
            heard = time.monotonic()
            self._hear(said)
            if isinstance(said, OUTCOMES):
                return said

    def _blame(self, outcome: Event | NoOutcome) -> Event | NoOutcome:
        """What a trainer says, or does not say, when its GPU breaks below it is not what ended it."""
        if self._stop is not None or isinstance(outcome, Finished | Stopped):
            return outcome
        broken = launch_guard.broken(self._driver, self._work.devices)
        told = "; ".join(f"{device}: {reason}" for device, reason in broken.items())
        return Failed(code=FailureCode.GPU_LOST, message=f"A GPU broke. {told}") if broken else outcome

    def _hear(self, event: Event) -> None:
        self._recorder.add(event)
        self._meters.hear(event)
        self._trace.hear(event)
        self._sampler.hear(event)
        if isinstance(event, Checkpoint):
            self._checkpoints.add(event)  # its folder was checked when the event came

    def _drain(self, otherwise: NoOutcome) -> Event | NoOutcome:
        """A process may be gone before its last lines were read."""
        while True:
            try:
                said = self._line.hear(0.5)
            except queue.Empty:
                return otherwise
            if isinstance(said, type):
                continue
            self._hear(said)
            if isinstance(said, OUTCOMES):
                return said

    def _wait_for_exit(self) -> int | None:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            if (code := self._trainer.exit_code()) is not None:
                return code
            time.sleep(0.05)
        return None

    def _ask_to_stop(self, reason: StopReason) -> None:
        if self._stop is StopReason.CANCEL:
            return  # nothing is more urgent
        self._stop = reason
        cancelled = reason is StopReason.CANCEL
        grace = min(leases.CANCEL_GRACE_S, self._settings.stop_grace_s) if cancelled else self._settings.stop_grace_s
        if (gone_by := self._gone_by.get(reason)) is not None:
            left = max(0.0, gone_by - time.monotonic())
            grace = min(grace, left) if cancelled else left
        self._kill_at = time.monotonic() + grace
        log.info("asking the trainer to stop", reason=reason, grace_s=grace)
        self._line.tell(Stop(reason=reason, checkpoint=not cancelled, deadline_s=grace))

    def _on_sigterm(self, _number: int, _frame: object) -> None:
        self._shutdown = True  # a full inbox must not swallow it
        self._interrupted.set()

    def _on_stop(self, reason: StopReason, within_s: float | None) -> None:
        if within_s is not None:
            self._gone_by[reason] = time.monotonic() + within_s
        self._asked.append(reason)
        self._interrupted.set()

    def _on_fenced(self) -> None:
        self._fenced = True
        self._interrupted.set()

    def _before_training(self, ending: Ending) -> None:
        """Asked to stop, or fenced, while the inputs were still being fetched: nothing runs yet."""
        if self._fenced:
            return
        ending.settle(NoOutcome(None, self._trainer.lost), self._reason() or StopReason.SHUTDOWN, trainer_gone=True)

    def _reason(self) -> StopReason | None:
        """What is asked by now; a cancel outweighs everything."""
        if StopReason.CANCEL in self._asked:
            return StopReason.CANCEL
        return StopReason.SHUTDOWN if self._shutdown else (self._asked[-1] if self._asked else None)

    def _free(self) -> None:
        """The device is free as soon as nothing runs on it: a slow store must not keep it idle."""
        with transaction(self._sessions) as session:
            leases.hold(session, self._work.attempt_id, self._work.fence)
            leases.release(session, self._work.attempt_id)


def _name(outcome: Event | NoOutcome) -> str:
    return "none" if isinstance(outcome, NoOutcome) else outcome.type


def main(attempt: str) -> int:
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    hide_from_same_user()
    began = time.time()
    configure_logs("supervisor")
    node_id = uuid.UUID(os.environ["TUNERY_NODE_ID"])
    bind_process(attempt=attempt, node=str(node_id))
    settings = load(NodeSettings)
    tracing.set_up("supervisor")
    root = settings.home / "attempts" / attempt
    try:
        lock = locks.take(root.with_suffix(".lock"))
    except locks.Taken:
        log.info("another supervisor has this attempt")
        return 0
    lock.truncate(0)
    lock.write(str(os.getpid()))
    lock.flush()
    processes.become_subreaper()
    # cut off in the middle of a transaction, we must not keep the job locked until after our lease is over
    url = settings.database_url.get_secret_value()
    engine = make_engine(url, pool_size=3, idle_timeout_s=settings.lease_s)
    sessions = make_sessions(engine, node_id=node_id)
    claimed_by = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
    work = persist(
        "claiming", lambda: _claim(engine, sessions, attempt, claimed_by, settings), settings.claim_timeout_s
    )
    if work is None:
        log.info("nothing to claim")
    else:
        job, project = ids.encode(ids.JOB, work.job_id), ids.encode(ids.PROJECT, work.project_id)
        bind_process(job=job, project=project, no=work.attempt_no, fence=work.fence)
        span = _follow(work, job, began)
        log.info("claimed", start_step=work.start_step)
        failpoints.reach("attempt.claimed")
        Supervisor(work, Workspace(root), Storage(settings), sessions, settings).run()
        span.end()
        log.info("over")
    Path(lock.name).unlink(missing_ok=True)
    tracing.shut_down()
    return 0


def _follow(work: Work, job: str, began: float) -> Span:
    """Everything this process does belongs to the attempt's span, or else to whatever span assigned it."""
    attributes = {
        "tunery.job.id": job,
        "tunery.attempt.id": str(work.attempt_id),
        "tunery.attempt": work.attempt_no,
        "tunery.fence": work.fence,
        "tunery.start_step": work.start_step,
    }
    span = tracing.start("tunery.attempt", parent=work.traceparent, kind="consumer", at=began, attributes=attributes)
    tracing.follow(span.traceparent or work.traceparent)
    tracing.start("tunery.attempt.claim", at=began).end()
    return span


def _claim(engine: Engine, sessions: Sessions, attempt: str, claimed_by: str, settings: NodeSettings) -> Work | None:
    refuse_privileged_role(engine)
    with transaction(sessions) as session:
        return claim(session, uuid.UUID(attempt), claimed_by, settings.lease_s)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
