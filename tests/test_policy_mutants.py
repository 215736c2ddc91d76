"""Would the properties notice? One deliberately wrong policy for each invariant; its own property has to catch it."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from scheduler.policy import _Walk, explain, parts, preempt, reading, schedule, world
from tests.policy_backlogs import Backlog, Claim, backlogs, claims, more_never_hurts
from tests.policy_invariants import Broken, Checker
from tests.policy_worlds import worlds
from tunery.contracts.scheduling import Plan, Reason, Snapshot, Standing, WaitCode

Patch = Callable[[pytest.MonkeyPatch], None]


def caught(check: Callable[[Any], object], among: st.SearchStrategy[Any], most: int) -> str:
    """The invariant that the first of so many examples broke; empty if none did."""

    @settings(
        max_examples=most,
        phases=[Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(among)
    def search(example: Any) -> None:
        check(example)

    try:
        search()
    except Broken as broken:
        return str(broken.args[0])
    return ""


def _shares_gpus_twice(patch: pytest.MonkeyPatch) -> None:
    """What was started leaves its devices looking empty."""
    start = world.World.start

    def wrong(self: world.World, job: Any, place: parts.Place, why: str) -> Any:
        made = start(self, job, place, why)
        self.nodes[place.node_id].empty |= place.mask
        return made

    patch.setattr(world.World, "start", wrong)


def _ignores_caps(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parts.Party, "capped", lambda self, cost: False)


def _starts_part_of_a_gang(patch: pytest.MonkeyPatch) -> None:
    whole = world.World._whole

    def wrong(self: world.World, node: Any, job: Any, *more: Any) -> Any:
        key, place = whole(self, node, job, *more)
        return key, replace(place, mask=place.mask & (place.mask - 1)) if job.gpus > 1 else place

    patch.setattr(world.World, "_whole", wrong)


def _never_backfills(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(world.World, "admits", lambda self, job, place, until: not self.reservations)


def _forgets_gangs(patch: pytest.MonkeyPatch) -> None:
    fits = world.World._places
    patch.setattr(world.World, "_places", lambda self, job: fits(self, job) if job.gpus < 3 else iter(()))


def _first_come_first_served(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parts.Party, "score", lambda self, tau_s: 0.0)


def _breaks_promises(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(_Walk, "keep_promises", lambda self: None)


def _takes_turns(patch: pytest.MonkeyPatch) -> None:
    """Any victim will do, however often."""
    patch.setattr(preempt.Room, "_project_may_give", lambda self, claim, victim, *more: victim is not claim.project)
    patch.setattr(preempt.Room, "_organization_may_give", lambda *more: True)
    patch.setattr(preempt.Room, "_may_be_moved", lambda self, view: not view.stopping and not view.ended)


def _reclaims_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(preempt.Room, "find", lambda self, job: None)


def _believes_the_order_of_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reading, "_sort", lambda queue: queue.sort(key=lambda job: (not job.urgent, -job.priority)))


def _weighs_upside_down(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(parts.Party, "score", lambda self, tau_s: (self.service + tau_s * self.rate) * self.view.weight)


def _takes_service_back(patch: pytest.MonkeyPatch) -> None:
    from scheduler import policy

    def wrong(party: parts.Party, others: list[parts.Party]) -> Standing:
        level = min(other.view.service for other in others)
        return Standing(party.view.id, party.waits or party.running > 0, level - party.view.service)

    patch.setattr(policy, "_standing", wrong)


def _says_busy(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(explain._Explainer, "reason", lambda self, job, name: Reason(WaitCode.BUSY))


IN_WORLDS = {
    "I1": _shares_gpus_twice,
    "I2": _ignores_caps,
    "I3": _starts_part_of_a_gang,
    "I4": _never_backfills,
    "I5": _forgets_gangs,
    "I7": _breaks_promises,
    "I8": _takes_turns,
    "I10": _believes_the_order_of_rows,
    "I12": _takes_service_back,
    "I13": _says_busy,
}


@pytest.mark.parametrize("name", IN_WORLDS)
def test_a_wrong_policy_breaks_the_invariant_of_its_rule(name: str, monkeypatch: pytest.MonkeyPatch):
    def check(one: Any) -> None:
        Checker(one, only=[name]).run()

    IN_WORLDS[name](monkeypatch)
    assert caught(check, worlds(), 300) == name


def test_a_wrong_order_breaks_the_bound_on_shares(monkeypatch: pytest.MonkeyPatch):
    def check(one: Backlog) -> None:
        one.run(check=True)

    _first_come_first_served(monkeypatch)
    assert caught(check, backlogs(), 60) == "I6"


def test_a_guarantee_that_is_never_reclaimed_is_noticed(monkeypatch: pytest.MonkeyPatch):
    def check(one: Claim) -> None:
        one.check()

    _reclaims_nothing(monkeypatch)
    assert caught(check, claims(), 60) == "I9"


def test_weights_upside_down_are_noticed(monkeypatch: pytest.MonkeyPatch):
    _weighs_upside_down(monkeypatch)
    assert caught(more_never_hurts, backlogs(), 60) == "I11"


def test_the_policy_itself_breaks_none_of_them():
    """The same examples, the right policy: what catches a mutant is the mutation."""

    def check(one: Any) -> None:
        Checker(one).run()

    assert caught(check, worlds(), 60) == ""
    assert caught(more_never_hurts, backlogs(), 10) == ""
    assert isinstance(schedule(Snapshot((), ())), Plan)
