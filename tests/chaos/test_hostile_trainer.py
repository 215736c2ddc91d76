"""A trainer that lies, hangs or runs out of something hurts its own job alone."""

import pytest

from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tests.fleet import fleet
from tunery.contracts.events import Warning
from worker.recorder import Recorder


@pytest.fixture(autouse=True)
def _catalogue(base_model: str) -> None:
    """Every job here is on this model."""


@pytest.mark.parametrize("odd", [{"time": 1e300}, {"time": float("nan")}, {"step": 2**70}, {"message": "x\0"}])
def test_one_impossible_event_takes_no_other_with_it(
    project: Tenant, node: FleetNode, database: Database, odd: dict[str, object]
) -> None:
    """F29: whatever cannot be stored is left out and counted; what came before and after it is kept."""
    work = factories.claimed(project, node)
    recorder = Recorder(work, database.sessions("tunery_worker", node_id=node.id))  # type: ignore[arg-type]
    strange = Warning(**({"seq": 2, "code": "x", "message": "m"} | odd))  # type: ignore[arg-type]
    for event in (factories.started(1), strange, factories.metrics(3, 1)):
        recorder.add(event)
    recorder.start()
    recorder.finish(5)
    assert factories.attempt(work).last_event_seq == 3
    assert recorder.dropped <= 1


@pytest.mark.chaos
@pytest.mark.parametrize(
    ("mode", "code"),
    [("binary", "internal_error"), ("endless-line", "internal_error"), ("out-of-memory", "out_of_memory")],
)
def test_a_job_of_a_trainer_gone_wrong_ends_and_its_neighbour_does_not_notice(mode: str, code: str) -> None:
    """F20, F29."""
    with fleet() as running:
        running.scheduler()
        running.node("a")
        running.node("b")
        bad, good = running.submit(mode, steps=20), running.submit("slow", steps=20)
        assert running.ends(good) == "succeeded"
        running.until(lambda: running.attempts(bad) and running.attempts(bad)[0].failure_code)
        assert running.attempts(bad)[0].failure_code == code
        assert len(running.attempts(good)) == 1
