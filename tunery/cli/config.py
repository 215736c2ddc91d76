"""Which server, and with which key: flag > environment > profile > the server that `tunery up` started here."""

import json
import os
import tomllib
import urllib.parse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunery.cli.failures import Exit, Failure
from tunery.cli.terminal import say

if TYPE_CHECKING:
    from tunery.client import Client
    from tunery.client.errors import APIError, Unreachable

DEFAULT_URL = "http://127.0.0.1:8400"


@dataclass
class Flags:
    """What was said before the command's name; set once by the root command."""

    api_url: str | None = None
    profile: str | None = None


FLAGS = Flags()


@dataclass(frozen=True)
class Source:
    """An address and the key that was stored for it. They stay together: a key is never sent elsewhere."""

    api_url: str
    api_key: str = field(repr=False)
    origin: str


@dataclass(frozen=True)
class Target:
    api_url: str
    api_key: str | None = field(repr=False)
    origin: str


def config_file() -> Path:
    import platformdirs

    return Path(platformdirs.user_config_dir("tunery")) / "config.toml"


def chosen_profile() -> str:
    return FLAGS.profile or os.environ.get("TUNERY_PROFILE") or str(_document().get("current", "default"))


def stored(name: str) -> Source | None:
    profile = _document().get("profiles", {}).get(name)
    return Source(normal(profile["api_url"]), profile["api_key"], f"profile {name}") if profile else None


def asked_url() -> str | None:
    asked = FLAGS.api_url or os.environ.get("TUNERY_API_URL")
    return normal(asked) if asked else None


def local_url() -> str | None:
    local = _local()
    return local.api_url if local else None


def target() -> Target:
    sources = _sources()
    url = asked_url() or (sources[0].api_url if sources else DEFAULT_URL)
    env_key = os.environ.get("TUNERY_API_KEY", "").strip()
    if env_key and FLAGS.profile is None:
        return Target(url, env_key, "TUNERY_API_KEY")
    for source in sources:
        if source.api_url == url:
            return Target(url, source.api_key, source.origin)
    return Target(url, None, "")


def client() -> "Client":
    where = target()
    if where.api_key is None:
        raise Failure(
            "not signed in",
            why=f"no TUNERY_API_KEY, and no key for {where.api_url} in {config_file()} or .tunery/client.json",
            fix="tunery login     (or `tunery up`, for a server on this machine)",
            code="no_api_key",
            exit_code=Exit.DENIED,
        )
    return connect(where.api_url, where.api_key)


def connect(api_url: str, api_key: str) -> "Client":
    from tunery.client import Client

    if not (api_key.isascii() and api_key.isprintable() and " " not in api_key):
        raise Failure(
            "this is not an API key",
            why="a key has no spaces, line breaks or letters beyond ASCII",
            fix="Copy the key again, whole and alone.",
            code="malformed_api_key",
            exit_code=Exit.DENIED,
        )
    return Client(api_url, api_key, on_retry=_tell_of_retry)


def save_profile(name: str, api_url: str, api_key: str) -> Path:
    document = _document()
    document.setdefault("profiles", {})[name] = {"api_url": api_url, "api_key": api_key}
    document["current"] = name
    return _write(document)


def forget_profile(name: str) -> bool:
    document = _document()
    if document.get("profiles", {}).pop(name, None) is None:
        return False
    if document.get("current") == name:
        document.pop("current")
    _write(document)
    return True


def normal(url: str) -> str:
    trimmed = url.strip().rstrip("/").removesuffix("/v1").rstrip("/")
    if not trimmed.startswith(("http://", "https://")) or len(trimmed) < len("http://x"):
        raise Failure(
            f"{url!r} is not an address of a server",
            why="it has to begin with http:// or https://",
            fix=f"For example: --api-url {DEFAULT_URL}",
            code="invalid_api_url",
            exit_code=Exit.USAGE,
        )
    return trimmed


def _sources() -> list[Source]:
    name = chosen_profile()
    profile = stored(name)
    if profile is None and (FLAGS.profile or os.environ.get("TUNERY_PROFILE")):
        raise Failure(
            f"no profile {name!r}",
            why=f"{config_file()} does not have it",
            fix=f"tunery login --profile {name}",
            code="no_profile",
            exit_code=Exit.DENIED,
        )
    local = _local()
    return [source for source in (profile, local) if source]


def _local() -> Source | None:
    """The server that `tunery up` runs here, unless its file is absent or half written."""
    home = os.environ.get("TUNERY_HOME")
    path = (Path(home) if home else Path(".tunery")) / "client.json"
    try:
        content = json.loads(path.read_text())
        source = Source(normal(content["api_url"]), content["api_key"], str(path))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # A folder that was cloned or unpacked may hold such a file too: it must not lead a key off this machine.
    return source if home or is_loopback(source.api_url) else None


def is_loopback(url: str) -> bool:
    return (urllib.parse.urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")


def _document() -> dict[str, Any]:
    path = config_file()
    try:
        return tomllib.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except tomllib.TOMLDecodeError as error:
        raise Failure(
            f"{path} cannot be read",
            why=str(error),
            fix="Correct the file, or delete it and run `tunery login`.",
            code="config_unreadable",
            exit_code=Exit.OTHER,
        ) from error


def _write(document: dict[str, Any]) -> Path:
    """Whole or not at all, and never readable by others, not even for a moment."""
    import tomli_w

    path = config_file()
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as out:
            tomli_w.dump(document, out)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return path


def _tell_of_retry(error: "APIError | Unreachable", wait_s: float) -> None:
    if wait_s >= 2:
        say(f"  {error}; trying again in {wait_s:.0f} s")
