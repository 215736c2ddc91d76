"""Rows for tests, made the way programs make them: each step by the service, as the role, that does it for real."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select, text
from sqlalchemy.engine import Engine
from sqlalchemy.orm import Session

from tunery import adapters, catalogue, datasets, files, ids, jobs, leases, nodes, progress, queue, tasks, tenancy
from tunery.contracts.events import Checkpoint, Event, FileEntry, Metrics, Started
from tunery.contracts.scheduling import Start
from tunery.db import Sessions, for_project, make_sessions, transaction
from tunery.models import Attempt, BaseModel, Gpu, Job
from tunery.states import FailureCode, JobState, StopReason
from tunery.tenancy import Identity

GIB = 1024**3
SHA = "0" * 64
NONE_YET = uuid.UUID(int=0)


@dataclass
class Database:
    """One database; sessions by role. `owner` becomes tunery_owner, for what only migrations and tests do."""

    name: str
    url: Callable[[str], str]
    _make_engine: Callable[[str, bool], Engine]
    _engines: dict[str, Engine] = field(default_factory=dict)

    def engine(self, role: str) -> Engine:
        if role not in self._engines:
            owner = role == "owner"
            self._engines[role] = self._make_engine(self.url("tunery_migrate" if owner else role), owner)
        return self._engines[role]

    def sessions(self, role: str, *, node_id: uuid.UUID | None = None) -> Sessions:
        return make_sessions(self.engine(role), node_id=node_id)

    def close(self) -> None:
        for engine in self._engines.values():
            engine.dispose()


@dataclass(frozen=True)
class Tenant:
    """A project, its key's text, and transactions as the api has them."""

    database: Database
    identity: Identity
    key: str

    @property
    def project_id(self) -> uuid.UUID:
        return self.identity.project_id

    def transaction(self) -> Any:
        return transaction(lambda: for_project(self.database.sessions("tunery_api"), self.project_id))


@dataclass(frozen=True)
class FleetNode:
    """A registered node, and transactions as its supervisors have them."""

    database: Database
    id: uuid.UUID
    gpu_ids: tuple[uuid.UUID, ...]
    usable_bytes: int

    def transaction(self) -> Any:
        return transaction(self.database.sessions("tunery_worker", node_id=self.id))


@dataclass(frozen=True)
class Work:
    """A job on its way; `attempt_id` and `fence` once it has been assigned."""

    tenant: Tenant
    node: FleetNode
    job_id: uuid.UUID
    attempt_id: uuid.UUID = NONE_YET
    fence: int = 0

    @property
    def id(self) -> str:
        return ids.encode(ids.JOB, self.job_id)


def tenant(database: Database, pepper: str, scopes: Sequence[str] = ("admin",)) -> Tenant:
    suffix = uuid.uuid4().hex[:8]
    with transaction(database.sessions("owner")) as session:
        organization = tenancy.create_organization(session, f"Acme {suffix}")
        project = tenancy.create_project(session, organization.id, "research")
        key, text = tenancy.create_key(session, project.id, "test", list(scopes), pepper)
        identity = Identity(
            organization.id, organization.name, project.id, project.name, key.id, key.name, frozenset(scopes), None
        )
    return Tenant(database, identity, text)


def base_model(database: Database, name: str = "tiny", state: str = "ready") -> str:
    card = {
        "hub_id": f"tests/{name}",
        "revision": "0" * 40,
        "source": "tests",
        "license": "apache-2.0",
        "parameters": 30_000,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "intermediate_size": 64,
        "vocab_size": 259,
        "files": [{"name": "model.safetensors", "bytes": 120_000, "sha256": SHA}],
    }
    with transaction(database.sessions("owner")) as session:
        session.add(model := BaseModel(name=name, request={"source": "demo"}))
        if state == "ready":
            catalogue.ready(model, card, f"a/base/{name}")
        else:
            model.state = state
    return name


def node(database: Database, *, gpus: int = 1, slots: int = 1, usable_bytes: int = 8 * GIB) -> FleetNode:
    node_id = uuid.uuid4()
    devices = [
        nodes.Device(f"GPU-{index}", index, "cuda", "Test GPU", usable_bytes, usable_bytes) for index in range(gpus)
    ]
    with transaction(database.sessions("tunery_worker", node_id=node_id)) as session:
        nodes.register(
            session,
            node_id,
            name=f"node-{node_id.hex[:8]}",
            boot_id=uuid.uuid4(),
            devices=devices,
            slots=slots,
            task_slots=2,
            version="test",
            info={},
        )
        session.flush()
        gpu_ids = tuple(session.scalars(select(Gpu.id).where(Gpu.node_id == node_id).order_by(Gpu.index)))
    return FleetNode(database, node_id, gpu_ids, usable_bytes)


def file(tenant: Tenant, *, purpose: str = "fine-tune", filename: str = "rows.jsonl") -> str:
    """A file's row, without an object behind it; its id on the wire."""
    file_id = ids.uuid7()
    with tenant.transaction() as session:
        files.record(
            session, tenant.project_id, file_id, filename=filename, purpose=purpose, size=100, sha256=file_id.hex * 2
        )
    return ids.encode(ids.FILE, file_id)


# ---- a job, step by step --------------------------------------------------------------------------------------


def submitted(tenant: Tenant, node: FleetNode, model: str = "tiny", **request: Any) -> Work:
    """`validating`."""
    asked = {"model": model, "training_file": file(tenant), "seed": 7} | request
    with tenant.transaction() as session:
        job = jobs.submit(session, tenant.identity, jobs.Request(**asked), max_live=1000)
        return Work(tenant, node, job.id)


def queued(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    """The data check's work, as a node does it."""
    work = submitted(tenant, node, **request)
    lease = _take_task(node, work.job_id)
    with node.transaction() as session:
        task = tasks.hold(session, lease)
        job = jobs.lock(session, work.job_id)
        found = jobs.inputs(session, work.job_id)
        report = datasets.Report(rows=40, shape="chat", max_row_bytes=200)
        train = datasets.record(
            session,
            job.project_id,
            source_sha256=found.training.sha256,
            sha256=SHA,
            object_key=f"a/{job.project_id}/{lease.id}/rows",
            size=8000,
            report=report,
        )
        jobs.resolve(session, job, found.base, train, None)
        job.required_bytes = GIB
        leases.enqueue(session, job, [])
        tasks.finish(task)
    return work


def _take_task(node: FleetNode, job_id: uuid.UUID) -> tasks.Lease:
    """Other tests' waiting tasks may come first; they are taken too, and left."""
    while True:
        with node.transaction() as session:
            lease = tasks.claim(session, node.id, 60)
        assert lease is not None, "no task waits for this job"
        if lease.job_id == job_id:
            return lease


def assigned(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    return assign(queued(tenant, node, **request))


def assign(work: Work, node: FleetNode | None = None, *, gpu_bytes: int = GIB, exclusive: bool = True) -> Work:
    """What the scheduler does with a `Start`."""
    node = node or work.node
    with transaction(node.database.sessions("tunery_scheduler")) as session:
        attempt_id = queue.assign(session, Start(work.job_id, node.id, node.gpu_ids, gpu_bytes, exclusive))
        assert attempt_id is not None, "the job does not wait"
        fence = session.get_one(Attempt, attempt_id).fence
    return Work(work.tenant, node, work.job_id, attempt_id, fence)


def claim(work: Work, lease_s: float = 45) -> Work:
    with work.node.transaction() as session:
        assert leases.claim(session, work.attempt_id, "supervisor-1", lease_s) is not None
    return work


def claimed(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    """`starting`."""
    return claim(assigned(tenant, node, **request))


def started(seq: int = 1, **fields: Any) -> Started:
    given = {
        "device": "Test GPU",
        "precision": "fp32",
        "trainable_parameters": 100,
        "total_parameters": 1000,
        "total_steps": 40,
        "start_step": 0,
        "train_rows": 40,
        "eval_rows": 0,
    }
    return Started(seq=seq, time=time.time(), **(given | fields))


def metrics(seq: int, step: int, loss: float = 1.0) -> Metrics:
    values = {"train/loss": loss, "train/tokens_per_second": 100.0}
    return Metrics(seq=seq, time=time.time(), step=step, values=values, tokens=step * 50, total_steps=40)


def tell(work: Work, *said: Event) -> Work:
    """What a trainer says reaches the database."""
    with work.node.transaction() as session:
        progress.ingest(session, work.attempt_id, work.fence, said)
    return work


def running(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    return tell(claimed(tenant, node, **request), started())


def checkpoint(work: Work, step: int, **values: float) -> None:
    said = Checkpoint(step=step, path=f"/tmp/step-{step}", files=[], metrics=values)
    stored = [FileEntry(name="adapter_model.safetensors", bytes=10, sha256=SHA)]
    prefix = f"a/{work.tenant.project_id}/{work.attempt_id}/checkpoints/step-{step}"
    with work.node.transaction() as session:
        progress.store_checkpoint(session, work.attempt_id, work.fence, said, prefix, stored)


def publish(work: Work, contents: Sequence[FileEntry] | None = None, peak_bytes: int = 0) -> Work:
    """From running to `succeeded`. The objects are the test's own business."""
    weights = FileEntry(name=adapters.WEIGHTS, bytes=10, sha256=SHA)
    prefix = f"a/{work.tenant.project_id}/{work.attempt_id}/output"
    with work.node.transaction() as session:
        leases.begin_publishing(session, leases.hold(session, work.attempt_id, work.fence))
    with work.node.transaction() as session:
        held = leases.hold(session, work.attempt_id, work.fence)
        adapters.publish(session, held, adapters.Published(prefix, contents or [weights], {"eval/loss": 1.1}))
        leases.succeed(session, held, tokens=2000, peak_memory_bytes=peak_bytes)
    return work


def succeeded(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    return publish(running(tenant, node, **request))


def failed(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    work = running(tenant, node, **request)
    fault(work, FailureCode.NON_FINITE_LOSS, "The loss is NaN at step 3.")
    return work


def fault(work: Work, code: FailureCode, message: str = "It broke.", peak_bytes: int = 0) -> JobState:
    """The supervisor reports a failure."""
    with work.node.transaction() as session:
        held = leases.hold(session, work.attempt_id, work.fence)
        return leases.fail(session, held, code, message, peak_memory_bytes=peak_bytes)


def stop(work: Work, reason: StopReason = StopReason.CANCEL) -> None:
    """The trainer has stopped as it was asked to."""
    with work.node.transaction() as session:
        held = leases.hold(session, work.attempt_id, work.fence)
        leases.stopped(session, held, reason)


def cancel(work: Work) -> None:
    with work.tenant.transaction() as session:
        leases.cancel(session, work.tenant.project_id, work.job_id)


def cancelling(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    work = running(tenant, node, **request)
    cancel(work)
    return work


def cancelled(tenant: Tenant, node: FleetNode, **request: Any) -> Work:
    work = queued(tenant, node, **request)
    cancel(work)
    return work


IN_STATE: dict[JobState, Callable[..., Work]] = {
    JobState.VALIDATING: submitted,
    JobState.QUEUED: queued,
    JobState.STARTING: claimed,
    JobState.RUNNING: running,
    JobState.CANCELLING: cancelling,
    JobState.SUCCEEDED: succeeded,
    JobState.FAILED: failed,
    JobState.CANCELLED: cancelled,
}
"""How a job gets into a state. Pausing has no service yet: `put` does it for tests of what follows."""


def look(work: Work) -> Job:
    """The job's row as it is now."""
    with transaction(work.node.database.sessions("owner")) as session:
        return session.get_one(Job, work.job_id)


def attempt(work: Work) -> Attempt:
    with transaction(work.node.database.sessions("owner")) as session:
        return session.get_one(Attempt, work.attempt_id)


def free_bytes(node: FleetNode) -> int:
    """On the node's first GPU."""
    with transaction(node.database.sessions("owner")) as session:
        gpu = session.get_one(Gpu, node.gpu_ids[0])
        return gpu.usable_bytes - gpu.reserved_bytes


def end_everything(database: Database) -> None:
    """Whatever other tests left waits, runs, leads and offers nothing any more."""
    with owner(database) as session, session.begin():
        for table, change, where in (
            ("nodes", "removed_at = now()", "removed_at IS NULL"),
            ("allocations", "released_at = now()", "released_at IS NULL"),
            ("jobs", "state = 'cancelled', finished_at = now()", "finished_at IS NULL"),
            ("attempts", "state = 'cancelled', ended_at = now(), lease_expires_at = NULL", "ended_at IS NULL"),
            ("leader", "expires_at = now()", "true"),
        ):
            session.execute(text(f"UPDATE {table} SET {change} WHERE {where}"))
        session.execute(text("DELETE FROM queue_questions"))


def owner(database: Database) -> Session:
    """For what no program does: moving clocks, looking at everything."""
    return database.sessions("owner")()
