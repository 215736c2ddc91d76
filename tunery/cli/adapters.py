"""`adapters`: what came out of jobs, versioned."""

import shutil
import tempfile
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

import typer

from tunery.cli import config
from tunery.cli.failures import Exit, Failure
from tunery.cli.options import All, Json, Limit, Quiet, group, take
from tunery.cli.progress import transfer
from tunery.cli.show import ago, date, fields, listing, number, size, table
from tunery.cli.terminal import clean, data, done, json_out, say

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import Adapter, AdapterVersion, FileEntry

app = group("Adapters, the results of jobs: list, show, download.")
Name = Annotated[str, typer.Argument(metavar="NAME", help="An adapter's name or id.")]


@app.command("list")
def list_adapters(limit: Limit = 20, everything: All = False, as_json: Json = False, quiet: Quiet = False) -> None:
    """List adapters, with the newest version of each."""
    rows = take(config.client().adapters(), limit, everything)
    headers = ("NAME", "VERSION", "BASE", "SIZE", "JOB", "MADE")
    empty = "no adapters yet\n  a job that succeeds makes one:  tunery jobs create -m MODEL -t train.jsonl --watch"
    listing(rows, headers, _row, empty, right=("SIZE",), as_json=as_json, quiet=quiet)


def _row(adapter: "Adapter") -> tuple[object, ...]:
    newest = max(adapter.get("versions") or [], key=_no, default=None)
    name = adapter.get("name") or adapter["id"]
    if newest is None:
        return name, "-", "-", "-", "-", ago(adapter.get("created_at"))
    made = ago(newest.get("created_at"))
    return name, f"v{_no(newest)}", newest.get("base_model"), size(newest.get("bytes")), newest.get("job_id"), made


@app.command("show")
def show(name: Name, as_json: Json = False) -> None:
    """Show an adapter and all its versions."""
    adapter = config.client().adapter(name)
    if as_json:
        json_out(adapter)
        return
    versions = sorted(adapter.get("versions") or [], key=_no, reverse=True)
    newest = versions[0] if versions else None
    fields(
        [
            ("name", adapter.get("name")),
            ("id", adapter["id"]),
            ("created", date(adapter.get("created_at"))),
            *(_newest(newest) if newest else []),
        ]
    )
    if versions:
        data("")
        headers = ("MODEL NAME", "VERSION", "EVAL LOSS", "SIZE", "JOB", "MADE")
        table(headers, [_version_row(version) for version in versions], right=("EVAL LOSS", "SIZE"))


def _newest(version: "AdapterVersion") -> list[tuple[str, object]]:
    return [
        ("base", version.get("base_model")),
        ("uri", version.get("uri")),
        ("sha256", version.get("sha256")),
        *[("file", f"{file['name']}  {size(file['bytes'])}") for file in version.get("files") or []],
    ]


def _version_row(version: "AdapterVersion") -> tuple[object, ...]:
    loss = number((version.get("metrics") or {}).get("eval/loss"))
    made = ago(version.get("created_at"))
    name = version.get("model_name") or version["id"]
    return name, f"v{_no(version)}", loss, size(version.get("bytes")), version.get("job_id"), made


@app.command("download")
def download(
    name: Name,
    version: Annotated[int | None, typer.Option(min=1, help="Which version; else the newest.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The folder to make; else NAME-vN.")] = None,
) -> None:
    """Download an adapter's folder in PEFT's layout. Every file is checked; the folder appears whole or not at all."""
    api = config.client()
    adapter = api.adapter(name)
    chosen = _choose(adapter, version)
    target = output or Path(f"{_folder(adapter)}-v{_no(chosen)}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise Failure(
            f"{target} exists already",
            why="a download does not mix with files that are there",
            fix=f"Move it away, or choose another folder: tunery adapters download {name} -o DIR",
            code="file_exists",
            exit_code=Exit.OTHER,
        )
    _fetch(api, name, chosen, target)
    data(str(target))
    done(f"{len(chosen.get('files') or [])} files, {size(chosen.get('bytes'))}, every sha256 as recorded")
    say(f"  load   PeftModel.from_pretrained(base, {str(target)!r})")


def _choose(adapter: "Adapter", version: int | None) -> "AdapterVersion":
    versions = {_no(found): found for found in adapter.get("versions") or []}
    wanted = version if version is not None else max(versions, default=0)
    if wanted in versions:
        return versions[wanted]
    has = ", ".join(f"v{no}" for no in sorted(versions)) or "no version yet"
    raise Failure(
        f"{adapter.get('name')} has no version {wanted or ''}".rstrip(),
        why=f"it has {has}",
        fix=f"tunery adapters show {adapter.get('name')}",
        code="adapter_version_not_found",
        exit_code=Exit.NOT_FOUND,
    )


def _fetch(api: "Client", name: str, version: "AdapterVersion", target: Path) -> None:
    files = version.get("files") or []
    target.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that the rename at the end stays within one filesystem.
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    try:
        total, before = sum(file["bytes"] for file in files), 0
        with transfer(f"Downloading {clean(target.name)}", total) as on_bytes:
            for file in files:
                path = _inside(part, file)
                base = before
                api.download_adapter_file(
                    name, _no(version), file, path, on_bytes=lambda moved, _, base=base: on_bytes(base + moved, total)
                )
                before += file["bytes"]
        part.chmod(0o755)
        part.replace(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _inside(folder: Path, file: "FileEntry") -> Path:
    """A name from the server must not lead out of the folder."""
    relative = PurePosixPath(file["name"])
    if relative.is_absolute() or ".." in relative.parts or "\\" in file["name"] or not relative.parts:
        raise Failure(
            "the server named a file outside of the folder",
            why=repr(file["name"]),
            fix="Do not use this adapter; tell your operator.",
            code="unsafe_file_name",
            exit_code=Exit.OTHER,
        )
    path = folder / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _no(version: "AdapterVersion") -> int:
    return version.get("version", 0)


def _folder(adapter: "Adapter") -> str:
    return clean(adapter.get("name") or adapter["id"]).replace("/", "-").replace("\\", "-").lstrip(".") or "adapter"
