"""What every single-fault test asks for, and what it then asserts of a job that went through the fault."""

import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.chaos.proxy import Proxy
from tests.fleet import Fleet, Via, fleet
from tests.servers import private_servers
from tunery.embedded.servers import Servers


@pytest.fixture
def mine() -> Iterator[Servers]:
    """Servers of this test's own."""
    with private_servers() as started:
        yield started


@pytest.fixture
def via(servers: Servers) -> Iterator[Via]:
    """A proxy before each of the session's servers."""
    with (
        Proxy.of(servers.admin_url) as postgres,
        Proxy.of(servers.redis_url) as valkey,
        Proxy.of(servers.s3_root.endpoint_url, http=True) as s3,
    ):
        yield Via(postgres, valkey, s3)


@pytest.fixture
def running() -> Iterator[Fleet]:
    """A fleet with a scheduler, on the session's servers."""
    with fleet() as started:
        started.scheduler()
        yield started


@pytest.fixture
def succeeds() -> Callable[..., None]:
    return assert_succeeds


def assert_succeeds(
    running: Fleet,
    job_id: uuid.UUID,
    *,
    attempts: int | None = None,
    steps: int | None = None,
    timeout_s: float = 60,
) -> None:
    """The job ends well: one version, rising fences, every step's loss stored by the attempts in unbroken order."""
    assert running.ends(job_id, timeout_s) == "succeeded"
    made = running.attempts(job_id)
    assert attempts is None or len(made) == attempts, [(one.state, one.failure_code) for one in made]
    assert [one.fence for one in made] == sorted({one.fence for one in made})
    assert len(running.versions(job_id)) == 1
    assert running.messages(job_id).count("The job has successfully completed") == 1
    trained = dict(running.steps_trained(job_id))
    for attempt in made:
        mine = trained.get(attempt.no, [])
        assert mine == list(range(attempt.start_step + 1, attempt.start_step + 1 + len(mine)))
    if steps is not None:
        assert trained[made[-1].no][-1] == steps
    running.until(running.nothing_held, 20)
