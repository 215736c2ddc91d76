"""Room for one job by moving others off at a checkpoint: whose, on which node, and by which right.

The rules keep it from going round in circles: a victim's tenant must be better off than the beneficiary's both before
and after, two projects never take turns within a window, a job is moved a few times a day at most, and only after it
has run for a while. What is freed is kept for the beneficiary until it starts.
"""

import uuid
from collections import defaultdict

from scheduler.policy.parts import EPSILON, Node, Party, Place
from scheduler.policy.world import World
from tunery.contracts.scheduling import Hold, HoldKind, JobView, Preempt, PreemptKind, RunningView

Found = tuple[PreemptKind, Node, list[RunningView], int]
"""By which right, where, who, and the mask of the devices."""


class Room:
    """Looks for victims. Remembers what this pass has asked for already."""

    def __init__(self, world: World) -> None:
        self._world = world
        settings, now = world.snapshot.settings, world.snapshot.now
        self._lost: dict[uuid.UUID, float] = defaultdict(float)
        """Rate that this pass takes away, by project and by organization."""
        self._asked: set[uuid.UUID] = set()
        since = now - settings.window_s
        self._pairs = {(one.beneficiary, one.victim) for one in world.snapshot.preemptions if one.at > since}
        self._by_node: dict[uuid.UUID, list[tuple[int, RunningView]]] = defaultdict(list)
        """Mask of the devices, and who holds them."""
        self._movable: set[uuid.UUID] = set()
        self._nodes_of: dict[uuid.UUID, set[uuid.UUID]] = defaultdict(set)
        """By project: the nodes from which it might be moved off."""
        if settings.preemption:
            for node in world.nodes.values():
                for one in node.occupants:
                    if one.view is not None:
                        self._by_node[node.view.id].append((one.mask, one.view))
                        if self._may_be_moved(one.view):
                            self._movable.add(one.view.attempt_id)
                            self._nodes_of[one.project_id].add(node.view.id)
        self._tenants = [(one, world.projects[one]) for one in sorted(self._nodes_of)]

    def _may_be_moved(self, view: RunningView) -> bool:
        settings, now = self._world.snapshot.settings, self._world.snapshot.now
        least = max(settings.min_runtime_s, 3 * view.overhead_s)
        return (
            view.preemptible
            and not view.ended
            and not view.stopping
            and view.engine_id is None
            and view.preemptions < settings.max_preemptions
            and now - view.started_at >= least
        )

    def find(self, job: JobView) -> Found | None:
        """GPUs of one node for this job, and who is asked to leave them."""
        world = self._world
        cost = world.cost(job)
        if (
            not self._movable
            or (job.engine_key and world.snapshot.settings.engines)
            or not world.within_caps(job, cost)
        ):
            return None
        project, organization = world.parties(job)
        by_right = project.guaranteed(cost) or organization.guaranteed(cost)
        kind = PreemptKind.GUARANTEE if by_right else PreemptKind.FAIR_SHARE
        givers = self._givers(job, cost, kind)
        if not givers:
            return None
        best: tuple[float, ...] | None = None
        chosen: Found | None = None
        near = set().union(*(self._nodes_of[one] for one in givers))
        for node in world.nodes.values():
            if node.view.id not in near or not node.could_run(job):
                continue
            found = self._on(node, job, cost, kind, givers)
            if found is not None:
                victims, mask = found
                key = sum(len(view.gpu_ids) for view in victims), len(victims), sum(map(self._unsaved, victims))
                if best is None or key < best:
                    best, chosen = key, (kind, node, victims, mask)
        return chosen

    def _givers(self, job: JobView, cost: float, kind: PreemptKind) -> set[uuid.UUID]:
        """Projects that could lose something to the job. Most of a balanced cluster's cannot: seen by four numbers."""
        mine, organization = self._world.parties(job)
        found = self._tenants
        if kind is PreemptKind.FAIR_SHARE:
            served, after = mine.service / mine.view.weight, (mine.rate + cost) / mine.view.weight - EPSILON
            found = [
                (id, party)
                for id, party in found
                if party.view.organization_id != organization.view.id
                or (party.rate >= after * party.view.weight and party.service > served * party.view.weight)
            ]
        return {id for id, party in found if self._may_give(job, cost, kind, party, 0.0, {})}

    def _on(
        self, node: Node, job: JobView, cost: float, kind: PreemptKind, givers: set[uuid.UUID]
    ) -> tuple[list[RunningView], int] | None:
        here = self._by_node[node.view.id]
        candidates = [
            view for _, view in here if view.project_id in givers and view.attempt_id in self._movable - self._asked
        ]
        if self._free(node, job, candidates).bit_count() < job.gpus:
            return None  # not even if all of them left
        candidates.sort(key=self._rank)
        chosen: list[RunningView] = []
        taken: dict[uuid.UUID, float] = {}
        for view in candidates:
            if self._may_give(job, cost, kind, self._world.projects[view.project_id], view.rate, taken):
                chosen.append(view)
                for tenant in (view.project_id, view.organization_id):
                    taken[tenant] = taken.get(tenant, 0.0) + view.rate
                if self._free(node, job, chosen).bit_count() >= job.gpus:
                    break
        if self._free(node, job, chosen).bit_count() < job.gpus:
            return None
        for view in reversed(chosen[:]):  # whoever turns out not to be needed stays
            fewer = [one for one in chosen if one is not view]
            if self._free(node, job, fewer).bit_count() >= job.gpus:
                chosen = fewer
        if not chosen:
            return None
        free = self._free(node, job, chosen)
        # those that were empty anyway come first
        ordered = sorted(node.taken(free), key=lambda gpu: (not gpu.bit & node.empty, gpu.bit))
        mask = sum(gpu.bit for gpu in ordered[: job.gpus])
        settings, now = self._world.snapshot.settings, self._world.snapshot.now
        until = now + settings.grace_s + job.limit_s + settings.grace_s
        rate = sum(gpu.view.cost for gpu in node.taken(mask))
        if rate != cost and not self._still_right(job, rate, kind, chosen):
            return None
        place = Place(node.view.id, mask, job.required_bytes, True, rate)
        return (chosen, mask) if self._world.admits(job, place, until) else None

    def _still_right(self, job: JobView, rate: float, kind: PreemptKind, chosen: list[RunningView]) -> bool:
        """Of devices that cost more than the cheapest that could take it."""
        project, organization = self._world.parties(job)
        if kind is PreemptKind.GUARANTEE and not (project.guaranteed(rate) or organization.guaranteed(rate)):
            return False
        taken: dict[uuid.UUID, float] = defaultdict(float)
        for view in chosen:
            taken[view.project_id] += view.rate
            taken[view.organization_id] += view.rate
        return self._world.within_caps(job, rate) and all(
            self._may_give(job, rate, kind, self._world.projects[view.project_id], 0.0, taken) for view in chosen
        )

    def _free(self, node: Node, job: JobView, leaving: list[RunningView]) -> int:
        """Devices of the node, of one class, that suit the job once these have left."""
        gone = {view.attempt_id for view in leaving}
        used = node.foreign | node.kept
        for one in node.occupants:
            if one.view is None or one.view.attempt_id not in gone:
                used |= one.mask
        free = node.suitable(job) & ~used
        return max((free & mask for _, mask in node.classes.values()), key=int.bit_count, default=0)

    def _may_give(
        self,
        job: JobView,
        cost: float,
        kind: PreemptKind,
        victim: Party,
        rate: float,
        taken: dict[uuid.UUID, float],
    ) -> bool:
        """Whether this project may lose `rate` to the job, beside what it loses already."""
        world, view = self._world, victim.view
        if view.id == job.project_id or (view.id, job.project_id) in self._pairs:
            return False
        theirs = world.organizations[view.organization_id]
        project, organization = world.parties(job)
        left = victim.rate - self._lost[view.id] - taken.get(view.id, 0.0) - rate
        left_of_all = theirs.rate - self._lost[theirs.view.id] - taken.get(theirs.view.id, 0.0) - rate
        elsewhere = view.organization_id != job.organization_id
        if left < victim.view.guarantee - EPSILON or (elsewhere and left_of_all < theirs.view.guarantee - EPSILON):
            return False
        if kind is PreemptKind.GUARANTEE:
            return elsewhere or project.guaranteed(cost)
        mine, other, other_left = (organization, theirs, left_of_all) if elsewhere else (project, victim, left)
        fairer = (mine.rate + cost) / mine.view.weight <= other_left / other.view.weight + EPSILON
        return fairer and mine.service / mine.view.weight < other.service / other.view.weight

    def _rank(self, view: RunningView) -> tuple[object, ...]:
        """Who goes first: low priority, a tenant that has had much, little to lose, not long at it."""
        tau_s = self._world.snapshot.settings.tau_s
        score = self._world.projects[view.project_id].score(tau_s)
        return view.priority, -score, self._unsaved(view), -view.started_at, view.attempt_id

    def _unsaved(self, view: RunningView) -> float:
        """GPU-seconds of work behind its newest checkpoint."""
        since = view.checkpoint_at if view.checkpoint_at is not None else view.started_at
        return max(0.0, self._world.snapshot.now - since) * len(view.gpu_ids)

    def take(
        self, job: JobView, kind: PreemptKind, node: Node, victims: list[RunningView], mask: int
    ) -> tuple[Hold, list[Preempt]]:
        """Ask them to leave."""
        by = self._world.snapshot.now + self._world.snapshot.settings.grace_s
        for view in victims:
            self._asked.add(view.attempt_id)
            self._pairs.add((job.project_id, view.project_id))
            for tenant in (view.project_id, view.organization_id):
                self._lost[tenant] += view.rate
        taken = node.taken(mask)
        ids = tuple(gpu.view.id for gpu in taken)
        hold = Hold(job.id, HoldKind.PREEMPTION, taken[0].view.gpu_class, node.view.id, ids, by)
        return hold, [Preempt(view.attempt_id, view.job_id, job.id, kind) for view in victims]
