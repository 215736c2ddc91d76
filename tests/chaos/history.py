"""What must be true of a deployment's history, whatever happened to it. Each violation is one sentence.

The evidence: what clients were told (`Told`), the rows of Postgres, the listing of the object store, the process
table, and the device witnesses' lines in the trainers' logs. The checks are functions of that evidence alone, so that
false histories can be shown to them.
"""

import hashlib
import re
import uuid
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from sqlalchemy import select, text

from tests.chaos import record, witness
from tests.chaos.evidence import Blocked, Books, Ended, History, Hurt, Stored, Told, Try, Version
from tests.fleet import Fleet
from tunery import attempt_logs, ids
from tunery.models import AdapterVersion, Attempt, Checkpoint, Job, Node
from tunery.states import LIVE_ATTEMPT, TERMINAL
from worker import processes

OPEN_JOBS = select(Job.id, Job.state).where(Job.state.not_in(sorted(TERMINAL)))
_TIME_TO_LOOK_S = 5
"""Many passes of the scheduler, with production clocks too."""
SECRET = re.compile(r"ftk_live_\w{12}_\w{38}|postgresql://[^:/\s]+:[^@\s]+@|redis://[^:/\s]*:[^@\s]+@")
"""An API key, or a URL with its password."""


def collect(
    fleet: Fleet,
    told: list[Told],
    grace_s: float = 0,
    hurt: Sequence[Hurt] = (),
    blocked: Sequence[Blocked] = (),
    books: Sequence[Books] = (),
    killed: Mapping[uuid.UUID, float] | None = None,
    lease_s: float = 45,
) -> History:
    """The evidence, once everything has come to rest. `grace_s` is what who is asked to stop has to do so."""
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
        steps, kept = _steps(session), _kept(session)
        attempts = list(session.scalars(select(Attempt).order_by(Attempt.job_id, Attempt.no)))
        nodes = {row.id: row.name for row in session.execute(select(Node.id, Node.name))}
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
            row.project_id,
            row.assigned_at.timestamp(),
            _asked(row, grace_s),
            kept.get(row.id, 0),
            nodes[row.node_id].removesuffix(f"-{fleet.database}"),
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
        record.against(fleet),
        killed=dict(killed or {}),
        hurt=hurt,
        blocked=blocked,
        books=books,
        detection_s=detection_s(lease_s),
    )


def detection_s(lease_s: float) -> float:
    """The time to notice a death: two leases, and no less than an overloaded machine may take for anything."""
    return max(2 * lease_s, 45)


def violations(history: History) -> list[str]:
    """All of them; an empty list is what every test of chaos wants."""
    found: list[str] = []
    for check in CHECKS:
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


def _detected(history: History) -> Iterator[str]:
    most = history.detection_s
    if late := [each for each in history.detections() if each > most]:
        yield f"{len(late)} deaths were noticed after more than {most:.0f} s, the last after {max(late):.0f} s"


def _budgets(history: History) -> Iterator[str]:
    """A budget that is used up starts nothing and says so; what is used is the sum of the ledger."""
    for window in history.blocked:
        for each in history.tries:
            if each.project_id == window.project_id and window.since < each.began < window.until:
                yield f"attempt {each.no} of job {each.job_id} began while its project's budget was used up"
    for window in judged_windows(history):
        for job_id, code in window.said.items():
            if code != "blocked":
                yield f"job {job_id} waits for its project's budget and says {code}"
    for book in history.books:
        if abs(book.told - book.charged) > 1e-2:
            yield f"project {book.project_id} is told of {book.told} GPU-seconds and was charged {book.charged}"


def _stops(history: History) -> Iterator[str]:
    """Who is asked to stop by a budget or a drain saves its last step; only a trainer that does not go is killed."""
    for each in judged_stops(history):
        if each.kept < each.steps[-1]:
            yield (
                f"attempt {each.no} of job {each.job_id} was asked to stop at a checkpoint: its last is of step "
                f"{each.kept}, and it had come to {each.steps[-1]}"
            )


def judged_stops(history: History) -> list[Try]:
    """Those that were asked to stop, had come to a step, went in their grace, and that no fault touched meanwhile."""

    def went_in_order(each: Try) -> bool:
        if each.asked is None or each.state != "preempted" or not each.steps or each.ended_at is None:
            return False
        (at, by), over = each.asked, each.ended_at
        return over < by and not any(one.touches(each) for one in _meanwhile(history, at, over))

    return [each for each in history.tries if went_in_order(each)]


def judged_windows(history: History) -> list[Blocked]:
    """Times of used-up budgets at whose end the scheduler had had time to say of every job why it waits."""

    def looked_at(window: Blocked) -> bool:
        since = max(window.since, window.until - _TIME_TO_LOOK_S)
        return not any(one.touches_the_queue() for one in _meanwhile(history, since, window.until))

    return [window for window in history.blocked if window.until - window.since > 2 and looked_at(window)]


def _meanwhile(history: History, since: float, until: float) -> list[Hurt]:
    return [each for each in history.hurt if each.since < until and since < each.until]


CHECKS = (
    _jobs, _fences, _versions, _objects, _curves, _events, _clients, _devices, _rest, _secrets, _detected, _budgets,
    _stops,
)  # fmt: skip


# ---- the evidence --------------------------------------------------------------------------------------------------


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


def _kept(session: Any) -> dict[uuid.UUID, int]:
    rows = session.execute(text("SELECT attempt_id, max(step) AS step FROM checkpoints GROUP BY 1"))
    return {row.attempt_id: row.step for row in rows}


def _asked(attempt: Attempt, grace_s: float) -> tuple[float, float] | None:
    """By a budget or a drain. What makes room for another job has a rule of its own."""
    if attempt.stop_reason != "preempt" or attempt.preempted_at is not None or attempt.stop_by is None:
        return None
    return attempt.stop_by.timestamp() - grace_s, attempt.stop_by.timestamp()


def _held(fleet: Fleet) -> list[str]:
    queries = {
        "allocation": "SELECT id FROM allocations WHERE released_at IS NULL",
        "reservation": "SELECT id FROM gpus WHERE reserved_bytes > 0",
        "slot": "SELECT node_id FROM slots WHERE attempt_id IS NOT NULL",
        "task": "SELECT id FROM tasks WHERE state IN ('queued', 'leased')",
        "part of a budget of job": "SELECT h.job_id FROM usage_holds h JOIN jobs j ON j.id = h.job_id "
        "WHERE j.finished_at IS NOT NULL",
    }
    with fleet.look() as session:
        return [
            f"{what} {row[0]} is still held" for what, query in queries.items() for row in session.execute(text(query))
        ]


def _log(fleet: Fleet, project_id: uuid.UUID, attempt_id: uuid.UUID) -> str:
    keys = sorted(fleet.storage.keys(attempt_logs.chunk_prefix(project_id, attempt_id)))
    return b"".join(fleet.storage.get_bytes(key) or b"" for key in keys).decode(errors="replace")


def _sha256(fleet: Fleet, key: str) -> str:
    return hashlib.sha256(fleet.storage.get_bytes(key) or b"").hexdigest()
