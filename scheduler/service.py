"""The loops around the policy: leading, deciding, relaying the outbox, and finding what went silent.

Each loop is a thread of its own, so that a Redis that hangs delays no decision, and a slow pass no renewal. Every
transaction that decides carries this leader's epoch; a scheduler that was deposed or suspended changes nothing.
"""

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from redis.exceptions import RedisError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from scheduler import metrics
from scheduler.budgets import Budgets
from scheduler.forecast.child import Child
from scheduler.policy import schedule
from scheduler.tidy import Tidy
from tunery import (
    catalogue,
    census,
    events,
    failpoints,
    ids,
    jobs,
    leases,
    maintenance,
    membership,
    outbox,
    queue,
    tasks,
    wake,
)
from tunery.contracts.scheduling import PolicySettings
from tunery.db import Sessions, transaction
from tunery.dispatch import Doorbell
from tunery.errors import ServiceError, Unavailable
from tunery.events import Entry
from tunery.outbox import Outbox
from tunery.queue import Deposed
from tunery.settings import SchedulerSettings
from tunery.states import FailureCode
from tunery.storage import Storage
from tunery.telemetry import bind_process, tracing
from tunery.telemetry.health import NotReady

log = structlog.get_logger(__name__)

_LEAST_PAUSE_S = 0.05
GAP_S = 15.0
"""No sweep for so long means that nobody could have renewed against a working control plane."""


_STUCK_S = 30.0
"""A loop that has not come round for so long hangs; the slowest pause between two rounds is five seconds."""


def policy_settings(settings: SchedulerSettings) -> PolicySettings:
    """Engines stay off: nothing starts one yet."""
    return PolicySettings(
        tau_s=settings.tau_s,
        depth=settings.queue_depth,
        preemption=settings.preemption,
        min_runtime_s=settings.min_runtime_s,
        grace_s=settings.stop_grace_s,
        max_preemptions=settings.max_preemptions,
        window_s=settings.preemption_window_s,
        sharing=settings.gpu_sharing,
    )


class Scheduler:
    """One of possibly several; whoever holds the leader row works, the others wait for it."""

    def __init__(
        self,
        sessions: Sessions,
        doorbell: Doorbell,
        settings: SchedulerSettings,
        holder: str,
        storage: Storage | None = None,
        forecaster: Child | None = None,
    ) -> None:
        self._sessions = sessions
        self._doorbell = doorbell
        self._settings = settings
        self._holder = holder
        self._budgets = Budgets(sessions, settings.stop_grace_s)
        self._tidy = Tidy(sessions, storage, settings) if storage else None
        self._forecaster = forecaster
        self._policy = policy_settings(settings)
        self._mirror = queue.Mirror()
        self._mirrored: int | None = None
        """Epoch in which the mirror was begun: what another leader did in between is not in it."""
        self._epoch: int | None = None
        self._stop = threading.Event()
        self._woken = {name: threading.Event() for name in ("decide", "relay", "drain")}
        self._looked = {"lead": time.monotonic(), "decide": time.monotonic(), "sweep": time.monotonic()}
        """When each loop last came round; one that hangs makes the scheduler not ready."""

    @property
    def epoch(self) -> int | None:
        """While it leads."""
        return self._epoch

    def loops(self) -> str | None:
        """For readiness. Raises NotReady if a loop has not come round for long."""
        ages = {name: time.monotonic() - at for name, at in self._looked.items()}
        if late := [f"{name} for {age:.0f} s" for name, age in ages.items() if age > _STUCK_S]:
            raise NotReady(f"not run: {', '.join(late)}")
        return None

    def told(self) -> dict[str, object]:
        """Beside readiness: who leads. Standing by is as ready as leading."""
        age = time.monotonic() - self._looked["decide"]
        return {
            "role": "leading" if self._epoch else "following",
            "epoch": self._epoch,
            "last_pass_age_s": round(age, 1),
        }

    def run(self, stop: threading.Event) -> None:
        """Work until `stop` is set, then let the next leader start at once."""
        self._stop = stop
        loops: list[tuple[str, Callable[[], object], float]] = [
            ("lead", self.lead, self._settings.leader_renew_s),
            ("decide", self.decide, self._settings.decide_s),
            ("relay", self.relay, self._settings.decide_s),
            ("sweep", self.sweep, self._settings.sweep_s),
            ("doors", self.keep_doors, self._settings.sweep_s),
            ("budgets", self.keep_budgets, self._settings.budget_s),
            ("drain", self.drain, self._settings.sweep_s),
        ]
        if self._forecaster is not None:
            loops.append(("forecast", self.keep_forecaster, self._settings.leader_renew_s))
        if self._tidy is not None:
            loops.append(("tidy", self.tidy, self._settings.tidy_s))
        else:
            log.warning("no object store is configured here: nothing that may go is deleted")
        threads = [threading.Thread(target=self._loop, args=loop, name=loop[0], daemon=True) for loop in loops]
        for thread in threads:
            thread.start()
        threading.Thread(target=self._listen, name="listen", daemon=True).start()
        stop.wait()
        self._wake()
        for thread in threads:
            thread.join(timeout=5)
        if self._forecaster is not None:
            self._forecaster.end()
        try:
            with transaction(self._sessions) as session:
                queue.resign(session, self._holder)
        except DBAPIError:
            log.info("could not resign; the lease will run out")

    def _loop(self, name: str, work: Callable[[], object], every_s: float) -> None:
        while not self._stop.is_set():
            try:
                work()
                if name in self._looked:
                    self._looked[name] = time.monotonic()
            except Deposed:
                self._epoch = None
                log.warning("deposed", loop=name)
            except DBAPIError as error:
                log.warning("database trouble; trying again", loop=name, error=str(error.orig).strip())
            except Unavailable as error:
                log.warning("object store trouble; trying again", loop=name, error=str(error))
            except RedisError as error:
                log.warning("redis trouble; nodes find work by polling", loop=name, error=str(error))
                self._stop.wait(2)
            except Exception:  # a loop that dies silently is worse than one that complains
                log.exception("loop failed; trying again", loop=name)
                self._stop.wait(1)
            self._rest(name, every_s)

    def _rest(self, name: str, every_s: float) -> None:
        """Until the next pass is due, or something has happened; a flood of news makes no flood of passes."""
        self._stop.wait(min(every_s, _LEAST_PAUSE_S))
        woken = self._woken.get(name, self._stop)
        if woken.wait(every_s) and not self._stop.is_set():
            woken.clear()

    def _listen(self) -> None:
        wake.listen(self._sessions.kw["bind"], self._wake, self._stop)

    def _wake(self) -> None:
        for woken in self._woken.values():
            woken.set()

    def lead(self) -> None:
        """Become or stay the leader."""
        with transaction(self._sessions) as session:
            epoch = queue.lead(session, self._holder, self._settings.leader_ttl_s)
        before, self._epoch = self._epoch, epoch
        bind_process(epoch=epoch)
        if epoch != before:
            log.info("leading" if epoch else "following", epoch=epoch)
            self._wake()  # with the epoch set, or the loops would look, see no leader, and rest

    def decide(self) -> int:
        """One pass of the policy; returns how many jobs were assigned."""
        if (epoch := self._epoch) is None:
            return 0
        if self._mirrored != epoch:
            self._mirror.forget()
            self._mirrored = epoch
        try:
            with metrics.PASS.time():
                with transaction(self._sessions) as session:
                    world = queue.snapshot(session, self._settings.lease_s, self._policy, self._mirror)
                plan = schedule(world)
                assigned = queue.apply(self._sessions, epoch, plan, self._mirror, self._settings.stop_grace_s)
        except BaseException:
            self._mirrored = None
            raise
        if assigned:
            log.info("assigned", jobs=len(assigned), waiting=len(world.jobs) - len(assigned))
            with transaction(self._sessions) as session:
                waits = census.queue_waits_s(session, assigned)
            for waited in waits:
                metrics.QUEUE_WAIT.observe(waited)
        return len(assigned)

    def relay(self) -> None:
        """Send what waits in the outbox. A crash between sending and marking sends it twice, which is harmless."""
        if self._epoch is None:
            return
        with transaction(self._sessions) as session:
            messages = outbox.unsent(session)
            everyone = queue.live_nodes(session, self._settings.lease_s) if messages else []
        sent: list[Outbox] = []
        try:
            for message in messages:
                if message.topic == outbox.JOB_ENDED:
                    self._doorbell.announce(message.payload["job_id"], message.payload["state"])
                elif message.topic == outbox.BUDGET_ALERT:
                    self._doorbell.warn(message.payload)
                else:
                    self._ring(message, everyone)
                sent.append(message)
                failpoints.reach("relay.rung")
        finally:
            if sent:
                self._mark(sent)

    def _mark(self, sent: list[Outbox]) -> None:
        with transaction(self._sessions) as session:
            outbox.mark_sent(session, [message.id for message in sent])
            ended = [_ended(session, message) for message in sent]
        for one in filter(None, ended):
            metrics.count(one)

    def _ring(self, message: Outbox, everyone: list[uuid.UUID]) -> None:
        to = [message.payload["node_id"]] if message.topic == outbox.RING_NODE else everyone
        parent = message.payload.get("traceparent")
        if parent is None:
            for node_id in to:
                self._doorbell.ring(node_id, str(message.id))
            return
        at = message.created_at.timestamp()
        with tracing.span("tunery.outbox.ring", parent=parent, kind="producer", at=at):
            for node_id in to:
                self._doorbell.ring(node_id, str(message.id))

    def keep_doors(self) -> None:
        """A Redis that restarted has forgotten its users, and one that was away has kept those of removed nodes."""
        if self._epoch is None:
            return
        with transaction(self._sessions) as session:
            wanted, gone = membership.redis_users(session)
        if (wanted or gone) and (changed := self._doorbell.keep_users(wanted, gone)):
            log.info("redis users made or ended", nodes=[str(node_id) for node_id in changed])

    def sweep(self) -> None:
        """Find leases that ran out, assignments nobody took, GPUs that nobody will free."""
        if (epoch := self._epoch) is None:
            return
        clocks = self._settings
        with transaction(self._sessions) as session:
            if queue.forgive_outage(session, epoch, GAP_S, clocks.lease_s):
                log.warning("nobody looked for a while; every lease starts anew")
            expired = queue.expired_attempts(session, clocks.lost_grace_s)
            unclaimed = queue.unclaimed_attempts(session, clocks.claim_timeout_s)
            stranded = queue.stranded_attempts(session, clocks.silent_node_s)
            overdue = queue.overdue_attempts(session)
            late_tasks = tasks.expired(session, clocks.lost_grace_s)
            archived = queue.archived_jobs(session)
            outbox.sweep(session)
        for attempt_id in expired:
            with self._one(epoch) as session:
                if leases.declare_lost(session, attempt_id, clocks.lost_grace_s):
                    log.warning("attempt lost", attempt=str(attempt_id))
                    metrics.LOST.inc()
        for attempt_id in unclaimed:
            with self._one(epoch) as session:
                leases.unassign(session, attempt_id)
        for attempt_id in stranded:
            with self._one(epoch) as session:
                leases.release(session, attempt_id)
        for attempt_id in overdue:
            with self._one(epoch) as session:
                if leases.time_out(session, attempt_id, clocks.stop_grace_s):
                    log.info("time limit reached", attempt=str(attempt_id))
        for task_id, job_id in late_tasks:
            with self._one(epoch) as session:
                self._take_back(session, task_id, job_id)
        for project_id, job_id in archived:
            with self._one(epoch) as session:
                self._end_archived(session, project_id, job_id)

    @contextmanager
    def _one(self, epoch: int) -> Iterator[Session]:
        """A leader's transaction about one thing. If it cannot be had now (somebody cut off still has it locked),
        the others are looked after all the same; the next sweep finds it again."""
        try:
            with transaction(self._sessions) as session:
                queue.assert_leader(session, epoch)
                yield session
        except DBAPIError as error:
            log.warning("left for the next sweep", error=str(error.orig).strip()[:200])

    def drain(self) -> None:
        """Move what runs on draining nodes elsewhere; also what a pass that had not seen the drain put there."""
        if (epoch := self._epoch) is None:
            return
        with transaction(self._sessions) as session:
            found = maintenance.to_end(session)
        for attempt_id in found:
            with self._one(epoch) as session:
                if leases.evict(session, attempt_id, self._settings.stop_grace_s, "Its node is taken out of service"):
                    log.info("moved off a draining node", attempt=str(attempt_id))

    def tidy(self) -> None:
        """Delete what may go."""
        if self._tidy is not None and (epoch := self._epoch) is not None:
            self._tidy.run(epoch)

    def keep_forecaster(self) -> None:
        """It forecasts while this scheduler leads."""
        if self._forecaster is not None:
            self._forecaster.keep(self._epoch is not None)

    def keep_budgets(self) -> None:
        """Tell, block and stop whoever has used a budget up."""
        if (epoch := self._epoch) is not None:
            self._budgets.run(epoch)

    def _end_archived(self, session: Session, project_id: uuid.UUID, job_id: uuid.UUID) -> None:
        """Nobody has a key to a project that was archived: what goes on in it is cancelled."""
        try:
            job = leases.cancel(session, project_id, job_id)
        except ServiceError:
            return  # it has ended, or is gone, since we looked
        events.append(session, job, [Entry("The job's project was archived", "warn")])
        log.info("cancelled with its project", job=str(job_id))

    def _take_back(self, session: Session, task_id: uuid.UUID, job_id: uuid.UUID | None) -> None:
        """A task whose node fell silent: another try, or, when its tries are used up, the end of what it was for."""
        job = jobs.lock(session, job_id) if job_id else None
        task = tasks.lock_expired(session, task_id, self._settings.lost_grace_s)
        if task is None or not tasks.fail(task, "its node stopped renewing the lease", retry=True):
            return
        if job is not None:
            message = f"The data check was lost {tasks.MAX_TRIES} times."
            leases.reject(session, job, FailureCode.INTERNAL, message, "training_file")
        if task.base_model_id is not None:
            catalogue.failed(catalogue.by_id(session, task.base_model_id), task.error or "")


def _ended(session: Session, message: Outbox) -> census.Ended | None:
    """Counted when it is told: once, but for a crash between the two, which tells it twice."""
    if message.topic != outbox.JOB_ENDED:
        return None
    return census.ended(session, ids.decode(ids.JOB, message.payload["job_id"]))
