"""Bring a base model into one folder: safetensors, config, tokenizer, `base.json`. The trainer program with a network.

    python -P -m trainer.import_base --source demo --out DIR
    python -P -m trainer.import_base --source hub --repo ORG/NAME --revision SHA --out DIR
    python -P -m trainer.import_base --source path --path FOLDER --repo ORG/NAME --out DIR

It sees no tenant's data. It takes weights as safetensors only and never runs code that came with a model. The last
line on stdout is the content of `base.json`; an error is one JSON line on stderr, and exit code 64 (yours) or 70.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from trainer import manifest
from trainer.base_rules import Refused, refuse_unsafe
from trainer.parent import die_with
from tunery.contracts.events import EXIT_OK, EXIT_OURS

ARCHITECTURE = (
    "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "max_position_embeddings",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    if not die_with(os.environ.get("TUNERY_SUPERVISOR_PID")):
        return EXIT_OURS
    try:
        arguments = _parse(argv)
        base = import_base(arguments)
    except Refused as refused:
        return _report(refused)
    except Exception as error:  # noqa: BLE001 - the process edge: every failure becomes one JSON line
        traceback.print_exc(file=sys.stdout)
        fix = "Free disk space or see the traceback above, then run the import again."
        return _report(Refused("internal_error", f"{type(error).__name__}: {error}", fix, exit_code=EXIT_OURS))
    sys.stdout.write(json.dumps(base) + "\n")
    return EXIT_OK


def import_base(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill `arguments.out` and return its `base.json`. A folder that is complete already is left alone."""
    out: Path = arguments.out.absolute()
    if (done := _finished(out)) is not None:
        return done
    if out.exists() and any(out.iterdir()):
        raise Refused("not_empty", f"{out} exists and holds no finished import", "Name another folder, or empty it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        facts = _take(arguments, temporary)
        base = {**facts, **describe(temporary)}
        (temporary / "base.json").write_text(json.dumps(base, indent=2) + "\n")
        manifest.publish(temporary, out)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return base


def describe(folder: Path) -> dict[str, Any]:
    """Read what `base.json` says of a folder of safetensors: parameters, architecture, files with hashes."""
    weights = sorted(folder.glob("*.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    text = config.get("text_config") or config
    shapes = [tensor["shape"] for file in weights for name, tensor in _header(file).items() if name != "__metadata__"]
    dtypes = sorted({t["dtype"] for file in weights for name, t in _header(file).items() if name != "__metadata__"})
    architecture = {key: text.get(key) for key in ARCHITECTURE}
    architecture["num_key_value_heads"] = architecture["num_key_value_heads"] or architecture["num_attention_heads"]
    return {
        "parameters": sum(_product(shape) for shape in shapes),
        "dtype": dtypes[0] if len(dtypes) == 1 else dtypes,
        "model_type": config.get("model_type"),
        **architecture,
        "files": [entry.model_dump() for entry in manifest.entries_of(folder, without=["base.json"])],
    }


def _take(arguments: argparse.Namespace, into: Path) -> dict[str, Any]:
    from trainer import base_sources  # the hub client and transformers are slow to import; a finished folder needs none

    if arguments.source == "demo":
        facts = base_sources.take_demo(into)
    elif arguments.source == "hub":
        facts = base_sources.take_hub(arguments.repo, arguments.revision, into)
    else:
        facts = base_sources.take_path(arguments.path, into)
        facts |= {
            key: value for key, value in {"hub_id": arguments.repo, "revision": arguments.revision}.items() if value
        }
        facts["license"] = arguments.license or facts["license"]
    refuse_unsafe(into)
    name = arguments.id or facts.get("name") or facts["hub_id"].rsplit("/", 1)[-1].lower()
    return {**facts, "name": name}


def _finished(out: Path) -> dict[str, Any] | None:
    """The `base.json` of a complete folder: every file there with its size."""
    try:
        base = json.loads((out / "base.json").read_text())
    except FileNotFoundError:
        return None
    sizes = {path.relative_to(out).as_posix(): path.stat().st_size for path in out.rglob("*") if path.is_file()}
    if all(sizes.get(entry["name"]) == entry["bytes"] for entry in base["files"]):
        return base
    raise Refused("damaged", f"{out} differs from its base.json", "Remove the folder and import it again.")


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return json.loads(stream.read(length))


def _product(shape: list[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Refused("invalid_arguments", message, "See python -m trainer.import_base --help.")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = _Parser(prog="trainer.import_base", description="Import a base model as safetensors.")
    parser.add_argument("--source", required=True, choices=("demo", "hub", "path"))
    parser.add_argument("--id", help="name in the catalogue; by default the last part of the hub id")
    parser.add_argument("--path", type=Path, help="folder to import, for --source path")
    parser.add_argument("--repo", help="hub id, ORG/NAME; written into every adapter's config")
    parser.add_argument("--revision", help="commit of the hub repository")
    parser.add_argument("--license", help="SPDX id, for --source path")
    parser.add_argument("--out", required=True, type=Path)
    arguments = parser.parse_args(argv)
    if arguments.source == "hub" and not (arguments.repo and arguments.revision):
        parser.error("--source hub needs --repo and --revision")
    if arguments.source == "path" and not arguments.path:
        parser.error("--source path needs --path")
    return arguments


def _report(refused: Refused) -> int:
    line = {"error": refused.code, "message": refused.message, "fix": refused.fix}
    sys.stderr.write(json.dumps(line) + "\n")
    return refused.exit_code


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    raise SystemExit(main())
