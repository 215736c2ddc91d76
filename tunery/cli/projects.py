"""`project`, `org`, `audit`: what each may have of the GPUs, and who changed what."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import All, Json, Limit, Quiet, group, take
from tunery.cli.show import date, fields, listing
from tunery.cli.terminal import done, json_out, one_line, say

if TYPE_CHECKING:
    from tunery.client.shapes import AuditEntry, Organization, Project, ProjectName

projects = group("Projects: what each may have of the GPUs.")
organizations = group("Organizations: what all projects of one together may have.")

Named = Annotated[str | None, typer.Argument(metavar="NAME", help="Name, ORGANIZATION:NAME or id; else your own.")]
OrgNamed = Annotated[str | None, typer.Argument(metavar="NAME", help="Name or id; else your own.")]
Weight = Annotated[float | None, typer.Option(help="Twice the weight gets twice the share, while both wait.")]
Guarantee = Annotated[float | None, typer.Option(help="GPUs (times class cost) that come before anybody's share.")]
Cap = Annotated[float | None, typer.Option(help="GPUs (times class cost) that are never exceeded.")]
NoCap = Annotated[bool, typer.Option("--no-cap", help="Take the cap away.")]


def register(root: typer.Typer) -> None:
    root.add_typer(projects, name="project")
    root.add_typer(organizations, name="org")
    root.command("audit")(audit)


@projects.command("list")
def list_projects(as_json: Json = False, quiet: Quiet = False) -> None:
    """List every project of the deployment. Needs a key with the scope admin."""
    rows = list(config.client().projects())
    headers = ("NAME", "ORGANIZATION", "STATUS", "GUARANTEE", "ID")
    listing(rows, headers, _row, "no projects", right=("GUARANTEE",), as_json=as_json, quiet=quiet)


def _row(one: "ProjectName") -> tuple[object, ...]:
    organization = (one.get("organization") or {}).get("name")
    return one.get("name"), organization, one.get("status"), f"{one.get('guarantee', 0):g}", one["id"]


@projects.command("show")
def show_project(name: Named = None, as_json: Json = False) -> None:
    """Show a project's weight, guarantee, cap and limit."""
    _show_project(config.client().project(name or _own("project")), as_json)


@projects.command("set")
def set_project(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name, ORGANIZATION:NAME or id.")],
    weight: Weight = None,
    guarantee: Guarantee = None,
    cap: Cap = None,
    no_cap: NoCap = False,
    max_running: Annotated[int | None, typer.Option(help="Jobs that run at once.")] = None,
    no_max_running: Annotated[bool, typer.Option("--no-max-running", help="Take that limit away.")] = False,
    as_json: Json = False,
) -> None:
    """Set what a project may have; what is not named stays. Needs a key with the scope admin."""
    changes = _changes(weight, guarantee, cap, no_cap)
    if max_running is not None or no_max_running:
        changes["max_running_jobs"] = _either("max-running", max_running, no_max_running)
    _something(changes, "project", name)
    found = config.client().set_project(name, changes)
    if not as_json:
        done(f"{found.get('name')} of {(found.get('organization') or {}).get('name')} is changed")
    _show_project(found, as_json)


def _show_project(found: "Project", as_json: bool) -> None:
    if as_json:
        json_out(found)
        return
    limit, cluster = found.get("max_running_jobs"), found.get("cluster") or {}
    fields(
        [
            ("project", found.get("name")),
            ("organization", (found.get("organization") or {}).get("name")),
            ("id", found["id"]),
            ("status", found.get("status")),
            *_share(found),
            ("jobs at once", "no limit" if limit is None else limit),
            ("blocked", found.get("blocked")),
            (
                "cluster",
                f"{_gpus(cluster.get('total', 0))} in all, {cluster.get('guaranteed', 0):g} of them guaranteed",
            ),
        ]
    )
    if cluster.get("total") and cluster.get("guaranteed", 0) > cluster["total"]:
        say("warning: more is guaranteed than there are GPUs; some have gone since")


@organizations.command("show")
def show_organization(name: OrgNamed = None, as_json: Json = False) -> None:
    """Show an organization's weight, guarantee and cap."""
    _show_organization(config.client().organization(name), as_json)


@organizations.command("set")
def set_organization(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name or id.")],
    weight: Weight = None,
    guarantee: Guarantee = None,
    cap: Cap = None,
    no_cap: NoCap = False,
    as_json: Json = False,
) -> None:
    """Set what all projects of an organization together may have. Needs a key with the scope admin."""
    changes = _changes(weight, guarantee, cap, no_cap)
    _something(changes, "org", name)
    found = config.client().set_organization(name, changes)
    if not as_json:
        done(f"{found.get('name')} is changed")
    _show_organization(found, as_json)


def _show_organization(found: "Organization", as_json: bool) -> None:
    if as_json:
        json_out(found)
    else:
        fields([("organization", found.get("name")), ("id", found["id"]), *_share(found)])


def _share(found: "Project | Organization") -> list[tuple[str, object]]:
    cap = found.get("cap")
    return [
        ("weight", f"{found.get('weight', 1):g}"),
        ("guarantee", _gpus(found.get("guarantee", 0))),
        ("cap", "none" if cap is None else _gpus(cap)),
    ]


def _gpus(rate: float) -> str:
    """Of cost 1; one of a class with cost 2 counts twice."""
    return f"{rate:g} GPU{'' if rate == 1 else 's'}"


def audit(
    target: Annotated[str | None, typer.Argument(metavar="TARGET", help="Only what was done to this one.")] = None,
    limit: Limit = 20,
    everything: All = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Show what admins changed: who, what, from what to what. Needs a key with the scope admin."""
    rows = take(config.client().audit(target=target), limit, everything)
    headers = ("WHEN", "ACTION", "KEY", "TARGET", "CHANGE")
    listing(rows, headers, _entry, "nothing has been changed", as_json=as_json, quiet=quiet, below=True)


def _entry(one: "AuditEntry") -> tuple[object, ...]:
    before, after = one.get("before") or {}, one.get("after") or {}
    changes = [
        f"{name}: {_value(before[name])} -> {_value(after.get(name))}" if name in before else f"{name}: {_value(value)}"
        for name, value in (after or before).items()
        if name not in before or before[name] != after.get(name)
    ]
    key = (one.get("key") or {}).get("name")
    return date(one.get("created_at")), one.get("action"), key, one.get("target"), one_line(", ".join(changes), 300)


def _value(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "none"
    return f"{value:g}" if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def _own(kind: str) -> str:
    identity: Any = config.client().whoami()
    return str(identity[kind]["id"])


def _changes(weight: float | None, guarantee: float | None, cap: float | None, no_cap: bool) -> dict[str, Any]:
    given = {"weight": weight, "guarantee": guarantee}
    changes: dict[str, Any] = {field: value for field, value in given.items() if value is not None}
    if cap is not None or no_cap:
        changes["cap"] = _either("cap", cap, no_cap)
    return changes


def _either(option: str, value: float | None, none: bool) -> float | None:
    if value is not None and none:
        raise Failure(
            f"--{option} and --no-{option} contradict each other",
            why="one sets it, the other takes it away",
            fix=f"use one of them: --no-{option}",
            code="contradicting_options",
            exit_code=Exit.USAGE,
        )
    return value


def _something(changes: dict[str, Any], kind: str, name: str) -> None:
    if not changes:
        raise Failure(
            "nothing is to be changed",
            why="no option names a setting",
            fix=f"tunery {kind} set {name} --weight 2     (or --guarantee, --cap, ...)",
            code="nothing_to_change",
            exit_code=Exit.USAGE,
        )
