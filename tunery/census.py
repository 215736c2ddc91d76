"""Numbers for operators: of all projects together, never of one."""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field

from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery.states import POLICY, TERMINAL, FailureCode, JobState

_METHOD = "coalesce(recipe ->> 'method', 'supervised')"
_OPEN = "state NOT IN ({})".format(", ".join(f"'{state}'" for state in sorted(TERMINAL)))


@dataclass(frozen=True)
class Worker:
    name: str
    state: str
    age_s: float
    gpu_model: str


@dataclass(frozen=True)
class Census:
    """What is there now. Ages in seconds, 0 where nothing waits."""

    jobs: dict[tuple[str, str], int]
    """By state and method; every state that is not an end has its number, also 0."""
    oldest_wait_s: float
    workers: list[Worker]
    outbox_messages: int
    outbox_age_s: float
    led: bool


@dataclass(frozen=True)
class Ended:
    outcome: str
    method: str
    duration_s: float
    code: str | None = None
    fault: str = field(default="")


def take(session: Session) -> Census:
    """A handful of short queries, each over an index of what is open."""
    jobs = {(state.value, "supervised"): 0 for state in JobState if state not in TERMINAL}
    oldest = 0.0
    query = (
        f"SELECT state, {_METHOD} AS method, count(*) AS number, "
        f"extract(epoch FROM now() - min(queued_at)) AS age FROM jobs WHERE {_OPEN} GROUP BY 1, 2"
    )
    for row in session.execute(text(query)):
        jobs[row.state, row.method] = row.number
        oldest = max(oldest, float(row.age)) if row.state == JobState.QUEUED else oldest
    models = "SELECT string_agg(DISTINCT name, ', ') FROM gpus WHERE node_id = n.id AND state <> 'absent'"
    nodes = f"SELECT name, state, extract(epoch FROM now() - last_seen_at) AS age, ({models}) AS models FROM nodes n"
    workers = [Worker(row.name, row.state, float(row.age), row.models or "") for row in session.execute(text(nodes))]
    waiting = (
        "SELECT count(*), coalesce(extract(epoch FROM now() - min(created_at)), 0) FROM outbox "
        "WHERE published_at IS NULL"
    )
    messages, age = session.execute(text(waiting)).one()
    led = bool(session.scalar(text("SELECT expires_at > now() FROM leader")))
    return Census(jobs, oldest, sorted(workers, key=lambda one: one.name), messages, float(age), led)


def stored_bytes(session: Session) -> dict[str, int]:
    """What lies in the object store, by kind. It adds up whole tables: ask seldom."""
    return {row.kind: int(row.bytes) for row in session.execute(text("SELECT kind, bytes FROM stored_bytes()"))}


def ended(session: Session, job_id: uuid.UUID) -> Ended | None:
    """How a job ended, for the counters."""
    query = (
        f"SELECT state, {_METHOD} AS method, error_code, extract(epoch FROM finished_at - created_at) AS seconds "
        "FROM jobs WHERE id = :id AND finished_at IS NOT NULL"
    )
    row = session.execute(text(query), {"id": job_id}).one_or_none()
    if row is None:
        return None
    fault = POLICY[FailureCode(row.error_code)].fault.value if row.error_code else ""
    return Ended(row.state, row.method, float(row.seconds), row.error_code, fault)


def queue_waits_s(session: Session, attempt_ids: Sequence[uuid.UUID]) -> list[float]:
    """From submission to assignment, of those that are their jobs' first."""
    query = (
        "SELECT extract(epoch FROM a.assigned_at - j.queued_at)::float8 FROM attempts a JOIN jobs j ON j.id = a.job_id "
        "WHERE a.id = ANY(:ids) AND a.no = 1"
    )
    return list(session.scalars(text(query), {"ids": list(attempt_ids)}))
