"""`tunery`: the command line. A client of the API, quick to start: heavy libraries load inside commands."""

import importlib
import sys
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from tunery import __version__
from tunery.cli import (
    account,
    adapters,
    config,
    files,
    gpus,
    job_create,
    job_estimate,
    job_follow,
    jobs,
    models,
    nodes,
    projects,
    queue,
    terminal,
    usage,
)
from tunery.cli.failures import explained

_SECTIONS = {
    "A server on this machine": ("up", "down", "status", "doctor", "logs", "db"),
    "Account": ("login", "logout", "whoami"),
    "Fine-tuning": ("models", "files", "jobs", "queue", "adapters"),
    "Machines": ("nodes", "node", "gpus"),
    "Who gets what": ("usage", "budget", "storage", "project", "org", "audit"),
}
_JOBS = (
    "create",
    "estimate",
    "watch",
    "wait",
    "list",
    "show",
    "why",
    "logs",
    "events",
    "checkpoints",
    "priority",
    "cancel",
    "delete",
)
_ANYWHERE = ("--api-url", "--profile")

EPILOG = """\b
Examples:
  tunery jobs create -m smollm2-135m-instruct -t train.jsonl --watch
  tunery jobs list -q | xargs tunery jobs wait
  tunery adapters download my-adapter
\b
Data goes to stdout, everything else to stderr; --json prints one document.
Exit codes: 0 ok, 1 other, 2 usage, 3 job failed, 4 not allowed, 5 not found, 6 invalid,
7 quota or rate limit, 8 wait timed out, 9 unreachable, 10 job cancelled, 130 interrupted.
Learn more: docs/README.md
"""


class Root(TyperGroup):
    """Groups the commands in `--help`, and turns every error into four parts and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        with explained():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        left = dict(self.commands)
        sections = {title: [name for name in names if name in left] for title, names in _SECTIONS.items()}
        named = {name for names in sections.values() for name in names}
        sections["Other"] = [name for name in left if name not in named]
        width = max(len(name) for name in left)
        for title, names in sections.items():
            rows = [(name.ljust(width), left[name].get_short_help_str(80)) for name in names if not left[name].hidden]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)


app = typer.Typer(
    cls=Root,
    help="Fine-tune models on your own GPUs.",
    epilog=EPILOG,
    no_args_is_help=True,
    rich_markup_mode=None,  # help is plain text: it is ready in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


@app.callback()
def root(
    api_url: Annotated[str | None, typer.Option(metavar="URL", help="The server; else TUNERY_API_URL.")] = None,
    profile: Annotated[
        str | None, typer.Option(metavar="NAME", help="A stored login; else TUNERY_PROFILE. Both may stand anywhere.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)] = False,
) -> None:
    if version:
        terminal.data(f"tunery {__version__}")
        raise typer.Exit
    config.FLAGS.api_url = api_url
    config.FLAGS.profile = profile


@app.command("version")
def show_version(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document.")] = False) -> None:
    """Print the version."""
    if as_json:
        terminal.json_out({"version": __version__})
    else:
        terminal.data(f"tunery {__version__}")


def _local_commands() -> None:
    """`up`, `down` and the like: present wherever their module is."""
    try:
        local = importlib.import_module("tunery.cli.local")
    except ModuleNotFoundError as missing:
        if missing.name != "tunery.cli.local":
            raise
    else:
        local.register(app)


def _globals_first(argv: list[str]) -> list[str]:
    """`--api-url` and `--profile` belong to the root command; people write them where they think of them."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(argv)
    for word in words:
        if word == "--":
            return [*first, *rest, word, *words]
        if word in _ANYWHERE:
            first += [word, *[value for value in [next(words, None)] if value is not None]]
        elif word.startswith(tuple(f"{name}=" for name in _ANYWHERE)):
            first.append(word)
        else:
            rest.append(word)
    return [*first, *rest]


_local_commands()
account.register(app)
app.add_typer(models.app, name="models")
app.add_typer(files.app, name="files")
app.add_typer(jobs.app, name="jobs")
app.add_typer(queue.app, name="queue")
app.add_typer(adapters.app, name="adapters")
usage.register(app)
nodes.register(app)
app.add_typer(gpus.app, name="gpus")
projects.register(app)
job_create.register(jobs.app)
job_estimate.register(jobs.app)
job_follow.register(jobs.app)
jobs.app.registered_commands.sort(key=lambda command: _JOBS.index(command.name or ""))


def main() -> None:
    terminal.utf8_or_replace()
    try:
        app(args=_globals_first(sys.argv[1:]), prog_name="tunery")
    except KeyboardInterrupt:  # before any command began
        sys.exit(130)
