"""What projects and organizations may have of the GPUs: weight, guarantee, cap. Rates are GPUs times class cost."""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from tunery import audit, db, ids, wake
from tunery.audit import Actor
from tunery.db import Sessions
from tunery.errors import Conflict, Invalid, NotFound
from tunery.models import Gpu, GpuClass, Node, Organization, Project

_LOCK = 0x7368617265  # one change of a guarantee at a time: two that fit alone must fit together
_EPSILON = 1e-9


@dataclass(frozen=True)
class Known:
    """A project of the deployment, as an admin may see it without opening it."""

    id: uuid.UUID
    name: str
    status: str
    organization_id: uuid.UUID
    organization: str
    guarantee: float


@dataclass(frozen=True)
class Capacity:
    """Rates: what all registered devices would give, and what has been promised of it."""

    total: float
    guaranteed: float


@dataclass(frozen=True)
class ProjectShare:
    project: Project
    organization: Organization


# ---- looking ------------------------------------------------------------------------------------------------


def everybody(session: Session) -> list[Known]:
    """Every project, by organization and name. For admins."""
    rows = session.execute(text("SELECT * FROM deployment_projects()")).mappings()
    return sorted((Known(**row) for row in rows), key=lambda one: (one.organization, one.name))


def find(session: Session, wanted: str) -> Known:
    """By id, by name, or by `organization:name` where two organizations have a project of that name.

    Raises:
        NotFound: there is none.
        Conflict: there are several.
    """
    known = everybody(session)
    found = [
        one for one in known if wanted in (ids.encode(ids.PROJECT, one.id), one.name, f"{one.organization}:{one.name}")
    ]
    if not found:
        raise NotFound(f"No such project: '{wanted[:80]}'", param="project", fix="`tunery project list` shows them.")
    if len(found) > 1:
        names = ", ".join(f"{one.organization}:{one.name}" for one in found)
        raise Conflict(
            f"There are {len(found)} projects of that name: {names}.",
            param="project",
            fix="Name the organization, too.",
        )
    return found[0]


def find_organization(session: Session, wanted: str) -> Known:
    """Any project of it: what belongs to an organization is seen from inside one. Raises NotFound."""
    for one in everybody(session):
        if wanted in (ids.encode(ids.ORGANIZATION, one.organization_id), one.organization):
            return one
    raise NotFound(
        f"No such organization: '{wanted[:80]}'",
        param="organization",
        fix="`tunery project list` shows them beside their projects.",
    )


def of_project(session: Session, project_id: uuid.UUID) -> ProjectShare:
    """In that project's own transaction."""
    project = session.get_one(Project, project_id)
    return ProjectShare(project, session.get_one(Organization, project.organization_id))


def capacity(session: Session) -> Capacity:
    """Of all devices that belong, also those whose node is away: a guarantee outlives a reboot."""
    rate = select(func.coalesce(func.sum(func.coalesce(GpuClass.cost, 1.0)), 0.0)).select_from(Gpu)
    rate = rate.join(Node, Node.id == Gpu.node_id).outerjoin(GpuClass, GpuClass.name == Gpu.gpu_class)
    total = session.scalar(rate.where(Node.removed_at.is_(None), Gpu.state != "absent")) or 0.0
    return Capacity(total, sum(one.guarantee for one in everybody(session) if one.status == "active"))


# ---- changing -----------------------------------------------------------------------------------------------


def change_project(sessions: Sessions, actor: Actor, known: Known, changes: Mapping[str, Any]) -> None:
    """In the project's own transaction: the api sees one project at a time.

    Raises:
        Invalid: a guarantee above the cap, or more guaranteed in all than there are GPUs; with the numbers.
    """
    with db.transaction(partial(db.for_project, sessions, known.id)) as session:
        _one_at_a_time(session)
        project = session.get_one(Project, known.id, with_for_update={"key_share": True})  # type: ignore[arg-type]
        before = {field: getattr(project, field) for field in changes}
        raised = changes.get("guarantee", project.guarantee) > project.guarantee
        _sane(changes, project.guarantee, project.cap)
        if raised:
            _affordable(capacity(session), changes["guarantee"] - project.guarantee)
        _apply(session, actor, project, changes, before, "project.share", f"{known.organization}:{known.name}")


def change_organization(sessions: Sessions, actor: Actor, known: Known, changes: Mapping[str, Any]) -> None:
    """As `change_project`. An organization's guarantee is checked against its cap and the capacity alone.

    Raises:
        Invalid
    """
    with db.transaction(partial(db.for_project, sessions, known.id)) as session:
        _one_at_a_time(session)
        locked: Any = {"key_share": True}
        organization = session.get_one(Organization, known.organization_id, with_for_update=locked)
        before = {field: getattr(organization, field) for field in changes}
        _sane(changes, organization.guarantee, organization.cap)
        wanted = changes.get("guarantee", organization.guarantee)
        if wanted > organization.guarantee:
            _affordable(Capacity(capacity(session).total, organization.guarantee), wanted - organization.guarantee)
        _apply(session, actor, organization, changes, before, "organization.share", known.organization)


def _one_at_a_time(session: Session) -> None:
    session.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})


def _sane(changes: Mapping[str, Any], guarantee: float, cap: float | None) -> None:
    guarantee, cap = changes.get("guarantee", guarantee), changes.get("cap", cap)
    if cap is not None and guarantee > cap:
        raise Invalid(
            f"A guarantee of {guarantee:g} is above the cap of {cap:g}.",
            param="guarantee",
            fix="Lower the guarantee, or raise the cap in the same request.",
        )


def _affordable(there: Capacity, more: float) -> None:
    """A deployment without any device yet promises what it likes: its nodes come later."""
    if there.total and there.guaranteed + more > there.total + _EPSILON:
        raise Invalid(
            f"The cluster has {there.total:g} (GPUs times class cost); {there.guaranteed:g} of it is guaranteed, "
            f"so {more:g} more would be {there.guaranteed + more - there.total:g} too much.",
            param="guarantee",
            fix=f"Guarantee at most {max(there.total - there.guaranteed, 0):g} more, or lower another guarantee first.",
        )


def _apply(
    session: Session,
    actor: Actor,
    row: Project | Organization,
    changes: Mapping[str, Any],
    before: Mapping[str, Any],
    action: str,
    target: str,
) -> None:
    if dict(changes) == dict(before):
        return
    for field, value in changes.items():
        setattr(row, field, value)
    audit.record(session, actor, action, target, before=before, after=changes)
    wake.scheduler(session)
