"""`python -m tunery.backup backup|restore FOLDER`: what the command line's commands of these names become."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import psycopg

from tunery.backup import bring, make
from tunery.backup.deployment import source
from tunery.backup.make import said
from tunery.bootstrap import Unsuitable
from tunery.embedded.problems import Refused
from tunery.errors import ServiceError
from tunery.storage import CorruptObject


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        return options.command(options)
    except Refused as refused:
        sys.stderr.write(f"{refused.text()}\n")
    except Unsuitable as error:
        sys.stderr.write(f"error: {error}\nfix:   {error.fix}\ndocs:  docs/backup.md\n")
    except (ServiceError, CorruptObject, OSError, psycopg.Error) as error:
        sys.stderr.write(f"error: {str(error).strip()}\nfix:   mend it and run this again; it goes on where it was\n")
        sys.stderr.write("docs:  docs/backup.md\n")
    except KeyboardInterrupt:
        return 130
    return 1


def _backup(options: argparse.Namespace) -> int:
    with source() as deployment:
        manifest = make.make(deployment, options.folder.absolute(), include_secrets=options.include_secrets)
    size = sum(entry.bytes for entry in manifest.objects.values())
    said(f"{len(manifest.objects)} objects, {size:,} bytes, every hash checked")
    if not options.include_secrets:
        said("without secrets: keep TUNERY_KEY_PEPPER (or secrets.json) elsewhere, or API keys must be made anew")
    sys.stdout.write(f"{options.folder}\n")
    for key in manifest.lost:
        said(f"warning: the store has lost {key}")
    return 1 if manifest.lost else 0


def _restore(options: argparse.Namespace) -> int:
    root = options.folder.absolute()
    interrupted = bring.by_url(root, options.env_file) if options.env_file else bring.into_home(root)
    said(f"restored; {interrupted} attempts were interrupted, and their jobs wait to go on")
    said("next: start the programs" if options.env_file else "next: tunery up")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tunery.backup", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    backup = commands.add_parser("backup")
    backup.add_argument("folder", type=Path)
    backup.add_argument("--include-secrets", action="store_true")
    backup.set_defaults(command=_backup)
    restore = commands.add_parser("restore")
    restore.add_argument("folder", type=Path)
    restore.add_argument("--env-file", type=Path)
    restore.set_defaults(command=_restore)
    return parser


if __name__ == "__main__":
    sys.exit(main())
