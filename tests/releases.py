"""The last release's tree: by its tag, or, in a clone without tags, by the commit that CHANGELOG.md names for it."""

import re
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
_FETCH = "git fetch --tags --unshallow (in a full clone: git fetch --tags)"
_ENTRY = re.compile(r"^## \[(\d+\.\d+\.\d+)\][^\n]*\n+Commit: ([0-9a-f]{40})$", re.MULTILINE)


@dataclass(frozen=True)
class Release:
    version: str
    commit: str


def newest() -> Release:
    """The newest release before this commit; at the first release itself, that one."""
    before = ("tag", "--list", "v[0-9]*", "--merged", "HEAD", "--sort=-v:refname")
    tags = (_git(*before, "--no-contains", "HEAD") or _git(*before)).split()
    if tags:
        return Release(tags[0].removeprefix("v"), _git("rev-parse", f"{tags[0]}^{{commit}}"))
    entry = _ENTRY.search((ROOT / "CHANGELOG.md").read_text())
    assert entry, "CHANGELOG.md names no release with its commit"
    return Release(entry[1], entry[2])


def extract(release: Release, folder: Path) -> Path:
    """The release's files in `folder`. Fails, saying what would help, where the clone does not have them."""
    found = subprocess.run(["git", "cat-file", "-e", f"{release.commit}^{{commit}}"], cwd=ROOT, capture_output=True)
    assert found.returncode == 0, f"{release.commit} ({release.version}) is not in this clone\nfix: {_FETCH}"
    archive = folder / "tree.tar"
    _git("archive", "--format=tar", f"--output={archive}", release.commit)
    with tarfile.open(archive) as tar:
        tar.extractall(folder / "tree", filter="data")
    archive.unlink()
    return folder / "tree"


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}\nfix: run the tests in a git clone"
    return done.stdout.strip()
