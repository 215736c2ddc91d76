"""`files`: training data and results on the server."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunery.cli import config, refs
from tunery.cli.failures import Exit, Failure, reason
from tunery.cli.options import All, FileRef, Json, Limit, Quiet, group, take
from tunery.cli.progress import transfer
from tunery.cli.show import ago, date, fields, listing, size
from tunery.cli.terminal import clean, data, done, json_out, say

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.shapes import File

app = group("Training files: upload, list, show, download, delete.")


@app.command("upload")
def upload(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A JSONL file, one example a line.")],
    purpose: Annotated[str, typer.Option(help="What it is for, in OpenAI's words.")] = "fine-tune",
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Upload a file and print its id."""
    local_file(path)
    file = send(config.client(), path, purpose)
    if as_json:
        json_out(file)
        return
    data(file["id"])
    if not quiet:
        done(f"uploaded {clean(path.name)}, {size(file.get('bytes'))}")
        say(f"  next   tunery jobs create -m MODEL -t {file['id']}")


def local_file(path: Path) -> Path:
    """Refuses what could never be uploaded, before anything is sent."""
    if path.is_file() and path.stat().st_size > 0:
        return path
    why = "it is empty" if path.is_file() else "it is a folder" if path.is_dir() else "there is no such file"
    raise Failure(
        f"{path} cannot be uploaded",
        why=why,
        fix="Give the path of a JSONL file: one JSON object a line, each with its messages.",
        code="local_file",
        exit_code=Exit.INVALID if path.is_file() else Exit.USAGE,
    )


def send(api: "Client", path: Path, purpose: str = "fine-tune") -> "File":
    with transfer(f"Uploading {clean(path.name)}", path.stat().st_size) as on_bytes:
        return api.upload_file(path, purpose=purpose, on_bytes=on_bytes)


@app.command("list")
def list_files(
    purpose: Annotated[str | None, typer.Option(help="Only those for this purpose.")] = None,
    limit: Limit = 20,
    everything: All = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """List files, newest first."""
    rows = take(config.client().files(purpose=purpose), limit, everything)
    headers = ("ID", "NAME", "SIZE", "PURPOSE", "STATUS", "ADDED")
    empty = "no files yet\n  start with:  tunery files upload train.jsonl"
    listing(rows, headers, _row, empty, right=("SIZE",), as_json=as_json, quiet=quiet)


def _row(file: "File") -> tuple[object, ...]:
    added = ago(file.get("created_at"))
    return file["id"], file.get("filename"), size(file.get("bytes")), file.get("purpose"), file.get("status"), added


@app.command("show")
def show(file_id: FileRef, as_json: Json = False) -> None:
    """Show one file."""
    file = refs.file(config.client(), file_id)
    if as_json:
        json_out(file)
        return
    extra = file.get("tunery", {})
    fields(
        [
            ("id", file["id"]),
            ("name", file.get("filename")),
            ("size", size(file.get("bytes"))),
            ("purpose", file.get("purpose")),
            ("state", file.get("status")),
            ("details", file.get("status_details")),
            ("rows", extra.get("rows")),
            ("sha256", extra.get("sha256")),
            ("added", date(file.get("created_at"))),
            *[("problem", reason(item)) for item in extra.get("errors") or []],
        ]
    )


@app.command("download")
def download(
    file_id: FileRef,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where to; a folder, a file, or - for stdout.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace a file that exists.")] = False,
) -> None:
    """Download a file's content; complete or not at all."""
    api = config.client()
    file = refs.file(api, file_id)
    if output == Path("-"):
        api.stream_file(file["id"], sys.stdout.buffer.write)
        sys.stdout.buffer.flush()
        return
    target = _target(file, output)
    if target.exists() and not force:
        raise Failure(
            f"{target} exists already",
            why="a download does not replace files unless told to",
            fix=f"Add --force, or choose another name: tunery files download {file['id']} -o NAME",
            code="file_exists",
            exit_code=Exit.OTHER,
        )
    with transfer(f"Downloading {clean(target.name)}", file.get("bytes") or 0) as on_bytes:
        api.download_file(file, target, on_bytes=on_bytes)
    data(str(target))
    done(f"downloaded {size(target.stat().st_size)}")


def _target(file: "File", output: Path | None) -> Path:
    """The server's name for a file is only a suggestion: of it, the last part is used and no folder."""
    suggested = Path(clean(file.get("filename") or "").replace("\\", "/")).name or file["id"]
    if output is None:
        return Path(suggested)
    return output / suggested if output.is_dir() else output


@app.command("delete")
def delete(
    file_ids: Annotated[list[str], typer.Argument(metavar="FILE_ID...", help="Ids, or the beginnings of ids.")],
    as_json: Json = False,
) -> None:
    """Delete files. Jobs that have used them keep what they need."""
    api = config.client()
    deleted = [api.delete_file(refs.file(api, file_id)["id"]) for file_id in file_ids]
    if as_json:
        json_out(deleted)
        return
    for answer in deleted:
        data(answer["id"])
    done("deleted")
