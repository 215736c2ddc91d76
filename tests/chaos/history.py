"""What must be true of a deployment's history, whatever happened to it. Each violation is one sentence.

The evidence: what clients were told (`Told`), the rows of Postgres, the listing of the object store, the process
table, and the device witnesses' lines in the trainers' logs. The checks are functions of that evidence alone, so that
false histories can be shown to them.
"""

import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import select, text

from tests.chaos import witness
from tests.fleet import Fleet
from tunery import attempt_logs, ids
from tunery.models import AdapterVersion, Attempt, Checkpoint, Job
from tunery.states import LIVE_ATTEMPT, TERMINAL
from worker import processes

OPEN_JOBS = select(Job.id, Job.state).where(Job.state.not_in(sorted(TERMINAL)))
DETECTION_S = 90
"""A dead process is noticed, and its attempt ended, within so long with production clocks."""
SECRET = re.compile(r"ftk_live_\w{12}_\w{38}|postgresql://[^:/\s]+:[^@\s]+@|redis://[^:/\s]*:[^@\s]+@")
"""An API key, or a URL with its password."""


@dataclass
class Told:
    """What one client was told of one job."""

    job_id: str
    """As on the wire."""
    statuses: list[str] = field(default_factory=list)
    """OpenAI's, in the order seen, without repeats in a row."""
    cancelled: bool = False
    """A cancel was asked for, whether or not its answer came back."""
    bad: bool = False
    """Its rows are not sound: it must fail, and say so."""


@dataclass(frozen=True)
class Version:
    job_id: uuid.UUID
    attempt_id: uuid.UUID
    files: dict[str, str]
    """Object key and the sha256 that was published."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint that is not deleted."""

    job_id: uuid.UUID
    step: int
    keys: frozenset[str]


@dataclass(frozen=True)
class Try:
    """An attempt, and what it reported."""

    id: uuid.UUID
    job_id: uuid.UUID
    no: int
    fence: int
    state: str
    start_step: int
    failure: str
    steps: tuple[int, ...]
    """Steps whose loss is stored under it, in order."""
    log: str
    ended_at: float | None = None
    """Seconds since 1970, by Postgres."""


@dataclass(frozen=True)
class Ended:
    """A job at the end."""

    id: uuid.UUID
    state: str
    error: str
    total_steps: int
    event_seqs: tuple[int, ...]
    terminal_events: int


@dataclass
class History:
    told: list[Told]
    jobs: dict[uuid.UUID, Ended]
    tries: list[Try]
    versions: list[Version]
    checkpoints: list[Stored]
    objects: dict[str, str | None]
    """Every key under `a/`; the sha256 of those that were published."""
    held: list[str]
    """Allocations, slots and leases that nothing gave back."""
    processes: dict[str, list[int]]
    """Attempt and the processes that still carry its mark."""
    logs: dict[str, str]
    """Program and what it wrote."""
    scheduling: list[str] = field(default_factory=list)
    """What Postgres' own record says against the scheduler: see `_scheduling`."""
    killed: dict[uuid.UUID, float] = field(default_factory=dict)
    """Attempts of which a process was killed, and when."""

    def detections(self) -> list[float]:
        """Seconds from each kill to the end of the attempt that it cost; one that was done anyway is none."""
        return [
            each.ended_at - self.killed[each.id]
            for each in self.tries
            if each.id in self.killed and each.ended_at is not None and each.state in ("lost", "failed")
        ]


def collect(fleet: Fleet, told: list[Told]) -> History:
    """The evidence, once everything has come to rest."""
    objects = dict.fromkeys(fleet.storage.keys("a/"))
    with fleet.look() as session:
        versions = [
            Version(row.job_id, row.attempt_id, {f"{row.object_prefix}/{f['name']}": f["sha256"] for f in row.files})
            for row in session.scalars(select(AdapterVersion))
        ]
        stored = [
            Stored(row.job_id, row.step, frozenset(f"{row.object_prefix}/{file['name']}" for file in row.files))
            for row in session.scalars(select(Checkpoint).where(Checkpoint.deleted_at.is_(None)))
        ]
        jobs = {job.id: _ended(session, job) for job in session.scalars(select(Job))}
        steps = _steps(session)
        attempts = list(session.scalars(select(Attempt).order_by(Attempt.job_id, Attempt.no)))
    for version in versions:
        for key in version.files:
            objects[key] = _sha256(fleet, key) if key in objects else None
    tries = [
        Try(
            row.id,
            row.job_id,
            row.no,
            row.fence,
            row.state,
            row.start_step,
            f"{row.failure_code or ''} {row.failure_message or ''}",
            steps.get((row.job_id, row.no), ()),
            _log(fleet, row.project_id, row.id),
            row.ended_at.timestamp() if row.ended_at else None,
        )
        for row in attempts
    ]
    return History(
        told,
        jobs,
        tries,
        versions,
        stored,
        objects,
        _held(fleet),
        {str(row.id): pids for row in attempts if (pids := processes.marked(str(row.id)))},
        {str(path): path.read_text(errors="replace") for path in fleet.home.rglob("*.log")},
        _scheduling(fleet),
    )


def violations(history: History) -> list[str]:
    """All of them; an empty list is what every test of chaos wants."""
    found: list[str] = []
    checks = _jobs, _fences, _versions, _objects, _curves, _events, _clients, _devices, _rest, _secrets, _detected
    for check in checks:
        found += check(history)
    return found


# ---- the checks --------------------------------------------------------------------------------------------------


def _jobs(history: History) -> Iterator[str]:
    cancelled = {ids.decode(ids.JOB, told.job_id) for told in history.told if told.cancelled}
    bad = {ids.decode(ids.JOB, told.job_id) for told in history.told if told.bad} - cancelled
    known = {ids.decode(ids.JOB, told.job_id) for told in history.told}

    def unsound(job: Ended) -> bool:
        return job.error.startswith("invalid_training_file")

    for job in history.jobs.values():
        if job.state not in TERMINAL:
            yield f"job {job.id} has not ended: {job.state}"
        elif job.state == "succeeded":
            if job.id in bad:
                yield f"job {job.id} succeeded with bad rows"
        elif job.id not in cancelled and not (unsound(job) and (job.id in bad or job.id not in known)):
            yield f"job {job.id} ended {job.state} and nobody cancelled it: {job.error}"
    for told in history.told:
        if ids.decode(ids.JOB, told.job_id) not in history.jobs:
            yield f"job {told.job_id} was accepted and is not there"


def _fences(history: History) -> Iterator[str]:
    for job_id, tries in _by_job(history).items():
        fences = [each.fence for each in tries]
        if fences != sorted(set(fences)):
            yield f"fences of job {job_id} do not rise: {fences}"
        if [each.no for each in tries] != list(range(1, len(tries) + 1)):
            yield f"attempts of job {job_id} are not numbered from 1: {[each.no for each in tries]}"
        live = [each.no for each in tries if each.state in LIVE_ATTEMPT]
        if live:
            yield f"attempts {live} of job {job_id} never ended"


def _versions(history: History) -> Iterator[str]:
    of_job: dict[uuid.UUID, list[Version]] = defaultdict(list)
    for version in history.versions:
        of_job[version.job_id].append(version)
    for job in history.jobs.values():
        published, wanted = len(of_job[job.id]), int(job.state == "succeeded")
        if published != wanted:
            yield f"job {job.id} ({job.state}) has {published} versions, not {wanted}"
    winners = {each.id for each in history.tries if each.state == "succeeded"}
    for version in history.versions:
        if version.attempt_id not in winners:
            yield f"the version of job {version.job_id} comes from an attempt that did not succeed"


def _objects(history: History) -> Iterator[str]:
    for version in history.versions:
        for key, sha256 in version.files.items():
            if history.objects.get(key) != sha256:
                yield f"published object {key} is {'damaged' if history.objects.get(key) else 'missing'}"
    for checkpoint in history.checkpoints:
        if missing := checkpoint.keys - history.objects.keys():
            yield f"checkpoint {checkpoint.step} of job {checkpoint.job_id} lacks {sorted(missing)}"


def _curves(history: History) -> Iterator[str]:
    """A resumed run shows one curve: each attempt begins behind a checkpoint, and together they leave no gap."""
    for job_id, tries in _by_job(history).items():
        job = history.jobs[job_id]
        stored = {0} | {each.step for each in history.checkpoints if each.job_id == job_id}
        ran = [each for each in tries if each.steps]
        for each in ran:
            if each.steps[0] != each.start_step + 1:
                yield f"attempt {each.no} of job {job_id} starts at {each.steps[0]}, not behind {each.start_step}"
            if each.start_step not in stored:
                yield f"attempt {each.no} of job {job_id} starts from {each.start_step}, which was never stored"
        if job.state == "succeeded":
            seen = set().union(*(each.steps for each in tries))
            if gaps := sorted(set(range(1, job.total_steps + 1)) - seen):
                yield f"steps {gaps[:10]} of job {job_id} have no loss"


def _events(history: History) -> Iterator[str]:
    for job in history.jobs.values():
        if list(job.event_seqs) != list(range(1, len(job.event_seqs) + 1)):
            yield f"events of job {job.id} have gaps or repeats"
        if job.state in TERMINAL and job.terminal_events != 1:
            yield f"job {job.id} has {job.terminal_events} terminal events"


def _clients(history: History) -> Iterator[str]:
    for told in history.told:
        over = [at for at, status in enumerate(told.statuses) if status in ("succeeded", "failed")]
        if over and over[0] != len(told.statuses) - 1:
            yield f"job {told.job_id} changed after its end: {told.statuses}"


def _devices(history: History) -> Iterator[str]:
    for each in history.tries:
        if witness.VIOLATION in each.log or witness.VIOLATION in each.failure:
            yield f"attempt {each.no} of job {each.job_id} found another trainer on its device"


def _rest(history: History) -> Iterator[str]:
    yield from history.held
    yield from history.scheduling
    for attempt, pids in history.processes.items():
        yield f"processes {pids} of attempt {attempt} are still there"


def _secrets(history: History) -> Iterator[str]:
    texts = history.logs | {f"trainer log of {each.id}": each.log for each in history.tries}
    for name, written in texts.items():
        if found := SECRET.search(written):
            yield f"{name} holds a secret: {found[0][:12]}..."


# ---- the evidence --------------------------------------------------------------------------------------------------


def _detected(history: History) -> Iterator[str]:
    if late := [each for each in history.detections() if each > DETECTION_S]:
        yield f"{len(late)} deaths were noticed after more than {DETECTION_S} s, the last after {max(late):.0f} s"


def _by_job(history: History) -> dict[uuid.UUID, list[Try]]:
    found: dict[uuid.UUID, list[Try]] = defaultdict(list)
    for each in sorted(history.tries, key=lambda each: each.no):
        found[each.job_id].append(each)
    return found


def _ended(session: Any, job: Job) -> Ended:
    rows = session.execute(
        text("SELECT seq, data->>'kind' = 'state' AS told FROM events WHERE job_id = :job ORDER BY seq"),
        {"job": job.id},
    ).all()
    training = (job.recipe or {}).get("training", {})
    return Ended(
        job.id,
        job.state,
        f"{job.error_code} {job.error_message}",
        training.get("max_steps") or 0,
        tuple(row.seq for row in rows),
        sum(bool(row.told) for row in rows),
    )


def _steps(session: Any) -> dict[tuple[uuid.UUID, int], tuple[int, ...]]:
    rows = session.execute(
        text(
            "SELECT m.job_id, c.attempt_no, array_agg(DISTINCT s ORDER BY s) AS steps FROM metric_chunks c "
            "JOIN metric_series m ON m.id = c.series_id, unnest(c.steps) s WHERE m.name = 'train/loss' GROUP BY 1, 2"
        )
    )
    return {(row.job_id, row.attempt_no): tuple(row.steps) for row in rows}


def _held(fleet: Fleet) -> list[str]:
    queries = {
        "allocation": "SELECT id FROM allocations WHERE released_at IS NULL",
        "reservation": "SELECT id FROM gpus WHERE reserved_bytes > 0",
        "slot": "SELECT node_id FROM slots WHERE attempt_id IS NOT NULL",
        "task": "SELECT id FROM tasks WHERE state IN ('queued', 'leased')",
    }
    with fleet.look() as session:
        return [
            f"{what} {row[0]} is still held" for what, query in queries.items() for row in session.execute(text(query))
        ]


RECORD = {
    "exclusive allocations of one device overlap": """
        SELECT a.gpu_id FROM allocations a JOIN allocations b ON a.gpu_id = b.gpu_id AND a.id < b.id
        WHERE (a.exclusive OR b.exclusive)
          AND tstzrange(a.created_at, a.released_at) && tstzrange(b.created_at, b.released_at)""",
    "an attempt has not the devices its job asked for, on its own node": """
        SELECT t.id FROM attempts t JOIN jobs j ON j.id = t.job_id
          LEFT JOIN allocations a ON a.owner_attempt = t.id
          LEFT JOIN gpus g ON g.id = a.gpu_id AND g.node_id = t.node_id
        GROUP BY t.id, j.gpus HAVING count(g.id) <> j.gpus""",
    "a project had more than its cap": """
        SELECT p.id FROM projects p JOIN jobs j ON j.project_id = p.id JOIN attempts t ON t.job_id = j.id
          CROSS JOIN LATERAL (
            SELECT sum(o.rate) AS rate FROM attempts o JOIN jobs k ON k.id = o.job_id
            WHERE k.project_id = p.id AND o.assigned_at <= t.assigned_at
              AND coalesce(o.ended_at > t.assigned_at, true) AND EXISTS (
                SELECT FROM allocations a WHERE a.owner_attempt = o.id
                  AND coalesce(a.released_at > t.assigned_at, true))) held
        WHERE p.cap IS NOT NULL AND held.rate > p.cap + 1e-6""",
    "a job was moved off more often than it may be": """
        SELECT job_id FROM attempts WHERE preempted_at IS NOT NULL GROUP BY job_id HAVING count(*) > 3""",
    "two projects took turns": """
        SELECT a.id FROM attempts a JOIN attempts b ON a.project_id = b.preempted_for_project
          AND b.project_id = a.preempted_for_project AND a.id < b.id
        WHERE a.preempted_for_project <> a.project_id""",
    "an attempt's time does not add up": """
        SELECT attempt_id FROM usage
        WHERE abs(gpu_seconds - loading_s - productive_s - user_fault_s - platform_fault_s) > 1e-3""",
    "a device's time was counted twice": """
        SELECT attempt_id FROM usage GROUP BY attempt_id, gpu_id HAVING count(*) > 1""",
    "GPUs are kept for a job that has ended": """
        SELECT h.job_id FROM holds h JOIN jobs j ON j.id = h.job_id
        WHERE j.finished_at < now() - interval '10 seconds'""",
}


def _scheduling(fleet: Fleet) -> list[str]:
    with fleet.look() as session:
        return [f"{what}: {row[0]}" for what, query in RECORD.items() for row in session.execute(text(query))]


def _log(fleet: Fleet, project_id: uuid.UUID, attempt_id: uuid.UUID) -> str:
    keys = sorted(fleet.storage.keys(attempt_logs.chunk_prefix(project_id, attempt_id)))
    return b"".join(fleet.storage.get_bytes(key) or b"" for key in keys).decode(errors="replace")


def _sha256(fleet: Fleet, key: str) -> str:
    return hashlib.sha256(fleet.storage.get_bytes(key) or b"").hexdigest()
