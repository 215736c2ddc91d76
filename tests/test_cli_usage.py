"""`tunery usage` and `tunery budget` as a process, against the real api and real rows."""

import csv
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import pytest

from scheduler.budgets import Budgets
from tests import factories
from tests.factories import Database, FleetNode, Tenant
from tests.test_budgets import give, lead
from tests.test_ledger import HOUR, Life, lived

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(api_url: str, project: Tenant, tmp_path: Path) -> Run:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    own = {"XDG_CONFIG_HOME": str(tmp_path), "HOME": str(tmp_path), "TUNERY_API_URL": api_url}

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tunery.cli", *words],
            capture_output=True,
            text=True,
            env=kept | own | {"TUNERY_API_KEY": project.key, "TZ": "UTC"},
            timeout=60,
        )

    return call


@pytest.fixture
def month(project: Tenant, node: FleetNode, base_model: str) -> list[str]:
    """Two jobs: one that was kept, and one of whose half hour the second half was lost. Their ids."""
    price = Decimal("2.5")
    kept = lived(project, [node], Life(2 * HOUR, 600, (), "succeeded", None, 1, None, price))
    half = lived(project, [node], Life(HOUR / 2, 300, (900,), "lost", "platform", 1, None, price))
    return [kept.id, half.id]


def test_a_month_at_a_glance(run: Run, project: Tenant, month: list[str], database: Database) -> None:
    give(project, hours=2.6, money=5)
    Budgets(database.sessions("tunery_scheduler"), 120).run(lead(database))
    done = run("usage")
    assert done.returncode == 0, done.stderr
    head, row, *rest = done.stdout.splitlines()
    assert head.split("  ")[0] == "CLASS"
    cells = [cell for cell in row.split("  ") if cell]
    assert [cell.strip() for cell in cells[1:]] == ["2h 30m", "15m 00s", "2h 00m", "0s", "15m 00s", "2h 15m", "5.62"]
    assert rest.pop(0) == ""
    assert rest[0].startswith("GPU-hours  █") and "87 %  2.25 of 2.6 used, 0.25 held, 0.1 left" in rest[0]
    assert "112 %  5.62 of 5 used" in rest[1]
    assert "alert      80 % of 5 amount was passed on" in rest[2]
    assert rest[4].startswith("blocked    the monthly budget of 2.6 GPU-hours and 5 in money is used up")
    assert json.loads(run("usage", "--json").stdout)["total"]["charged_gpu_seconds"] == 8100


def test_lines_for_a_spreadsheet(run: Run, project: Tenant, month: list[str]) -> None:
    rows = list(csv.DictReader(io.StringIO(run("usage", "--csv").stdout)))
    assert [row["job"] for row in rows] == month
    kept, half = rows
    assert (kept["charged_gpu_seconds"], kept["price_per_hour"], kept["amount"]) == ("7200.000", "2.5000", "5.000000")
    assert (half["loading_seconds"], half["productive_seconds"], half["platform_fault_seconds"]) == (
        "300.000",
        "600.000",
        "900.000",
    )
    assert {row["running"] for row in rows} == {"false"} and all(row["ended_at"].endswith("+00:00") for row in rows)
    assert run("usage", "--csv", "--month", "2024-02").stdout.splitlines() == [",".join(rows[0])]


def test_a_job_shows_what_it_cost(run: Run, month: list[str]) -> None:
    first, second = (run("jobs", "show", job_id).stdout for job_id in month)
    assert "cost           5.0000 for 2h 00m of GPU time\n" in first
    assert "0.6250 for 15m 00s of GPU time, 15m 00s refunded\n" in second


def test_nothing_used_and_nothing_set(run: Run) -> None:
    done = run("usage")
    assert done.returncode == 0 and done.stdout == ""
    assert "no GPU time was used in" in done.stderr and "no budget is set" in done.stderr


@pytest.mark.parametrize("month", ["november", "2026-13", "0000-01", "2026-1"])
def test_a_month_that_is_none(run: Run, month: str) -> None:
    done = run("usage", "--month", month)
    assert done.returncode == 6 and "is no month" in done.stderr and "2026-11" in done.stderr


def test_a_budget_is_set_shown_and_cleared(run: Run, project: Tenant) -> None:
    name = f"{project.identity.organization}:{project.identity.project}"
    done = run("budget", "set", name, "--gpu-hours", "10")
    assert done.returncode == 0 and "0 %  0 of 10 used, 10 left" in done.stdout
    assert run("budget", "show", name).stdout == run("budget", "show").stdout == done.stdout
    assert run("budget", "clear", name).returncode == 0
    assert "no budget is set" in run("budget", "show").stderr
    assert run("budget", "set", name).returncode == 2
    assert run("budget", "set", "proj_x", "--amount", "1").returncode == 5


def test_what_does_not_fit_is_a_quota(run: Run, project: Tenant, base_model: str) -> None:
    give(project, hours=0.25)
    done = run("jobs", "create", "-m", base_model, "-t", factories.file(project))
    assert done.returncode == 7 and "[budget_exceeded]" in done.stderr and "0.25 of 0.25 GPU-hours left" in done.stderr
