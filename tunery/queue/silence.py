"""What the reconciler looks for: leases that ran out, attempts nobody took or that nobody will free."""

import uuid
from datetime import timedelta

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from tunery.models import Allocation, Attempt, Job, Leader, Node, Project, Task
from tunery.queue.leadership import assert_leader
from tunery.states import LEASED_ATTEMPT, LIVE_ATTEMPT, TERMINAL, AttemptState, JobState


def live_attempts(session: Session) -> list[uuid.UUID]:
    """Every attempt that has not ended."""
    return list(session.scalars(select(Attempt.id).where(Attempt.state.in_(LIVE_ATTEMPT))))


def forgive_outage(session: Session, epoch: int, longer_than_s: float, lease_s: float) -> bool:
    """Time in which no scheduler looked counts against no lease: after such a gap every clock starts anew."""
    assert_leader(session, epoch)
    gap = select(Leader.swept_at < func.now() - timedelta(seconds=longer_than_s)).where(Leader.id == 1)
    if forgiven := bool(session.scalar(gap)):
        fresh = func.now() + timedelta(seconds=lease_s)
        held = Attempt.state.in_(LEASED_ATTEMPT)
        session.execute(
            update(Attempt).where(held).values(lease_expires_at=func.greatest(Attempt.lease_expires_at, fresh))
        )
        session.execute(
            update(Task)
            .where(Task.state == "leased")
            .values(lease_expires_at=func.greatest(Task.lease_expires_at, fresh))
        )
    session.execute(update(Leader).where(Leader.id == 1).values(swept_at=func.now()))
    return forgiven


def expired_attempts(session: Session, grace_s: float) -> list[uuid.UUID]:
    late = Attempt.lease_expires_at < func.now() - timedelta(seconds=grace_s)
    return list(session.scalars(select(Attempt.id).where(Attempt.state.in_(LEASED_ATTEMPT), late)))


def unclaimed_attempts(session: Session, after_s: float) -> list[uuid.UUID]:
    late = Attempt.assigned_at < func.now() - timedelta(seconds=after_s)
    return list(session.scalars(select(Attempt.id).where(Attempt.state == AttemptState.ASSIGNED, late)))


def overdue_attempts(session: Session) -> list[uuid.UUID]:
    """Attempts that have held their GPUs for longer than they may, and were not asked to stop yet."""
    over = Attempt.assigned_at + func.make_interval(0, 0, 0, 0, 0, 0, Attempt.limit_s) < func.now()
    going_on = Attempt.state.in_((AttemptState.CLAIMED, AttemptState.RUNNING))
    return list(session.scalars(select(Attempt.id).where(going_on, Attempt.stop_reason.is_(None), over)))


def archived_jobs(session: Session) -> list[tuple[uuid.UUID, uuid.UUID]]:
    """Project and job of whatever still goes on, and has not been asked to end, in a project that was archived."""
    going_on = Job.state.not_in((*TERMINAL, JobState.CANCELLING))
    query = select(Job.project_id, Job.id).join(Project, Project.id == Job.project_id)
    return [(row.project_id, row.id) for row in session.execute(query.where(Project.status == "archived", going_on))]


def stranded_attempts(session: Session, silent_s: float) -> list[uuid.UUID]:
    """Ended attempts whose GPUs nobody freed, on nodes silent for so long that no trainer of theirs can still run."""
    query = (
        select(Attempt.id)
        .join(Allocation, Allocation.owner_attempt == Attempt.id)
        .join(Node, Node.id == Attempt.node_id)
        .where(Attempt.state.not_in(LIVE_ATTEMPT), Allocation.released_at.is_(None))
        .where(Node.last_seen_at < func.now() - timedelta(seconds=silent_s))
    )
    return list(session.scalars(query.distinct()))
