"""What a hostile trainer does to its workspace, while a supervisor that may be root reads and removes things there."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from tunery import ids
from tunery.contracts.events import EVENTS, Checkpoint, FileEntry
from tunery.storage import CorruptObject, Storage
from worker import folders, processes
from worker.isolation import uids
from worker.isolation.host import Ways
from worker.isolation.walls import Way
from worker.meters import Meters
from worker.node import Node
from worker.trainers import DedicatedTrainer
from worker.uploads import CheckpointUploads, upload
from worker.workspace import Workspace

SHA = hashlib.sha256(b"state").hexdigest()
STATE = FileEntry(name="state", bytes=5, sha256=SHA)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    made = Workspace(tmp_path / "attempts" / "mine")
    (made.checkpoints / "step-1").mkdir(parents=True)
    (made.checkpoints / "step-1" / "state").write_bytes(b"state")
    return made


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Somebody else's folder, which is called like a checkpoint."""
    folder = tmp_path / "other" / "step-1"
    folder.mkdir(parents=True)
    (folder / "state").write_bytes(b"state")
    return folder


def give(workspace: Workspace, uid: int) -> None:
    (workspace.root / "tmp").mkdir()
    workspace.socket.touch()
    workspace.give(uid)


def swap(workspace: Workspace, other: Path) -> None:
    """The trainer owns `checkpoints`, and may put a link in its place."""
    workspace.checkpoints.rename(workspace.root / "mine")
    workspace.checkpoints.symlink_to(other.parent)


def test_what_a_trainer_swaps_for_a_link_is_neither_stored_nor_removed(
    workspace: Workspace, other: Path, storage: Storage
) -> None:
    said = Checkpoint(path=str(workspace.checkpoints / "step-1"), files=[STATE], step=1, seq=1)
    assert workspace.holds(said.path)  # when it was said
    swap(workspace, other)
    work: Any = SimpleNamespace(project_id=ids.uuid7(), attempt_id=ids.uuid7(), fence=1)
    freed: list[int] = []
    uploads = CheckpointUploads(
        work, workspace, storage, None, SimpleNamespace(outage_grace_s=5),  # type: ignore[arg-type]
        Meters(workspace.root.with_suffix(".prom")), write_through=lambda _: None, on_stored=freed.append,
    )  # fmt: skip
    uploads.start()
    uploads.add(said)
    uploads.finish()
    assert freed == [1]
    assert (other / "state").read_bytes() == b"state"
    assert not list(storage.keys(f"a/{work.project_id}/"))


@pytest.mark.parametrize("way", ["mine/../../other/step-1", "link/step-1", "", "/etc"])
def test_nothing_is_removed_outside_of_the_workspace(workspace: Workspace, other: Path, way: str) -> None:
    (workspace.root / "link").symlink_to(other.parent)
    folders.remove(workspace.root, str(workspace.root / way))
    assert (other / "state").exists() and (workspace.checkpoints / "step-1" / "state").exists()
    folders.remove(workspace.root, str(workspace.checkpoints / "step-1"))
    assert list(workspace.checkpoints.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "pipe", "folder", "longer", "link on the way"])
def test_only_the_files_that_were_named_are_stored(
    workspace: Workspace, other: Path, storage: Storage, kind: str
) -> None:
    folder, entry = workspace.checkpoints / "step-1", STATE
    (folder / "state").unlink()
    match kind:
        case "link":
            (folder / "state").symlink_to(other / "state")
        case "pipe":
            os.mkfifo(folder / "state")
        case "folder":
            (folder / "state").mkdir()
        case "longer":
            (folder / "state").write_bytes(b"state")
            entry = FileEntry(name="state", bytes=0, sha256=SHA)
        case _:
            (folder / "to").symlink_to(other)
            entry = FileEntry(name="to/state", bytes=5, sha256=SHA)
    with pytest.raises((OSError, CorruptObject)):
        upload(storage, workspace.root, str(folder), [entry], "a/never", 5)
    assert not list(storage.keys("a/never"))


@pytest.mark.parametrize(
    "bad",
    [
        {"name": "../x"}, {"name": "a/../b"}, {"name": "/etc/passwd"}, {"name": ""}, {"name": "a//b"}, {"name": "a/"},
        {"name": "x" * 300}, {"name": "a\nb"}, {"name": "a\\b"}, {"bytes": -1}, {"sha256": "0"}, {"name": "dir"},
        {"name": "dir/ok"},
    ],
)  # fmt: skip
def test_a_manifest_that_no_store_or_backup_could_keep_is_no_event(bad: dict[str, Any]) -> None:
    good = {"name": "dir/ok", "bytes": 1, "sha256": SHA}
    said = {"type": "checkpoint", "path": "/w/checkpoints/x", "files": [good]}
    EVENTS.validate_json(json.dumps(said))
    with pytest.raises(ValidationError):
        EVENTS.validate_json(json.dumps(said | {"files": [good, good | bad]}))


def test_a_link_in_place_of_a_folder_does_not_say_whose_processes_to_end(workspace: Workspace, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root gives a workspace away")
    give(workspace, 60801)
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    os.chown(theirs, 60802, 60802)
    workspace.checkpoints.rename(workspace.root / "gone")
    workspace.checkpoints.symlink_to(theirs)
    assert workspace.owner() == 60801


@pytest.fixture
def successor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another attempt's trainer, under the uid that a dead one had."""
    if os.geteuid() != 0:
        pytest.skip("only root gives trainers uids")
    held = uids.take("60811", tmp_path)
    process = subprocess.Popen(["sleep", "60"], user=held.uid, group=held.uid, extra_groups=[])
    yield process
    process.kill()
    process.wait()
    held.release()


def test_burying_the_dead_ends_nobody_who_got_their_uid(
    workspace: Workspace, successor: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    give(workspace, 60811)
    node: Any = Node.__new__(Node)
    node._attempts, node._settings = workspace.root.parent, SimpleNamespace(home=tmp_path, trainer_cgroups="")
    mark = {"PATH": os.environ["PATH"], processes.ATTEMPT: workspace.root.name}
    left = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], env=mark)
    try:
        assert node._end_all(workspace.root.name)
        assert left.wait(5) == -9
        assert successor.poll() is None
    finally:
        left.kill()


def test_a_trainer_that_is_ended_again_ends_nobody_who_got_its_uid(workspace: Workspace, tmp_path: Path) -> None:
    """A supervisor makes sure twice: when its trainer has spoken its last word, and when all else is done."""
    if os.geteuid() != 0:
        pytest.skip("only root gives trainers uids")
    (workspace.root / "tmp").mkdir()
    (workspace.root / "data").mkdir()
    workspace.socket.touch()
    workspace.spec.write_text("{}")
    settings: Any = SimpleNamespace(
        home=tmp_path, trainer_uids="60812", trainer_module="calendar", trainer_cgroups="", trainer_processes=64,
        trainer_memory_bytes=1 << 30, max_log_bytes=1 << 20, trainer_readable="", trainer_hidden="",
        model_store=None, trainer_threads=1,
    )  # fmt: skip
    work: Any = SimpleNamespace(attempt_id=workspace.root.name, devices=(("cpu", "cpu"),), engine_socket=None)
    first = DedicatedTrainer(work, workspace, settings, Ways(Way(own_uid=True), None))
    first.start()
    assert workspace.owner() == 60812
    assert first.end()
    held = uids.take("60812", tmp_path)
    second = subprocess.Popen(["sleep", "60"], user=held.uid, group=held.uid, extra_groups=[])
    try:
        assert first.end()
        assert second.poll() is None
    finally:
        second.kill()
        second.wait()
        held.release()
