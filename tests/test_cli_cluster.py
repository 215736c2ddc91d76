"""The commands of operators, as real processes against the real api: nodes, GPUs, shares and the audit log."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import factories
from tests.factories import FleetNode, Tenant
from tunery import ids
from tunery.models import Node
from tunery.states import StopReason

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(api_url: str, project: Tenant, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    home = {"HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path)}
    return kept | home | {"TUNERY_API_URL": api_url, "TUNERY_API_KEY": project.key}


@pytest.fixture
def tunery(environment: dict[str, str]) -> Run:
    def call(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tunery.cli", *words]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, cwd=ROOT)

    return call


def name_of(node: FleetNode) -> str:
    with factories.owner(node.database) as session:
        return session.get_one(Node, node.id).name


def test_a_node_is_cordoned_labelled_and_returned(tunery: Run, node: FleetNode) -> None:
    name = name_of(node)
    assert "takes no new jobs" in tunery("node", "cordon", name).stderr
    assert json.loads(tunery("node", "show", name, "--json").stdout)["state"] == "cordoned"
    labelled = tunery("node", "label", name, "rack=b", "zone=north")
    assert (labelled.returncode, labelled.stdout) == (0, "") and "rack=b zone=north" in labelled.stderr
    assert json.loads(tunery("node", "label", name, "zone-", "--json").stdout)["labels"] == {"rack": "b"}
    assert json.loads(tunery("node", "return", name, "--json").stdout)["state"] == "up"
    wrong = tunery("node", "label", name, "rack")
    assert wrong.returncode == 2 and "[invalid_label]" in wrong.stderr
    assert tunery("node", "drain", "nobody").returncode == 5


def test_drain_waits_until_nothing_is_left(
    tunery: Run, environment: dict[str, str], project: Tenant, node: FleetNode, base_model: str
) -> None:
    work = factories.running(project, node)
    command = [sys.executable, "-m", "tunery.cli", "node", "drain", name_of(node), "--wait"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT) as waiting:
        assert waiting.stderr is not None and waiting.stderr.readline() == "1 job left\n"
        assert waiting.poll() is None
        factories.stop(work, StopReason.PREEMPT)
        assert "is drained" in waiting.stderr.read()
        assert waiting.wait(60) == 0


def test_drain_stops_waiting_when_somebody_returns_the_node(
    tunery: Run, environment: dict[str, str], project: Tenant, node: FleetNode, base_model: str
) -> None:
    factories.running(project, node)
    command = [sys.executable, "-m", "tunery.cli", "node", "drain", name_of(node), "--wait"]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, cwd=ROOT) as waiting:
        assert waiting.stderr is not None and waiting.stderr.readline() == "1 job left\n"
        tunery("node", "return", name_of(node))
        assert "[node_not_draining]" in waiting.stderr.read()
        assert waiting.wait(60) == 1


def test_gpus_are_shown_with_what_is_on_them(tunery: Run, project: Tenant, node: FleetNode, base_model: str) -> None:
    name = name_of(node)
    [line] = [line for line in tunery("gpus").stdout.splitlines() if line.startswith(name)]
    assert line.split()[:4] == [name, "0", "test-8gb", "free"] and "░░░░░░░░░░" in line
    work = factories.running(project, node)
    [line] = [line for line in tunery("gpus").stdout.splitlines() if line.startswith(name)]
    assert line.split()[3] == "busy" and "██████████" in line and work.id in line
    assert name not in tunery("gpus", "--free").stdout
    assert name in tunery("gpus", "--class", "test-8gb").stdout
    assert tunery("gpus", "--class", "no-such", "-q").stdout == ""


def test_a_class_gets_its_cost_and_its_price(tunery: Run, node: FleetNode) -> None:
    assert tunery("gpus", "class", "test-8gb", "--cost", "0.5", "--price", "2.10").returncode == 0
    [line] = [line for line in tunery("gpus", "classes").stdout.splitlines() if line.startswith("test-8gb")]
    assert line.split()[2:] == ["0.5", "2.10"]
    assert "cost 0.5, no price" in tunery("gpus", "class", "test-8gb", "--no-price").stderr
    both = tunery("gpus", "class", "test-8gb", "--price", "1", "--no-price")
    assert both.returncode == 2 and "[contradicting_options]" in both.stderr
    assert tunery("gpus", "class", "nothing").returncode == 5


def test_shares_are_set_shown_and_written_down(tunery: Run, project: Tenant) -> None:
    wire_id = ids.encode(ids.PROJECT, project.project_id)
    changed = tunery("project", "set", wire_id, "--weight", "2", "--cap", "16", "--max-running", "8", "--json")
    told = json.loads(changed.stdout)
    assert (told["weight"], told["cap"], told["max_running_jobs"]) == (2, 16, 8)
    shown = dict(line.split(maxsplit=1) for line in tunery("project", "show").stdout.splitlines())
    assert (shown["weight"], shown["cap"]) == ("2", "16 GPUs")
    assert json.loads(tunery("project", "set", wire_id, "--no-cap", "--json").stdout)["cap"] is None
    assert tunery("project", "set", wire_id).returncode == 2
    assert wire_id in tunery("project", "list", "-q").stdout
    assert tunery("org", "set", project.identity.organization, "--weight", "3").returncode == 0
    assert "weight        3" in tunery("org", "show").stdout
    lines = tunery("audit", f"{project.identity.organization}:research").stdout.splitlines()
    assert any("weight: 1 -> 2" in line for line in lines) and any("cap: 16 -> none" in line for line in lines)
