"""What holds of the policy in every world: invariants after each pass of hundreds of simulated lives.

`-s` prints in how many of the worlds there were gangs, caps, pre-emption, lost nodes, cancels.
"""

import os
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, Phase, event, given, settings

from tests.policy_backlogs import Backlog, Claim, backlogs, claims, more_never_hurts
from tests.policy_invariants import Checker
from tests.policy_worlds import SEEN, World, worlds

CALM = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.reuse, Phase.generate],  # to shrink a world takes minutes, and tells little more
}
FIXED = CALM | {"derandomize": True}
"""The same worlds in every run; `make worlds` looks at others."""


@pytest.fixture(scope="module", autouse=True)
def told() -> Iterator[None]:
    yield
    if total := SEEN.pop("worlds", 0):
        shares = ", ".join(f"{name} {number / total:.0%}" for name, number in SEEN.most_common())
        print(f"\n{total} worlds; of them with {shares}")


@pytest.mark.timeout(600)
@settings(max_examples=500, **FIXED)
@given(worlds())
def test_every_pass_keeps_the_invariants(world: World):
    """I1 to I5, I7, I8, I10, I12, I13; see tests/policy_invariants.py."""
    checker = Checker(world)
    checker.run()
    SEEN["worlds"] += 1
    for name in checker.happened:
        event(name)
        SEEN[name] += 1


@pytest.mark.skipif("TUNERY_WORLDS" not in os.environ, reason="`make worlds` looks at other worlds in every run")
@pytest.mark.timeout(0)
@settings(max_examples=int(os.environ.get("TUNERY_WORLDS", "1500")), **CALM)
@given(worlds())
def test_other_worlds_keep_them_too(world: World):
    Checker(world).run()


def test_the_worlds_were_worth_it():
    """Runs after the one above: enough of them had what the invariants are about."""
    total = SEEN["worlds"]
    if total < 300:
        pytest.skip("only after the whole test above")
    for name in ("gangs", "gang reservations", "caps", "guarantees", "cancels", "limits reached"):
        assert SEEN[name] > 0.2 * total, name
    for name in ("pre-emption", "faults of nodes", "shared GPUs"):
        assert SEEN[name] > 0.03 * total, name


@settings(max_examples=60, **FIXED)
@given(backlogs())
def test_shares_stay_within_a_job_and_the_look_ahead(backlog: Backlog):
    """I6."""
    backlog.run(check=True)


@settings(max_examples=150, **FIXED)
@given(claims())
def test_whoever_asks_for_no_more_than_its_guarantee_is_served_soon(one: Claim):
    """I9."""
    one.check()


@settings(max_examples=25, **FIXED)
@given(backlogs())
def test_more_gpus_and_more_weight_never_hurt(backlog: Backlog):
    """I11."""
    more_never_hurts(backlog)
