"""`python -m tunery.embedded up|down|status|doctor|logs`: the process behind the command line's local commands."""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tunery.embedded import doctor, joined, status, supervisor
from tunery.embedded.console import Console, Tail
from tunery.embedded.home import CHECKOUT, AlreadyRunning, Home, default_home
from tunery.embedded.identity import run_as
from tunery.embedded.problems import Refused
from tunery.embedded.programs import import_path
from tunery.embedded.readable import readable
from tunery.embedded.servers import External

_LOG_NAMES = (*status.SERVICES, "up")
_START_TIMEOUT_S = 180


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        home = Home(default_home(os.environ), run_as(os.environ.get("TUNERY_RUN_AS")))
        return options.command(home, options)
    except AlreadyRunning as running:
        sys.stderr.write(f"{running.text()}\n")
        return 1
    except Refused as refused:
        sys.stderr.write(f"{refused.text()}\n")
        return 1
    except KeyboardInterrupt:
        return 130


def _up(home: Home, options: argparse.Namespace) -> int:
    if home.holder() is not None:
        sys.stderr.write(f"tunery is already running here\n{status.text(status.report(home))}\n")
        return 0
    external = External.from_environment(os.environ)
    console = Console()
    api_port = supervisor.choose_api_port(home, options.port)
    if not options.detached_child:  # whose starter has just said it all
        supervisor.check(home, external, api_port, console, options.programs)
    home.create()
    if options.detach:
        return _detach(home, api_port, options.programs)
    how = supervisor.How(api_port=api_port, programs=options.programs, detached=options.detached_child)
    supervisor.Supervisor(home, external, console, how).run()
    return 0


def _detach(home: Home, api_port: int, programs: Path) -> int:
    """Start the same command in a session of its own, relay what it says until it is ready, and leave it."""
    log = home.logs / "up.log"
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    argv = [sys.executable, "-P", "-m", "tunery.embedded", "up", "--detached-child", "--port", str(api_port)]
    argv += ["--programs", str(programs)]
    environment = os.environ | {"TUNERY_HOME": str(home.root), "PYTHONPATH": import_path()}
    started = subprocess.Popen(
        argv,
        env=environment,
        cwd=home.root,
        stdin=subprocess.DEVNULL,
        stdout=descriptor,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    os.close(descriptor)
    tail, deadline = Tail("up", log), time.monotonic() + _START_TIMEOUT_S
    tail.rewind()
    while time.monotonic() < deadline:
        code = started.poll()
        is_ready = code is None and home.holder() == started.pid and home.state().get("ready")
        for line in tail.read():
            sys.stderr.write(f"{line}\n")
        if code is not None:
            return code or 1
        if is_ready:
            sys.stderr.write(status.banner(home))
            return 0
        time.sleep(0.05)
    raise Refused(
        "the start takes too long", why=f"Not ready after {_START_TIMEOUT_S} s.", fix=f"read {log}; tunery down"
    )


def _down(home: Home, options: argparse.Namespace) -> int:
    if options.purge and not options.yes and not _confirmed(home):
        sys.stderr.write("nothing was deleted\n")
        return 1
    stopped = supervisor.stop_running(home)
    sys.stderr.write("tunery is stopped\n" if stopped else f"tunery was not running (home {home.root})\n")
    if options.purge:
        home.purge()
        left = "; files that are not ours stay" if home.root.exists() else ""
        sys.stderr.write(f"the data of {home.root} are deleted{left}\n")
    return 0


def _confirmed(home: Home) -> bool:
    sys.stderr.write(f"Delete {home.root}: database, files, adapters, keys? Type yes: ")
    sys.stderr.flush()
    return sys.stdin.readline().strip() == "yes"


def _status(home: Home, options: argparse.Namespace) -> int:
    if options.env:
        if not home.profile.exists():
            raise Refused("there is no key yet", why=f"{home.profile} is not there.", fix="tunery up -d")
        sys.stdout.write(f"{status.exports(home)}\n")
        return 0
    found = status.report(home)
    sys.stdout.write(f"{json.dumps(found, indent=2) if options.json else status.text(found)}\n")
    return 0 if found["running"] else 9


def _doctor(home: Home, options: argparse.Namespace) -> int:
    port = supervisor.choose_api_port(home, options.port)
    checks = doctor.examine(home, External.from_environment(os.environ), port)
    if options.json:
        sys.stdout.write(f"{json.dumps({'checks': [one.as_json() for one in checks]}, indent=2)}\n")
    else:
        width = max(len(one.name) for one in checks)
        for one in checks:
            fix = f"\n{'':8}fix: {one.fix}" if one.fix else ""
            sys.stdout.write(f"{one.level:<5} {one.name:<{width}}  {one.detail}{fix}\n")
    return 1 if any(one.level is doctor.Level.FAIL for one in checks) else 0


def _logs(home: Home, options: argparse.Namespace) -> int:
    names = options.services or ["api", "scheduler", "node"]
    if unknown := sorted(set(names) - set(_LOG_NAMES)):
        raise Refused(
            f"no service {unknown[0]!r}", why="Logs are kept by service.", fix=f"one of {', '.join(_LOG_NAMES)}"
        )
    tails = [Tail(name, home.logs / f"{name}.log", lines=options.lines) for name in names]
    console = Console(sys.stdout)
    for tail in tails:
        for line in tail.last:
            _print_line(console, tail, line, options, alone=len(tails) == 1)
    with contextlib.suppress(KeyboardInterrupt):
        while options.follow:
            for tail in tails:
                for line in tail.read():
                    _print_line(console, tail, line, options, alone=len(tails) == 1)
            time.sleep(0.2)
    return 0


def _print_line(console: Console, tail: Tail, line: str, options: argparse.Namespace, *, alone: bool) -> None:
    line = line if options.json else readable(line)
    if alone:
        console.plain(line)
    else:
        console.say(line, tail.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunery.embedded", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    up = commands.add_parser("up", help="start the servers and the programs")
    up.add_argument("-d", "--detach", action="store_true")
    up.add_argument("--detached-child", action="store_true", help=argparse.SUPPRESS)
    up.add_argument("--programs", type=Path, default=CHECKOUT, help=argparse.SUPPRESS)  # tests bring small ones
    up.add_argument("--port", type=int, default=_int_or_none(os.environ.get("TUNERY_API_PORT")))
    up.set_defaults(command=_up)

    down = commands.add_parser("down", help="stop them in order")
    down.add_argument("--purge", action="store_true", help="and delete all data")
    down.add_argument("-y", "--yes", action="store_true")
    down.set_defaults(command=_down)

    show = commands.add_parser("status", help="what runs")
    show.add_argument("--json", action="store_true")
    show.add_argument("--env", action="store_true", help="export lines for eval; holds the key")
    show.set_defaults(command=_status)

    examine = commands.add_parser("doctor", help="what this machine offers and lacks")
    examine.add_argument("--json", action="store_true")
    examine.add_argument("--port", type=int, default=_int_or_none(os.environ.get("TUNERY_API_PORT")))
    examine.set_defaults(command=_doctor)

    logs = commands.add_parser("logs", help="the programs' logs")
    logs.add_argument("services", nargs="*", metavar="SERVICE", help=", ".join(_LOG_NAMES))
    logs.add_argument("-f", "--follow", action="store_true")
    logs.add_argument("-n", "--lines", type=int, default=50)
    logs.add_argument("--json", action="store_true", help="the lines as they were written")
    logs.set_defaults(command=_logs)

    joined.add_parsers(commands)
    return parser


def _int_or_none(text: str | None) -> int | None:
    return int(text) if text else None


if __name__ == "__main__":
    sys.exit(main())
