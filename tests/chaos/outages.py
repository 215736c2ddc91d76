"""One job, production clocks, and the servers away one after another: training never stops, nothing is lost.

    python -m tests.chaos.outages --redis 600 --s3 300

Valkey is stopped for ten minutes, Postgres is restarted at once (SIGQUIT) and once more killed, the object store
answers 503 to everything for five minutes. Another job is submitted meanwhile, through the API. The last line is one
JSON object with the longest pause between two steps of a trainer, by its own clock, and what happened to the jobs.
"""

import argparse
import json
import os
import signal
import sys
import time
from contextlib import suppress
from typing import Any

from sqlalchemy import text

from tests.chaos.deployment import PRODUCTION, Deployment, end_in_order
from tests.chaos.faults import PASS, SLOW_DOWN, http_error
from tests.chaos.history import violations
from tests.chaos.workload import Workload

STEPS_A_SECOND = 10
"""At most: both trainers pace themselves."""


def main() -> int:
    options = _options()
    end_in_order()
    deployment = Deployment(trainer=options.trainer, clocks=PRODUCTION)
    lasts = 120 + options.redis + options.s3
    steps = int(lasts * STEPS_A_SECOND)
    workload = Workload(
        deployment.api_url, deployment.api_keys, options.seed, wanted=0, steps=steps, save_steps=steps // 40
    )
    broken: list[str] = []
    try:
        workload.start()
        long = workload.submit()
        assert long is not None
        _until(lambda: _step(deployment) > 10, 180)
        workload.training = {"max_steps": 100, "save_steps": 50}
        went = [_redis(deployment, workload, options.redis), _postgres(deployment), _s3(deployment, options.s3)]
        deployment.heal()
        if _step(deployment) >= steps:
            broken.append("the job was over before the outages were")
        broken += deployment.rest(workload, 3 * lasts)
        history = deployment.history(workload.finish())
        broken += violations(history) + workload.refused
        longest = [each for each in history.tries if len(each.steps) > 100]
        if len(history.tries) != len(history.jobs):
            broken.append(f"{len(history.tries)} attempts for {len(history.jobs)} jobs: somebody stopped")
        found = {
            "outages": went,
            "jobs": len(history.jobs),
            "attempts": len(history.tries),
            "steps": steps,
            "longest_pause_s": _longest_pause(deployment),
            "checkpoints": len([each for each in history.checkpoints if longest and each.job_id == longest[0].job_id]),
            "violations": len(broken),
        }
    finally:
        deployment.close(keep=bool(broken) or sys.exc_info()[0] is not None)
    sys.stderr.write("\n".join(broken) + "\n")
    print(json.dumps(found))
    return bool(broken)


def _redis(deployment: Deployment, workload: Workload, seconds: float) -> dict[str, Any]:
    """Nobody serves it: the process stands still, and every link refuses. A job comes in the middle of it."""
    pid = deployment.server_pid("valkey")
    assert pid is not None
    before = _step(deployment)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds / 2)
    other = workload.submit()
    time.sleep(seconds / 2)
    os.kill(pid, signal.SIGCONT)
    return {
        "what": "redis",
        "seconds": seconds,
        "steps_meanwhile": _step(deployment) - before,
        "a job submitted meanwhile": other.statuses[-1] if other else "not accepted",
    }


def _postgres(deployment: Deployment) -> dict[str, Any]:
    before = _step(deployment)
    for number in (signal.SIGQUIT, signal.SIGKILL):  # an immediate shutdown, then a crash
        started = deployment.servers.children["postgres"].restarts
        pid = deployment.server_pid("postgres")
        assert pid is not None
        os.kill(pid, number)
        _until(lambda before=started: deployment.servers.children["postgres"].restarts > before, 60)
        _until(lambda: _step(deployment) >= 0, 60)
        time.sleep(15)
    return {"what": "postgres, restarted twice", "steps_meanwhile": _step(deployment) - before}


def _s3(deployment: Deployment, seconds: float) -> dict[str, Any]:
    before = _step(deployment)
    for ways in deployment.links.values():
        ways["s3"].set(http_error(503, SLOW_DOWN))
    time.sleep(seconds)
    after = _step(deployment)
    for ways in deployment.links.values():
        ways["s3"].set(PASS)
    return {"what": "s3", "seconds": seconds, "steps_meanwhile": after - before}


def _step(deployment: Deployment) -> int:
    """Of the job that has come farthest; -1 while the database cannot say."""
    with suppress(Exception), deployment.fleet.look() as session:
        return session.scalar(text("SELECT max((progress->>'step')::int) FROM jobs")) or 0
    return -1


def _longest_pause(deployment: Deployment) -> float:
    """Seconds between two steps that follow each other, by the trainer's clock."""
    query = text(
        "SELECT max(gap) FROM (SELECT extract(epoch FROM created_at - lag(created_at) "
        "OVER (PARTITION BY job_id ORDER BY seq)) AS gap FROM events WHERE type = 'metrics') gaps"
    )
    with deployment.fleet.look() as session:
        return round(float(session.scalar(query) or 0), 2)


def _until(what: Any, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, "timed out"
        time.sleep(0.2)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.outages", description=__doc__)
    parser.add_argument("--redis", type=float, default=600, metavar="S")
    parser.add_argument("--s3", type=float, default=300, metavar="S")
    parser.add_argument("--trainer", choices=("fake", "paced"), default="paced")
    parser.add_argument("--seed", type=int, default=1)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
