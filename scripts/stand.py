"""`make stand`: a fresh clone is set up and used in four ways; a table says what came of each.

    root          as root
    closed-home   as root, with the clone below a home that nobody else may enter (0700)
    user          as an ordinary user, with a home of its own
    by-url        as root, with PostgreSQL, Valkey and S3 given by URL: `tunery db init`, then `tunery up`

Each one: git clone, make setup, tunery doctor, tunery up -d, one small job, tunery down, everything deleted. Name some
to run only those. Not being root, it runs `user` alone, as that user. `--demo` runs `make demo` as the job.
The other user is `--user`, by default nobody. Downloads come from pip's cache where that user has one.
"""

import argparse
import json
import os
import pwd
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
WAYS = ("root", "closed-home", "user", "by-url")
_STEP_LIMIT_S = 900
_SMALL_BASE = "import sys; from pathlib import Path; from tests.tiny_model import write_tiny_base; "
_SMALL_BASE += "write_tiny_base(Path(sys.argv[1]))"
_SERVERS = """
import sys
from pathlib import Path
from tunery.embedded.home import Home
from tunery.embedded.identity import run_as
from tunery.embedded.servers import Servers
home = Home(Path(sys.argv[1]), run_as(None))
home.create()
servers = Servers(home)
servers.start()
key = servers.s3_root
print(servers.admin_url, servers.redis_url, key.endpoint_url, key.access_key_id, key.secret_access_key, flush=True)
sys.stdin.read()
servers.stop()
"""


class Failed(Exception):
    """A step that did not work; the text is the end of what it said."""


@dataclass
class Stand:
    """One way: a folder of its own, a user, an environment; and how long each step took."""

    way: str
    folder: Path
    user: pwd.struct_passwd | None
    log: Path
    more: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def clone(self) -> Path:
        return self.folder / "home" / "tunery"

    def run(self, step: str, *command: str) -> str:
        """stdout of a command in the clone. Everything else goes to the log."""
        began = time.monotonic()
        with self.log.open("a") as log:
            log.write(f"\n$ {shlex.join(command)}\n")
            log.flush()
            done = subprocess.run(
                command,
                cwd=self.clone if self.clone.exists() else self.clone.parent,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                timeout=_STEP_LIMIT_S,
                **self._identity(),
            )
            log.write(done.stdout)
        self.seconds[step] = self.seconds.get(step, 0) + time.monotonic() - began
        if done.returncode:
            raise Failed(f"{shlex.join(command)} ended with {done.returncode}; read {self.log}")
        return done.stdout

    def tunery(self, step: str, *arguments: str) -> str:
        return self.run(step, str(self.clone / ".venv/bin/tunery"), *arguments)

    def _environment(self) -> dict[str, str]:
        """Nothing of the caller's deployment; pip's settings, and its cache where it is the same user's."""
        kept = {
            name: value for name, value in os.environ.items() if not name.startswith(("TUNERY_", "PG", "VIRTUAL_ENV"))
        }
        home = self.folder / "home"
        own = {"HOME": str(home), "USER": self.user.pw_name if self.user else "root"}
        if self.user is None:
            own["PIP_CACHE_DIR"] = os.environ.get("PIP_CACHE_DIR", str(Path("~/.cache/pip").expanduser()))
        return kept | own | self.more

    def _identity(self) -> dict[str, object]:
        if self.user is None or os.geteuid() != 0:
            return {}
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": [], "umask": 0o022}


def main() -> int:
    options = _parser().parse_args()
    ways = [way for way in WAYS if way in (options.ways or WAYS)]
    if os.geteuid() != 0:
        ways = ["user"]
    rows = []
    for way in ways:
        rows.append(_one(way, options))
        _print(rows)
    return 0 if all(row[1] == "ok" for row in rows) else 1


def _one(way: str, options: argparse.Namespace) -> tuple[str, str, dict[str, float]]:
    folder = Path(tempfile.mkdtemp(prefix=f"tunery-stand-{way}-"))
    folder.chmod(0o755)
    user = pwd.getpwnam(options.user) if way == "user" and os.geteuid() == 0 else None
    stand = Stand(way, folder, user, folder / "stand.log")
    _say(f"{way}: {folder}")
    try:
        _make_home(stand, closed=way in ("closed-home", "user"))
        stand.run("clone", "git", "clone", "--quiet", str(_source(folder)), str(stand.clone))
        stand.run("setup", "make", "setup")
        with _given_servers(stand) if way == "by-url" else _nothing():
            _use(stand, demo=options.demo)
    except (Failed, subprocess.TimeoutExpired) as error:
        _say(f"{way}: {error}")
        return way, "FAILED: " + list(stand.seconds)[-1], stand.seconds
    shutil.rmtree(folder)
    return way, "ok", stand.seconds


def _use(stand: Stand, *, demo: bool) -> None:
    stand.tunery("doctor", "doctor")
    try:
        if demo:
            stand.run("demo", "make", "demo")
        else:
            stand.tunery("up", "up", "-d", "--port", str(_free_port()))
            _small_job(stand)
        services = json.loads(stand.tunery("status", "status", "--json"))["services"]
        _check(services, by_url=stand.way == "by-url")
    finally:  # a failed one leaves its folder to be read, and nothing that runs
        stand.tunery("down", "down", "--purge", "--yes")


def _small_job(stand: Stand) -> None:
    """A random model of two layers, ten steps: that it works, not how fast."""
    base, rows = stand.folder / "home" / "tiny", stand.clone / "examples"
    stand.run("job", str(stand.clone / ".venv/bin/python"), "-c", _SMALL_BASE, str(base))
    stand.tunery("job", "models", "import", f"path:{base}", "--name", "tiny")
    stand.tunery(
        "job", "jobs", "create", "-m", "tiny", "-t", str(rows / "train.jsonl"), "--suffix", "stand",
        "--max-steps", "10", "--watch",
    )  # fmt: skip
    stand.tunery("job", "adapters", "download", "stand", "-o", str(stand.folder / "home" / "stand"))


def _check(services: dict[str, object], *, by_url: bool) -> None:
    programs = {"api", "scheduler", "node"}
    expected = programs if by_url else programs | {"postgres", "valkey", "s3"}
    if services.keys() != expected:
        raise Failed(f"these run: {', '.join(services)}; expected: {', '.join(expected)}")


@contextmanager
def _given_servers(stand: Stand) -> Iterator[None]:
    """Servers that are not those of `tunery up`; the database is prepared with an admin URL, which then goes away."""
    python = str(stand.clone / ".venv/bin/python")
    with tempfile.TemporaryDirectory(prefix="tunery-stand-servers-") as home:
        Path(home).chmod(0o755)
        process = subprocess.Popen(
            [python, "-c", _SERVERS, f"{home}/servers"],
            cwd=stand.clone,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout and process.stdin
        try:
            if len(said := process.stdout.readline().split()) != 5:
                raise Failed("the servers to be given by URL did not start")
            admin, redis, s3, key_id, secret = said
            file = stand.folder / "home" / "tunery.env"
            stand.more = {"TUNERY_ADMIN_DATABASE_URL": admin}
            stand.tunery("db init", "db", "init", "--env-file", str(file))
            made = (line.partition("=") for line in file.read_text().splitlines())
            stand.more = {name: value.strip("'") for name, _, value in made}
            stand.more |= {"TUNERY_REDIS_URL": redis, "TUNERY_S3_ENDPOINT_URL": s3}
            stand.more |= {"TUNERY_S3_ACCESS_KEY_ID": key_id, "TUNERY_S3_SECRET_ACCESS_KEY": secret}
            yield
        finally:
            process.stdin.close()
            process.wait(60)


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _make_home(stand: Stand, *, closed: bool) -> None:
    home = stand.folder / "home"
    home.mkdir()
    stand.log.touch(mode=0o600)
    if stand.user:
        os.chown(home, stand.user.pw_uid, stand.user.pw_gid)
    home.chmod(0o700 if closed else 0o755)


def _source(folder: Path) -> Path:
    """A bundle of this checkout's HEAD: whoever clones it need not be able to read the checkout."""
    bundle = folder / "source.bundle"
    subprocess.run(
        ["git", "-C", str(CHECKOUT), "bundle", "create", "--quiet", str(bundle), "HEAD"],
        check=True,
        capture_output=True,
    )
    bundle.chmod(0o644)
    return bundle


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _print(rows: list[tuple[str, str, dict[str, float]]]) -> None:
    steps = list(dict.fromkeys(step for _, _, seconds in rows for step in seconds))
    lines = [["WAY", *(step.upper() for step in steps), "RESULT"]]
    for way, result, seconds in rows:
        lines.append([way, *(f"{seconds[step]:.1f} s" if step in seconds else "-" for step in steps), result])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    _say("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines))


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ways", nargs="*", metavar="WAY", choices=[*WAYS, []], help=", ".join(WAYS))
    parser.add_argument("--user", default="nobody", help="who `user` is")
    parser.add_argument("--demo", action="store_true", help="make demo instead of a small job")
    return parser


if __name__ == "__main__":
    sys.exit(main())
