"""Failpoints do what they say where they are asked to, and a program that meets a wrong one does not start."""

import errno
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fleet import ROOT
from tunery import failpoints

ALLOWED = {"TUNERY_FAILPOINTS_ALLOWED": "1"}


def test_every_point_is_reached_at_one_place_and_every_place_is_a_point() -> None:
    found = [
        name
        for program in ("tunery", "api", "scheduler", "worker", "trainer")
        for path in (ROOT / program).rglob("*.py")
        for name in re.findall(r'failpoints\.reach\("([^"]+)"\)', path.read_text())
    ]
    assert sorted(found) == sorted(failpoints.POINTS)


def test_nothing_is_armed_without_a_word() -> None:
    assert failpoints.parse({}) == {}
    assert failpoints.parse(ALLOWED) == {}


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("relay.rung:kill", False),
        ("relay.rnug:kill", True),
        ("relay.rung:die", True),
        ("relay.rung:sleep=long", True),
        ("relay.rung:raise=ENOTHING", True),
        ("relay.rung:kill:once", True),
        ("relay.rung:kill:twice", True),
    ],
)
def test_a_failpoint_that_cannot_or_may_not_be_stops_the_program(text: str, allowed: bool) -> None:
    with pytest.raises(SystemExit, match="TUNERY_FAILPOINT"):
        failpoints.parse({"TUNERY_FAILPOINT": text} | (ALLOWED if allowed else {}))


def test_the_nth_passage_alone_raises_what_was_named() -> None:
    point = failpoints.parse(ALLOWED | {"TUNERY_FAILPOINT": "events.written:raise=ENOSPC:nth=2"})["events.written"]
    point.act()
    with pytest.raises(OSError, match=r"events\.written") as raised:
        point.act()
    assert raised.value.errno == errno.ENOSPC
    point.act()


def test_once_is_once_for_all_processes_together(tmp_path: Path) -> None:
    armed = {"TUNERY_FAILPOINT": "relay.rung:kill:once", "TUNERY_FAILPOINT_DIR": str(tmp_path)} | ALLOWED
    program = [sys.executable, "-c", "from tunery import failpoints; failpoints.reach('relay.rung')"]
    codes = [subprocess.run(program, env=os.environ | armed, cwd=ROOT).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL, 0]


@pytest.mark.parametrize(("point", "complete"), [("folder.synced", False), ("folder.renamed", True)])
def test_a_folder_of_a_killed_trainer_is_complete_or_not_there(tmp_path: Path, point: str, complete: bool) -> None:
    (tmp_path / ".step-5.tmp").mkdir()
    (tmp_path / ".step-5.tmp" / "weights").write_bytes(b"w" * 100)
    code = "from trainer.manifest import Path, publish; publish(Path('.step-5.tmp'), Path('step-5'))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | ALLOWED | {"TUNERY_FAILPOINT": f"{point}:kill", "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
    )
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "step-5" / "weights").exists() == complete
    assert (tmp_path / ".step-5.tmp").exists() != complete
