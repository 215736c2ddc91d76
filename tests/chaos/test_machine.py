"""Ten minutes of the state machine, or as many as `TUNERY_CHAOS_MINUTES` says; `TUNERY_CHAOS_SEED` repeats a run."""

import os

import pytest

from tests.chaos import machine


@pytest.mark.chaos
@pytest.mark.timeout(0)
def test_nothing_is_lost_whatever_users_do_and_whatever_dies() -> None:
    seed = int(os.environ.get("TUNERY_CHAOS_SEED") or int.from_bytes(os.urandom(3)))
    played = machine.play(float(os.environ.get("TUNERY_CHAOS_MINUTES") or 10), seed)
    print(played)
    assert played["examples"] > 0
