"""The walls around one attempt's trainer: its uid, its share of the workspace, its cgroup. Opened once, closed once."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import structlog

from tunery.settings import NodeSettings
from worker import inventory
from worker.isolation import limits, sight, uids, walls
from worker.isolation.walls import Program, Way
from worker.workspace import Workspace

log = structlog.get_logger(__name__)


class Cell:
    """`way` is None where the operator wants no walls: the trainer is then an ordinary child."""

    def __init__(self, name: str, workspace: Workspace, settings: NodeSettings, way: Way | None) -> None:
        self._name, self._workspace, self._settings, self._way = name, workspace, settings, way
        self._held: uids.HeldUid | None = None
        self._groups: list[Path] = []
        self._marks: Mapping[str, str] = {}

    @property
    def uid(self) -> int | None:
        """The trainer's own, if it has one, until `close`."""
        return self._held.uid if self._held else None

    def open(self, argv: Sequence[str], marks: Mapping[str, str], devices: Sequence[str]) -> list[str]:
        """Get everything ready; returns the command that starts `argv`. Raises OSError.

        `marks` come into the trainer's environment alone: whoever looks for its processes finds no launcher.
        """
        if self._way is None:
            self._marks = marks
            return list(argv)
        if self._way.own_uid:
            self._held = uids.take(self._settings.trainer_uids, self._settings.home)
            self._workspace.give(self._held.uid)
            if self._way.view != "closed":
                for folder in (self._workspace.root.parent, self._settings.home):
                    folder.chmod(0o711)  # it walks through, and reads nothing on the way
        self._groups = self._make_groups()
        workspace = self._workspace
        program = Program(
            argv=argv,
            cwd=workspace.root,
            scratch=workspace.root / "tmp",
            marks=marks,
            readable=self._readable(),
            writable=[*map(str, workspace.writable()), *_latches()],
            hidden=[str(self._settings.home), *_split(self._settings.trainer_hidden)],
            devices=sight.nvidia(inventory.minors(devices)) if devices else [],
            limits=limits.rlimits(
                processes=self._settings.trainer_processes if self._held else None,
                data_bytes=None if devices or self._groups else self._memory(),
            ),
            uid=self.uid,
        )
        return walls.command(self._way, program)

    def environment(self) -> Mapping[str, str]:
        """What the trainer needs that its launcher does not set."""
        return self._marks

    def enter(self) -> None:
        """In the child, before it executes anything."""
        limits.enter(self._groups)

    def exit_code(self, code: int) -> int:
        """As `Popen` gives it: launchers say 128 + N for signal N."""
        return 128 - code if self._way is not None and code > 128 else code

    def close(self) -> None:
        """Everything has been ended. Idempotent. The uid may be somebody else's at once: here it is forgotten."""
        limits.end(self._groups)
        self._groups = []
        if self._held is not None:
            held, self._held = self._held, None
            held.release()

    def _make_groups(self) -> list[Path]:
        folders = limits.parents(self._settings.trainer_cgroups)
        try:
            return limits.make(folders, self._name, self._memory(), self._settings.trainer_processes)
        except OSError as error:
            log.warning("no cgroup for this trainer; rlimits instead", error=str(error))
            return []

    def _memory(self) -> int:
        return self._settings.trainer_memory_bytes or inventory.usable_memory()

    def _readable(self) -> list[str]:
        store = self._settings.model_store or self._settings.home / "models"
        more = [store, *_split(self._settings.trainer_readable)]
        given = [str(path) for path in self._workspace.given() if path.exists()]
        return [*sight.readable(self._settings.trainer_module, more), *given]


def _latches() -> list[str]:
    """Where a failpoint of a trainer leaves its file; only tests allow failpoints."""
    folder = os.environ.get("TUNERY_FAILPOINT_DIR", "")
    if not folder or os.environ.get("TUNERY_FAILPOINTS_ALLOWED") != "1":
        return []
    Path(folder).chmod(0o1777)
    return [folder]


def _split(paths: str) -> list[str]:
    return [path for path in paths.split(os.pathsep) if path]
