"""Why each job waits, looked at when the pass is over: the first of these sentences that is true of it."""

import math
import uuid
from collections import Counter

from scheduler.policy.parts import Kind, Party, suits
from scheduler.policy.world import World
from tunery.contracts.scheduling import (
    Explanation,
    Hold,
    HoldKind,
    JobView,
    NodeView,
    Reason,
    Wait,
    WaitCode,
    shape,
)

MINUTE_S = 60


def all_that_wait(
    world: World, started: set[int], holds: dict[uuid.UUID, Hold]
) -> tuple[tuple[Explanation, ...], tuple[Wait, ...]]:
    """One explanation for each project and shape, and one for each single job that GPUs are kept for."""
    told = _Explainer(world)
    explanations: list[Explanation] = []
    names: dict[Kind, str] = {}
    gone = started | {job_id.int for job_id in holds}
    for project_id in sorted(world.queues):
        seen = {
            names.get(kind)
            or names.setdefault(kind, shape(job, world.sizes, engines=world.snapshot.settings.engines)): job
            for kind, job in _longest(world, project_id, gone).items()
        }
        explanations += [Explanation(project_id, name, told.reason(job, name)) for name, job in sorted(seen.items())]
    return tuple(explanations), tuple(Wait(job_id, _held(hold)) for job_id, hold in sorted(holds.items()))


def _longest(world: World, project_id: uuid.UUID, gone: set[int]) -> dict[Kind, JobView]:
    """Of one kind, the job with the longest limit has the fewest places: what keeps it out is told."""
    found = world.longest[project_id]
    if all(job.id.int not in gone for job in found.values()):
        return found
    found = {}
    for job, kind in zip(world.queues[project_id], world.kinds[project_id], strict=True):
        if job.id.int not in gone and (kind not in found or job.limit_s > found[kind].limit_s):
            found[kind] = job
    return found


def _held(hold: Hold) -> Reason:
    code = WaitCode.PREEMPTING if hold.kind is HoldKind.PREEMPTION else WaitCode.HOLDS
    return Reason(code, (("by", _minute(hold.promised_at)),))


def _minute(at: float) -> int:
    """Up to the next whole minute: a number that changes with every pass would be written with every pass."""
    return math.ceil(at / MINUTE_S) * MINUTE_S


class _Explainer:
    def __init__(self, world: World) -> None:
        self._world = world
        self._never: dict[str, Reason | None] = {}
        self._places: dict[tuple[str, uuid.UUID | None], Reason] = {}
        """What is true of a shape in any project without limits, and in one that has some."""

    def reason(self, job: JobView, name: str) -> Reason:
        world = self._world
        project, organization = world.parties(job)
        if project.view.blocked:
            return Reason(WaitCode.BLOCKED, (("why", project.view.blocked),))
        if name not in self._never:
            self._never[name] = self._static(job)
        if (never := self._never[name]) is not None:
            return never
        most = project.view.max_running
        if most is not None and project.running >= most:
            return Reason(WaitCode.RUNNING_LIMIT, (("running", project.running), ("most", most)))
        if (capped := self._capped(job, project, organization)) is not None:
            return capped
        if world.place(job) is not None:
            return Reason(WaitCode.BEHIND, (("depth", world.snapshot.settings.depth),))
        # when a place is free depends on the limits of whose job it is
        key = name, job.project_id if project.limited or organization.limited else None
        if (found := self._places.get(key)) is None:
            found = self._places[key] = self._dynamic(job)
        return found

    def _capped(self, job: JobView, project: Party, organization: Party) -> Reason | None:
        """By the cheapest devices that could take it, or, where those are busy, by the cheapest that are free."""
        if not (project.limited or organization.limited):
            return None
        needs, counts = self._world.cost(job), self._world.cheapest(job)
        for cost, more in ((needs, ()), (counts, (("counts", round(counts or 0.0, 3)),))):
            for party, code in ((project, WaitCode.PROJECT_CAP), (organization, WaitCode.ORGANIZATION_CAP)):
                if cost is not None and party.capped(cost):
                    numbers = ("used", round(party.rate, 3)), ("cap", party.view.cap), ("needs", round(needs, 3))
                    return Reason(code, (*numbers, *more))
        return None

    def _static(self, job: JobView) -> Reason | None:
        """What will not change by waiting for other jobs."""
        world, nodes = self._world, self._world.snapshot.nodes
        if not nodes:
            return Reason(WaitCode.NO_NODE)
        alike = [node for node in nodes if _is_asked_for(node, job)]
        if not alike:
            wanted = ", ".join(
                [*([job.gpu_class] if job.gpu_class else []), *(f"{k}={v}" for k, v in sorted(job.labels))]
            )
            return Reason(WaitCode.NO_SUCH_PLACE, (("wanted", wanted),))
        large = [node for node in alike if sum(suits(gpu, job) for gpu in node.gpus) >= job.gpus]
        if not large:
            of_class = [gpu for node in alike for gpu in node.gpus if job.gpu_class in (None, gpu.gpu_class)]
            most = max(sum(suits(gpu, job) for gpu in node.gpus) for node in alike)
            largest = max(gpu.usable_bytes for gpu in of_class)
            return Reason(WaitCode.TOO_LARGE, (("largest", largest), ("most", most)))
        if not any(node.id in world.nodes for node in large):
            why = Counter(node.why_not or "away" for node in large)
            told = ", ".join(f"{number} {word}" for word, number in sorted(why.items()))
            return Reason(WaitCode.UNAVAILABLE, (("nodes", len(large)), ("why", told)))
        return None

    def _dynamic(self, job: JobView) -> Reason:
        world = self._world
        able = [node for node in world.nodes.values() if node.could_run(job)]
        if world.fits(job):
            kept = [one for one in world.reservations.values() if one.job.id != job.id]
            until = min((one.at for one in kept), default=world.snapshot.now)
            limit_s = max(0, math.floor(until - world.snapshot.now - world.snapshot.settings.grace_s))
            return Reason(WaitCode.RESERVED, (("until", _minute(until)), ("limit_s", limit_s // MINUTE_S * MINUTE_S)))
        free = [(node.empty & ~node.kept & node.suitable(job)).bit_count() for node in able]
        total = sum(node.suitable(job).bit_count() for node in able)
        numbers: list[tuple[str, float | int | str]] = [("busy", total - sum(free)), ("total", total)]
        if any(number >= job.gpus for number in free):
            return Reason(WaitCode.NO_SLOT, tuple(numbers))
        if (found := world.reservation(job, reserved=False)) is not None:
            numbers.append(("free_at", _minute(found.at)))
        if sum(free) >= job.gpus:
            return Reason(WaitCode.FRAGMENTED, (("free", sum(free)), ("most", max(free)), *numbers))
        return Reason(WaitCode.BUSY, tuple(numbers))


def _is_asked_for(node: NodeView, job: JobView) -> bool:
    return job.labels <= node.labels and any(job.gpu_class in (None, gpu.gpu_class) for gpu in node.gpus)
