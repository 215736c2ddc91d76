"""Random faults on a working deployment, then the whole history is checked.

    python -m tests.chaos.campaign --faults 500 --seed 1 --report report.json
    python -m tests.chaos.campaign --faults 20 --production --trainer real

Two nodes, two schedulers, an api and all three servers; users submit, watch and cancel meanwhile. The last line is one
JSON object; the report holds every fault with its time, victim and what the victim was doing, and ends with what the
jobs took to go on. The exit code is 1 if any promise was broken.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from sqlalchemy import text

from tests.chaos.deployment import NODES, PRODUCTION, Deployment, end_in_order
from tests.chaos.evidence import History
from tests.chaos.history import judged_stops, judged_windows, violations
from tests.chaos.nemesis import Nemesis, deck, summary
from tests.chaos.workload import Workload
from tunery import __version__

RECOVERIES = text(
    "SELECT a.job_id, a.no, a.failure_code, extract(epoch FROM a.ended_at) AS ended, "
    "extract(epoch FROM b.started_at) AS started FROM attempts a JOIN attempts b ON b.job_id = a.job_id "
    "AND b.no = a.no + 1 WHERE a.state IN ('lost', 'failed', 'preempted') AND b.started_at IS NOT NULL"
)


def main() -> int:
    options = _options()
    end_in_order()
    began = time.monotonic()
    clocks = PRODUCTION if options.production else None
    deployment = Deployment(trainer=options.trainer, clocks=clocks, nodes=NODES[: options.nodes])
    steps, save = (options.steps, max(1, options.steps // 10))
    workload = Workload(
        deployment.api_url,
        deployment.api_keys,
        options.seed,
        wanted=options.jobs,
        steps=steps,
        save_steps=save,
        gangs=0.2,
    )
    nemesis = Nemesis(deployment, workload, options.seed, scale=4 if options.production else 1)
    pauses = random.Random(options.seed + 1)
    broken: list[str] = []
    try:
        workload.start()
        time.sleep(5)
        for number, kind in enumerate(deck(options.faults, options.seed, options.least), 1):
            struck = nemesis.strike(kind, wait_s=60 if options.production else 15)
            jobs = f"{len(workload.told)} jobs, {len(workload.live())} live"
            sys.stderr.write(
                f"{number:4} {struck.at:7.1f} s  {struck.how:18} {struck.victim:45} {struck.state}; {jobs}\n"
            )
            if options.minutes and time.monotonic() - began > options.minutes * 60:
                break
            time.sleep(pauses.uniform(*options.pause))
        workload.enough()
        nemesis.heal()
        broken += [f"no rest: {each}" for each in deployment.rest(workload, 900 if options.production else 300)]
        history = deployment.history(workload.finish())
        broken += violations(history) + workload.refused
        report = _report(options, deployment, workload, nemesis, history, broken, time.monotonic() - began)
    finally:
        deployment.close(keep=bool(broken) or sys.exc_info()[0] is not None)
    if options.report:
        options.report.write_text(json.dumps(report, indent=1))
    sys.stderr.write("\n".join(broken) + "\n")
    print(json.dumps(report["summary"]))
    return bool(broken)


def _report(
    options: argparse.Namespace,
    deployment: Deployment,
    workload: Workload,
    nemesis: Nemesis,
    history: History,
    broken: list[str],
    took_s: float,
) -> dict[str, Any]:
    with deployment.fleet.look() as session:
        again = session.execute(RECOVERIES).all()
    noticed, windows = history.detections(), judged_windows(history)
    gaps = [float(row.started - row.ended) for row in again]
    states = Counter(job.state for job in history.jobs.values())
    tries = Counter(each.state for each in history.tries)
    found = {
        **summary(nemesis.struck),
        "seed": options.seed,
        "clocks": "production" if options.production else "shortened",
        "trainer": options.trainer,
        "minutes": round(took_s / 60, 1),
        "jobs": dict(states),
        "attempts": dict(tries),
        "versions": len(history.versions),
        "lost_answers": workload.unknown,
        "budgets": {
            "ordered": nemesis.treasury.ordered,
            "seen_used_up": len(history.blocked),
            "judged": len(windows),
            "waited": sum(len(window.said) for window in history.blocked),
            "waited_judged": sum(len(window.said) for window in windows),
            "refused": workload.over_budget,
        },
        "asked_to_stop": sum(each.asked is not None for each in history.tries),
        "stops_judged": len(judged_stops(history)),
        "deaths_allowed_s": history.detection_s,
        "spared": nemesis.spared,
        "detection_s": _spread(noticed),
        "again_s": _spread(gaps),
        "violations": len(broken),
    }
    return {
        "summary": found,
        "rows": [each.as_json() for each in nemesis.struck],
        "broken": broken,
        "versions": {
            "tunery": __version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "date": datetime.now(UTC).date().isoformat(),
            **{name: version(name) for name in ("sqlalchemy", "psycopg", "rq", "redis", "fastapi")},
        },
    }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"of": len(seconds), "median": round(statistics.median(seconds), 2), "worst": round(max(seconds), 2)}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.campaign", description=__doc__)
    parser.add_argument("--faults", type=int, default=50)
    parser.add_argument("--least", type=int, default=0, help="each main victim at least so often")
    parser.add_argument("--minutes", type=float, default=0, help="stop earlier, after so long")
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    parser.add_argument("--jobs", type=int, default=4, help="alive at a time")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pause", type=float, nargs=2, default=(0.2, 2.5), metavar="S", help="between faults")
    parser.add_argument("--trainer", choices=("fake", "real"), default="fake")
    parser.add_argument("--nodes", type=int, choices=(1, 2, 3), default=3)
    parser.add_argument("--production", action="store_true", help="production clocks instead of shortened ones")
    parser.add_argument("--report", type=Path)
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
