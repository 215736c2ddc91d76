"""`python -m bench.control_plane`: what the platform costs beside a bare trainer. Linux; uses no GPU.

1. Submitting: HTTP POST of a job on a real file, by 1 and by 16 clients at once; the node is cordoned meanwhile.
2. Starting: from a job's acceptance to its trainer's process and first line, on an idle machine, step by step.
3. Training: ten rounds of three runs of one job, by the platform (P), by a bare trainer (B), by a bare trainer again
   (C), in the orders PBC and CBP in turn. Each gives the median time between the events of its 60 steps. P/B is the
   overhead, C/B the control that says what such a measurement does on this machine when nothing differs.
4. CPU: utime + stime of every process of the platform, embedded servers included, trainers not, while a job trains.

Trainers have one thread, and a core of their own where there are several. About five minutes.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bench import arms, cpu
from bench.arms import Bare, Platform, Trained
from bench.deployment import Deployment, deployment

STEPS = 60
MOST_RATIO, MOST_CORES = 1.03, 0.05
_VERSIONS = ("torch", "transformers", "peft", "trl", "sqlalchemy", "psycopg", "fastapi")


def main() -> int:
    options = _options()
    with (
        deployment(TUNERY_TRAINER_THREADS="1", TUNERY_TRAINER_ISOLATION=options.isolation) as running,
        tempfile.TemporaryDirectory(prefix="bench-") as folder,
    ):
        up = running.home.holder()
        assert up is not None
        arms.model(Path(folder) / "base")
        running.command("models", "import", f"path:{folder}/base", "--name", "bench")
        rows: dict[str, Any] = {"submit": [submit(running, clients, each) for clients, each in ((1, 100), (16, 15))]}
        trained = Platform(running, up, Path(folder))
        rows["rounds"] = rounds(trained, options.rounds)
        rows["starts"] = trained.starts
        _say_starts(trained.starts)
        rows["cpu"] = burn(running, up, trained, options.cpu_steps)
    summary = _summary(rows)
    if options.out:
        options.out.write_text(json.dumps({"summary": summary, "rows": rows, "versions": _versions()}, indent=2) + "\n")
    last = {key: round(summary[key], 4) for key in ("overhead_ratio", "platform_cpu_cores")}
    print(json.dumps(last))
    return 0 if last["overhead_ratio"] <= MOST_RATIO and last["platform_cpu_cores"] <= MOST_CORES else 1


# ---- 1. submitting ---------------------------------------------------------------------------------------------------


def submit(running: Deployment, clients: int, each: int) -> dict[str, float]:
    """Jobs are accepted and their rows checked, but none starts; then all are cancelled."""
    running.rows("UPDATE nodes SET state = 'cordoned'")
    file_id = running.upload(arms.rows())

    def one(_: int) -> tuple[list[float], list[str]]:
        took, made = [], []
        body = {"model": "bench", "training_file": file_id, "tunery": {"training": arms.training(STEPS)}}
        with running.client() as client:
            client.get("/models")  # the connection is there already
            for _ in range(each):
                began = time.perf_counter()
                answer = client.post("/fine_tuning/jobs", json=body)
                took.append(time.perf_counter() - began)
                made.append(answer.raise_for_status().json()["id"])
        return took, made

    with ThreadPoolExecutor(clients) as pool:
        done = list(pool.map(one, range(clients)))
        list(pool.map(running.cancel, [job_id for _, made in done for job_id in made]))
    running.rows("UPDATE nodes SET state = 'up'")
    took = sorted(second for seconds, _ in done for second in seconds)
    found = {"clients": clients, "jobs": len(took), "p50_s": statistics.median(took), "p99_s": quantile(took, 0.99)}
    print(
        f"submit, {clients:2} clients: p50 {found['p50_s'] * 1e3:.1f} ms, p99 {found['p99_s'] * 1e3:.1f} ms", flush=True
    )
    return found


def quantile(ordered: Sequence[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


# ---- 2. starting -----------------------------------------------------------------------------------------------------


def _say_starts(starts: list[dict[str, float]]) -> None:
    print(f"accepted to trainer process: p50 {_middle(starts, 'trainer process'):.3f} s of {len(starts)} starts; up to")
    for name in starts[0]:
        print(f"  {name:<22} {_middle(starts, name):.3f} s")


def _middle(starts: list[dict[str, float]], name: str) -> float:
    return statistics.median(start[name] for start in starts)


# ---- 3. training -----------------------------------------------------------------------------------------------------


def rounds(trained: Platform, count: int) -> list[dict[str, float]]:
    trained.train(STEPS)  # warm caches; also shows what its trainer is given
    assert trained.captured is not None
    bare, found = Bare(trained.captured), []
    print("round order  platform ms  bare ms  bare again ms   P/B     C/B")
    for number in range(count):
        order = "PBC" if number % 2 == 0 else "CBP"
        runs: dict[str, Trained] = {}
        for arm in order:
            runs[arm] = trained.train(STEPS) if arm == "P" else bare.train()
            assert len(runs[arm].steps) == STEPS
        assert runs["P"].losses == runs["B"].losses == runs["C"].losses, "the arms did not train the same"
        step = {arm: run.step_s for arm, run in runs.items()}
        row = {f"{arm}_step_s": step[arm] for arm in "PBC"}
        row |= {"overhead": step["P"] / step["B"], "control": step["C"] / step["B"], "last_loss": runs["P"].losses[-1]}
        print(
            f"{number + 1:5} {order:5} {step['P'] * 1e3:12.2f} {step['B'] * 1e3:8.2f} {step['C'] * 1e3:14.2f} "
            f"{row['overhead']:7.4f} {row['control']:7.4f}",
            flush=True,
        )
        found.append(row)
    print(f"losses are bitwise equal in all {3 * count} runs of a round each")
    return found


# ---- 4. CPU ----------------------------------------------------------------------------------------------------------


def burn(running: Deployment, up: int, trained: Platform, steps: int) -> dict[str, Any]:
    """Nobody asks the API while it is measured: the interval is found afterwards, from the trainer's own events."""
    with cpu.Sampler(up) as sampler:
        job_id, accepted = trained.start(steps)
        expected = 3 * _step_s(trained) * steps
        time.sleep(min(expected, 20))
        while running.state(job_id) in ("validating", "queued", "starting", "running"):
            time.sleep(10)  # one request in ten seconds is within what a user's `watch` does
    times = sorted(at for at, _ in running.steps(job_id).values())
    took, cores = sampler.between(times[0], times[-1])
    print(f"platform CPU while {steps} steps train ({took:.0f} s, {len(times) / (times[-1] - times[0]):.1f} steps/s):")
    for name, used in cores.items():
        print(f"  {name:<12} {used:.4f} cores")
    return {"seconds": took, "steps": len(times), "cores": cores, "accepted_to_first_step_s": times[0] - accepted}


def _step_s(trained: Platform) -> float:
    return trained.last.step_s if trained.last else 0.05


# ---- the end ---------------------------------------------------------------------------------------------------------


def _summary(rows: dict[str, Any]) -> dict[str, Any]:
    overhead = statistics.median(row["overhead"] for row in rows["rounds"])
    control = statistics.median(row["control"] for row in rows["rounds"])
    print(f"median P/B {overhead:.4f}, median C/B {control:.4f}")
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": f"{platform.processor() or platform.machine()} x {len(os.sched_getaffinity(0))}",
        "load_average": os.getloadavg(),
        "commit": _commit(),
        "submit": rows["submit"],
        "accepted_to_trainer_process_p50_s": _middle(rows["starts"], "trainer process"),
        "accepted_to": {name: _middle(rows["starts"], name) for name in rows["starts"][0]},
        "bare_step_s": statistics.median(row["B_step_s"] for row in rows["rounds"]),
        "platform_over_bare": overhead,
        "bare_over_bare": control,
        "overhead_ratio": overhead / control,
        "platform_cpu_cores": sum(rows["cpu"]["cores"].values()),
    }


def _commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=arms.ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), **{name: version(name) for name in _VERSIONS}}


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.control_plane", description="What the platform costs.")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--cpu-steps", type=int, default=600)
    parser.add_argument("--isolation", default="auto", help="TUNERY_TRAINER_ISOLATION of the node")
    parser.add_argument("--out", type=Path, help="also write summary, rows and versions to this file")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
