"""Valkey forgets, hangs, is full or refuses writes: submitting, reading, cancelling and running go on."""

import signal
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from redis import Redis
from sqlalchemy import text

from tests.fleet import Fleet, fleet
from tunery.dispatch import Doorbell, connect
from tunery.embedded.servers import Servers

pytestmark = pytest.mark.chaos


@pytest.fixture
def deployment(mine: Servers) -> Iterator[Fleet]:
    with fleet(on=mine) as started:
        started.scheduler()
        started.node()
        yield started


def shut_down_without_saving(redis: Redis, servers: Servers) -> None:
    redis.shutdown(nosave=True, now=True, force=True)
    assert servers.children["valkey"].process is not None
    servers.children["valkey"].process.wait(10)


def kill(_: Redis, servers: Servers) -> None:
    assert servers.children["valkey"].process is not None
    servers.children["valkey"].process.kill()


def flush(redis: Redis, _: Servers) -> None:
    redis.flushall()


def fill(redis: Redis, _: Servers) -> None:
    redis.config_set("maxmemory", "1")
    redis.config_set("maxmemory-policy", "noeviction")


def make_read_only(redis: Redis, _: Servers) -> None:
    redis.replicaof("127.0.0.1", "1")


def freeze(_: Redis, servers: Servers) -> None:
    assert servers.children["valkey"].process is not None
    servers.children["valkey"].process.send_signal(signal.SIGSTOP)


FAULTS = [shut_down_without_saving, kill, flush, fill, make_read_only, freeze]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_jobs_are_placed_run_and_end(
    deployment: Fleet, mine: Servers, fault: Callable[[Redis, Servers], None], succeeds: Callable[..., None]
) -> None:
    """F9, F10, F11: one job runs through the fault, another is submitted under it. Nobody restarts the server."""
    through = deployment.submit("slow", steps=20)
    deployment.until(lambda: deployment.step(through) > 1)
    fault(Redis.from_url(mine.redis_url), mine)
    under = deployment.submit("ok", steps=5)
    for job_id in (through, under):
        succeeds(deployment, job_id, attempts=1)


def test_the_doorbell_rings_again_after_a_restart(deployment: Fleet, mine: Servers) -> None:
    """F9: the ring worker of a node and the relay of the scheduler find the new server by themselves."""
    kill(Redis.from_url(mine.redis_url), mine)
    time.sleep(1)
    mine.children["valkey"].tend()
    deployment.until(lambda: (mine.tend(), mine.children["valkey"].is_ready)[1])
    redis = Redis.from_url(mine.redis_url)
    deployment.until(lambda: redis.keys("rq:worker:*"), 30)
    job_id = deployment.submit("ok", steps=2)
    assert deployment.ends(job_id) == "succeeded"
    deployment.until(lambda: _unsent(deployment) == 0, 30)


def test_the_api_does_not_wait_for_it(deployment: Fleet, mine: Servers) -> None:
    """F10: not for one that is frozen."""
    deployment.serve_api()
    with deployment.client(timeout_s=5) as client:
        _used(client)
        freeze(Redis.from_url(mine.redis_url), mine)
        assert _used(client) < 5


def test_a_storm_of_rings_starts_nothing_twice(deployment: Fleet, mine: Servers, succeeds: Callable[..., None]) -> None:
    """F28: duplicates, rings for what is over, and rings in any order are all the same look into the database."""
    doorbell = Doorbell(connect(mine.redis_url))
    jobs = [deployment.submit("ok", steps=20) for _ in range(2)]
    deployment.until(lambda: deployment.attempts(jobs[0]))
    node_id = deployment.attempts(jobs[0])[0].node_id
    for number in range(150):
        doorbell.ring(node_id, str(150 - number % 7))
    for job_id in jobs:
        succeeds(deployment, job_id, attempts=1)


def _used(client: httpx.Client) -> float:
    """Seconds for an upload, a list, and a refused job."""
    began = time.monotonic()
    row = b'{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'
    sent = client.post("/v1/files", files={"file": ("a.jsonl", row * 12)}, data={"purpose": "fine-tune"})
    assert sent.status_code == 200
    made = client.post("/v1/fine_tuning/jobs", json={"model": "tiny", "training_file": sent.json()["id"]})
    assert made.status_code == 200, made.text
    assert client.post(f"/v1/fine_tuning/jobs/{made.json()['id']}/cancel").status_code == 200
    return time.monotonic() - began


def _unsent(running: Fleet) -> int:
    with running.look() as session:
        return session.scalar(text("SELECT count(*) FROM outbox WHERE published_at IS NULL")) or 0
