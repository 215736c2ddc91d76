"""Room for one job by moving others off at a checkpoint: whose, on which node, and by which right.

The rules keep it from going round in circles: a victim's tenant must be better off than the beneficiary's both before
and after, two projects never take turns within a window, a job is moved a few times a day at most, and only after it
has run for a while. What is freed is kept for the beneficiary until it starts.
"""

import math
import uuid
from collections import defaultdict
from dataclasses import dataclass

from scheduler.policy.parts import EPSILON, Node, Occupant, Party, Place
from scheduler.policy.world import World
from tunery.contracts.scheduling import Hold, HoldKind, JobView, Preempt, PreemptKind, RunningView

Found = tuple[PreemptKind, Node, list[RunningView], int]
"""By which right, where, who, and the mask of the devices."""


@dataclass(frozen=True, slots=True)
class _Candidate:
    """Somebody who might be moved off."""

    occupant: Occupant
    view: RunningView
    project: Party
    organization: Party


@dataclass(frozen=True, slots=True)
class _Claim:
    """What a job asks for, by which right, and how well off its tenants would be."""

    job: JobView
    rate: float
    kind: PreemptKind
    project: Party
    organization: Party

    @property
    def by_its_project(self) -> bool:
        return self.project.guaranteed(self.rate)


class _Taken:
    """Rate that choosing these victims takes from each of their tenants."""

    def __init__(self) -> None:
        self._of: dict[int, float] = {}

    def add(self, one: _Candidate) -> None:
        for party in (one.project, one.organization):
            self._of[id(party)] = self.of(party) + one.view.rate

    def of(self, party: Party) -> float:
        return self._of.get(id(party), 0.0) if self._of else 0.0


class Room:
    """Looks for victims. Remembers what this pass has asked for already."""

    def __init__(self, world: World) -> None:
        self._world = world
        settings, now = world.snapshot.settings, world.snapshot.now
        since = now - settings.window_s
        self._pairs = {(one.beneficiary, one.victim) for one in world.snapshot.preemptions if one.at > since}
        self._movable: dict[uuid.UUID, list[_Candidate]] = {}
        """By node: those who might be moved off, and have not been asked to."""
        self._nodes_of: dict[int, list[uuid.UUID]] = defaultdict(list)
        """By project (its `id()`): the nodes from which it might be moved off."""
        self._least: dict[int, float] = {}
        """By project (its `id()`): the smallest rate that it could lose."""
        tenants: dict[uuid.UUID, list[Party]] = {}
        if settings.preemption:
            for node in world.nodes.values():
                found = [
                    _Candidate(one, one.view, world.projects[one.project_id], self._organization(one.view))
                    for one in node.occupants
                    if one.view is not None and self._may_be_moved(one.view)
                ]
                if found:
                    self._movable[node.view.id] = found
                for one in found:
                    self._least[id(one.project)] = min(one.view.rate, self._least.get(id(one.project), math.inf))
                for project in {id(one.project): one.project for one in found}.values():
                    if id(project) not in self._nodes_of:
                        tenants.setdefault(project.view.organization_id, []).append(project)
                    self._nodes_of[id(project)].append(node.view.id)
        self._tenants = [(world.organizations[one], projects) for one, projects in tenants.items()]

    def _organization(self, view: RunningView) -> Party:
        return self._world.organizations[view.organization_id]

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
        claim = _Claim(job, cost, kind, project, organization)
        givers = self._givers(claim)
        near = {node_id for giver in givers for node_id in self._nodes_of[giver]}
        best: tuple[float, ...] | None = None
        chosen: Found | None = None
        for node_id in self._movable if near else ():
            node = world.nodes[node_id]
            if node_id not in near or not node.could_run(job):
                continue
            found = self._on(node, claim, givers)
            if found is not None:
                victims, mask = found
                key = sum(len(view.gpu_ids) for view in victims), len(victims), sum(map(self._unsaved, victims))
                if best is None or key < best:
                    best, chosen = key, (kind, node, victims, mask)
        return chosen

    def _givers(self, claim: _Claim) -> set[int]:
        """Projects, by `id()`, that could lose a job of theirs to this one. In a balanced cluster hardly any could, and
        most are told by their organization alone."""
        found: set[int] = set()
        for organization, projects in self._tenants:
            mine = organization is claim.organization
            if mine or self._organization_may_give(claim, organization, 0.0):
                for project in projects:
                    least = self._least[id(project)]
                    if self._project_may_give(claim, project, least) and (
                        mine or self._organization_may_give(claim, organization, least)
                    ):
                        found.add(id(project))
        return found

    def _on(self, node: Node, claim: _Claim, givers: set[int]) -> tuple[list[RunningView], int] | None:
        job = claim.job
        candidates = [one for one in self._movable[node.view.id] if id(one.project) in givers]
        if self._free(node, job, candidates).bit_count() < job.gpus:
            return None  # not even if all of them left
        candidates.sort(key=self._rank)
        chosen: list[_Candidate] = []
        taken, freed = _Taken(), 0
        # for a fairer share nobody gives up more than the job needs: what breaks a gang up for less is lost on all
        most = job.gpus if claim.kind is PreemptKind.FAIR_SHARE else len(node.gpus)
        for one in candidates:
            if (freed | one.occupant.mask).bit_count() > most:
                continue
            if self._may_give(claim, one, taken, one.view.rate):
                chosen.append(one)
                taken.add(one)
                freed |= one.occupant.mask
                if self._free(node, job, chosen).bit_count() >= job.gpus:
                    break
        else:
            return None
        for one in reversed(chosen[:]):  # whoever turns out not to be needed stays
            fewer = [other for other in chosen if other is not one]
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
        if rate != claim.rate and not self._still_right(claim, rate, chosen):
            return None
        place = Place(node.view.id, mask, job.required_bytes, True, rate)
        return ([one.view for one in chosen], mask) if self._world.admits(job, place, until) else None

    def _still_right(self, claim: _Claim, rate: float, chosen: list[_Candidate]) -> bool:
        """Of devices that cost more than the cheapest that could take it."""
        dearer = _Claim(claim.job, rate, claim.kind, claim.project, claim.organization)
        if claim.kind is PreemptKind.GUARANTEE and not (dearer.by_its_project or claim.organization.guaranteed(rate)):
            return False
        taken = _Taken()
        for one in chosen:
            taken.add(one)
        return self._world.within_caps(claim.job, rate) and all(
            self._may_give(dearer, one, taken, 0.0) for one in chosen
        )

    def _free(self, node: Node, job: JobView, leaving: list[_Candidate]) -> int:
        """Devices of the node, of one class, that suit the job once these have left."""
        gone = {id(one.occupant) for one in leaving}
        used = node.foreign | node.kept
        for one in node.occupants:
            if id(one) not in gone:
                used |= one.mask
        free = node.suitable(job) & ~used
        return max((free & mask for _, mask in node.classes.values()), key=int.bit_count, default=0)

    def _may_give(self, claim: _Claim, one: _Candidate, taken: _Taken, rate: float) -> bool:
        """Whether its tenants may lose `rate` to the job, beside what they lose already."""
        project, organization = one.project, one.organization
        return self._project_may_give(claim, project, taken.of(project) + rate) and (
            organization is claim.organization
            or self._organization_may_give(claim, organization, taken.of(organization) + rate)
        )

    def _project_may_give(self, claim: _Claim, victim: Party, taken: float) -> bool:
        view, job = victim.view, claim.job
        if victim is claim.project or (view.id, job.project_id) in self._pairs:
            return False
        left = victim.rate - victim.lost - taken
        if left < view.guarantee - EPSILON:
            return False
        if view.organization_id != job.organization_id:
            return True
        if claim.kind is PreemptKind.GUARANTEE:
            return claim.by_its_project
        return _fairer(claim.project, claim.rate, victim, left)

    def _organization_may_give(self, claim: _Claim, victim: Party, taken: float) -> bool:
        """To another organization."""
        left = victim.rate - victim.lost - taken
        if left < victim.view.guarantee - EPSILON:
            return False
        return claim.kind is PreemptKind.GUARANTEE or _fairer(claim.organization, claim.rate, victim, left)

    def _rank(self, one: _Candidate) -> tuple[object, ...]:
        """Who goes first: low priority, a tenant that has had much, little to lose, not long at it."""
        view, tau_s = one.view, self._world.snapshot.settings.tau_s
        return view.priority, -one.project.score(tau_s), self._unsaved(view), -view.started_at, view.attempt_id

    def _unsaved(self, view: RunningView) -> float:
        """GPU-seconds of work behind its newest checkpoint."""
        since = view.checkpoint_at if view.checkpoint_at is not None else view.started_at
        return max(0.0, self._world.snapshot.now - since) * len(view.gpu_ids)

    def take(
        self, job: JobView, kind: PreemptKind, node: Node, victims: list[RunningView], mask: int
    ) -> tuple[Hold, list[Preempt]]:
        """Ask them to leave."""
        by = self._world.snapshot.now + self._world.snapshot.settings.grace_s
        asked = {view.attempt_id for view in victims}
        for one in self._movable[node.view.id]:
            if one.view.attempt_id in asked:
                self._pairs.add((job.project_id, one.view.project_id))
                one.project.lost += one.view.rate
                one.organization.lost += one.view.rate
        self._movable[node.view.id] = [one for one in self._movable[node.view.id] if one.view.attempt_id not in asked]
        taken = node.taken(mask)
        ids = tuple(gpu.view.id for gpu in taken)
        hold = Hold(job.id, HoldKind.PREEMPTION, taken[0].view.gpu_class, node.view.id, ids, by)
        return hold, [Preempt(view.attempt_id, view.job_id, job.id, kind) for view in victims]


def _fairer(mine: Party, rate: float, theirs: Party, left: float) -> bool:
    """The loser is better off than the winner after it, and has had more so far."""
    after = (mine.rate + rate) / mine.view.weight <= left / theirs.view.weight + EPSILON
    return after and mine.service / mine.view.weight < theirs.service / theirs.view.weight
