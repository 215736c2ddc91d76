"""Objects that no row refers to: what crashes between storing and recording leave behind.

Keys are minted by us, so a key says whose it is. Whatever does not look like one of ours, or belongs to a project that
this database does not know, is left alone: a bucket may hold more than our objects.
"""

import uuid
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sqlalchemy import select
from sqlalchemy.orm import Session

from tunery.models import AdapterVersion, Attempt, BaseModel, Checkpoint, Dataset, File, Project, Task
from tunery.states import LIVE_ATTEMPT

_OPEN_TASK = ("queued", "leased")


@dataclass(frozen=True)
class Place:
    """What a key says: kind, and the file, attempt, task or base model that it belongs to."""

    key: str
    kind: str
    project_id: uuid.UUID | None
    owner: uuid.UUID


def unreferenced(session: Session, keys: Iterable[str]) -> list[str]:
    """Of these keys, those whose objects nobody needs and nobody may still be about to record."""
    places = [place for key in keys if (place := _place(key)) is not None]
    known = set(session.scalars(select(Project.id).where(Project.id.in_({place.project_id for place in places}))))
    by_kind: dict[str, list[Place]] = defaultdict(list)
    for place in places:
        if place.project_id is None or place.project_id in known:
            by_kind[place.kind].append(place)
    lost: list[str] = []
    for kind, found in by_kind.items():
        needed = _NEEDED[kind](session, found)
        lost += [place.key for place in found if place.key not in needed]
    return lost


def _place(key: str) -> Place | None:
    """None for what is not one of ours."""
    parts = key.split("/")
    try:
        match parts:
            case ["u", project, file]:
                return Place(key, "file", uuid.UUID(project), uuid.UUID(file))
            case ["a", "base", base, _, _, *_]:
                return Place(key, "base", None, uuid.UUID(base))
            case ["a", project, owner, ("checkpoints" | "output" | "logs" | "datasets") as kind, _, *_]:
                return Place(key, kind, uuid.UUID(project), uuid.UUID(owner))
    except ValueError:
        pass
    return None


def _files(session: Session, places: Sequence[Place]) -> set[str]:
    mine = File.object_key.in_([place.key for place in places])
    return set(session.scalars(select(File.object_key).where(mine, File.deleted_at.is_(None))))


def _datasets(session: Session, places: Sequence[Place]) -> set[str]:
    """Open tasks are asked for first: one that ends in between has recorded what it has to record."""
    owners = {place.owner for place in places}
    busy = set(session.scalars(select(Task.id).where(Task.id.in_(owners), Task.state.in_(_OPEN_TASK))))
    recorded = set(
        session.scalars(select(Dataset.object_key).where(Dataset.object_key.in_([place.key for place in places])))
    )
    return recorded | {place.key for place in places if place.owner in busy}


def _logs(session: Session, places: Sequence[Place]) -> set[str]:
    owners = {place.owner for place in places}
    kept = set(session.scalars(select(Attempt.id).where(Attempt.id.in_(owners), Attempt.logs_deleted_at.is_(None))))
    return {place.key for place in places if place.owner in kept}


def _results(session: Session, places: Sequence[Place]) -> set[str]:
    """Of checkpoints and outputs: all of a live attempt's, and whatever a row names. Live ones are asked for first: an
    attempt that ends in between has recorded what it has to record."""
    owners = {place.owner for place in places}
    live = set(session.scalars(select(Attempt.id).where(Attempt.id.in_(owners), Attempt.state.in_(LIVE_ATTEMPT))))
    needed = {place.key for place in places if place.owner in live}
    for table in (Checkpoint, AdapterVersion):
        query = select(table.object_prefix, table.files).where(table.attempt_id.in_(owners), table.deleted_at.is_(None))
        for row in session.execute(query):
            needed |= {f"{row.object_prefix}/{file['name']}" for file in row.files}
    return needed


def _bases(session: Session, places: Sequence[Place]) -> set[str]:
    """One that is being imported keeps everything; one that this database has never heard of is not ours."""
    owners = {place.owner for place in places}
    query = select(BaseModel.id, BaseModel.state, BaseModel.object_prefix).where(BaseModel.id.in_(owners))
    models = {row.id: row for row in session.execute(query)}

    def needed(place: Place) -> bool:
        model = models.get(place.owner)
        return model is None or model.state == "importing" or place.key.startswith(f"{model.object_prefix}/")

    return {place.key for place in places if needed(place)}


_NEEDED = {
    "file": _files,
    "datasets": _datasets,
    "logs": _logs,
    "checkpoints": _results,
    "output": _results,
    "base": _bases,
}
