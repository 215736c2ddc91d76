"""docker-compose.yml and the Dockerfiles, checked without a container engine: names, files, walls, and a real start."""

import importlib.util
import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import images
from tests.images import ROOT, Image
from tests.servers import FAST_POSTGRES, temporary_home
from tunery.embedded import binaries, compose, ports
from tunery.embedded.servers import External, Servers
from tunery.settings import ApiSettings, NodeSettings, SchedulerSettings, StorageSettings


class SchedulerWithStore(SchedulerSettings, StorageSettings):
    """The scheduler reads the two apart: it may do without a store."""


SETTINGS = {"api": ApiSettings, "scheduler": SchedulerWithStore, "worker": NodeSettings, "worker-cpu": NodeSettings}
SERVICES: dict[str, dict[str, Any]] = images.compose()["services"]
SECRETS = {"api": "api", "scheduler": "scheduler", "worker": "worker", "worker-cpu": "worker"}


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the `secrets` service writes."""
    folder = tmp_path_factory.mktemp("secrets")
    compose.write_secrets(folder)
    return folder


# ---- names and files ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dockerfile", images.DOCKERFILES)
def test_image_takes_only_what_exists_and_is_not_ignored(dockerfile: str) -> None:
    ignore = (ROOT / ".dockerignore").read_text().splitlines()
    for source in images.copied(dockerfile):
        assert (ROOT / source).exists(), source
        assert f"!{source.split('/')[0]}" in ignore, f"{source} would not be in the build's context"


@pytest.mark.parametrize("name", [name for name, one in SERVICES.items() if "build" in one])
def test_module_that_a_service_starts_is_in_its_image(name: str) -> None:
    service = SERVICES[name]
    dockerfile = service["build"]["dockerfile"]
    image = [words for keyword, words in images.instructions(dockerfile) if keyword == "CMD"]
    command = service.get("entrypoint") or service.get("command") or json.loads(image[0])
    module = command[command.index("-m") + 1]
    assert importlib.util.find_spec(f"{module}.__main__" if (ROOT / module).is_dir() else module), module
    assert module.split(".")[0] in images.copied(dockerfile)


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_a_service_are_fields_and_complete(name: str, secrets: Path) -> None:
    fields = SETTINGS[name].model_fields
    given = {key for key in SERVICES[name]["environment"] if key.startswith("TUNERY_")} - {"TUNERY_SECRETS_DIR"}
    files = {path.name for path in (secrets / SECRETS[name]).iterdir()}
    names = {key.removeprefix("TUNERY_").lower() for key in given} | {file.removeprefix("tunery_") for file in files}
    assert names <= fields.keys()
    assert {field for field, info in fields.items() if info.is_required()} <= names
    assert "s3_endpoint_url" in names or name == "scheduler"  # without it, None would mean AWS


def test_program_reads_its_files(secrets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNERY_SECRETS_DIR", str(secrets / "api"))
    settings = ApiSettings()  # pyright: ignore[reportCallIssue]
    assert settings.database_url.get_secret_value().startswith("postgresql://tunery_api:")
    monkeypatch.setenv("TUNERY_DATABASE_URL", "postgresql://elsewhere")
    assert ApiSettings().database_url.get_secret_value() == "postgresql://elsewhere"  # pyright: ignore[reportCallIssue]


# ---- walls ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SERVICES)
def test_service_is_hardened(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and "cap_add" not in service
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert re.search(r":\d+\.\d+|:\$\{TUNERY_VERSION", service["image"]), "an image needs an exact version"
    if "build" in service:
        users = [words for keyword, words in images.instructions(service["build"]["dockerfile"]) if keyword == "USER"]
        assert users == ["10001:10001"] and "user" not in service
    else:
        assert int(service["user"].split(":")[0]) > 0


def test_walls_for_trainers_are_asked_for_and_then_required() -> None:
    """The one place with capabilities is a file that nobody includes by accident."""
    walls = yaml.safe_load((ROOT / "deploy/compose.isolation.yml").read_text())["services"]
    assert walls.keys() == {"worker", "worker-cpu"} <= SERVICES.keys()
    for name, service in walls.items():
        assert service["environment"]["TUNERY_TRAINER_ISOLATION"] == "require"
        given = {key.removeprefix("TUNERY_").lower() for key in service["environment"]}
        assert given <= SETTINGS[name].model_fields.keys()


def test_only_the_api_is_published_and_only_on_loopback() -> None:
    published = {name: one["ports"] for name, one in SERVICES.items() if "ports" in one}
    assert published.keys() == {"api"}
    assert all(port.startswith("127.0.0.1:") for port in published["api"])
    assert images.compose()["networks"]["data"] == {"internal": True}


def test_each_container_mounts_its_own_secrets_and_no_other() -> None:
    mounted = {
        name: {one["source"] for one in service.get("volumes", []) if one["source"].endswith("-secrets")}
        for name, service in SERVICES.items()
    }
    everything = mounted.pop("secrets")
    assert mounted == {name: {f"{SECRETS.get(name, name)}-secrets"} for name in SERVICES if name != "secrets"}
    assert everything == set().union(*mounted.values())


def test_files_of_a_container_hold_nothing_of_the_others(secrets: Path) -> None:
    made = json.loads((secrets / "init" / "secrets.json").read_text())
    names = set(SECRETS.values())
    texts = {name: "".join(path.read_text() for path in (secrets / name).iterdir()) for name in names}
    for secret in ("postgres_superuser", "role_tunery_migrate"):
        assert all(made[secret] not in text for text in texts.values())
    assert made["s3_root_secret"] in texts["api"]
    assert made["s3_root_secret"] not in texts["worker"] + texts["scheduler"]
    assert made["key_pepper"] not in texts["worker"] + texts["scheduler"]
    assert {path.stat().st_mode & 0o777 for name in texts for path in (secrets / name).iterdir()} == {0o440}


def test_secrets_are_made_once(secrets: Path) -> None:
    def everything() -> dict[str, str]:
        return {str(path): path.read_text() for path in secrets.rglob("*") if path.is_file()}

    before = everything()
    compose.write_secrets(secrets)
    assert everything() == before


# ---- a start from the images' content -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_api_image_starts_from_what_it_copies(tmp_path: Path) -> None:
    """Dockerfile.api is carried out in a folder; its api and scheduler then work with the compose file's servers."""
    image = Image(tmp_path)
    image.build("Dockerfile.api")
    assert not (image.root / "app" / "worker").exists()
    assert "No module named 'torch'" in image.run("python", "-c", "import torch").stderr

    home = temporary_home()
    unused = External(redis_url="redis://x", s3_endpoint_url="http://x", s3_access_key_id="x", s3_secret_access_key="x")
    servers = Servers(home, unused, FAST_POSTGRES)
    servers.start()
    try:
        with _valkey_and_s3(tmp_path, servers) as at:
            _initialize(image, tmp_path, at)
            _serves(image, tmp_path, at)
            assert _speaks_http2(at["filer_grpc"]), "the probe below would prove nothing"
            socket.create_connection((ports.HOST, at["s3_grpc"]), timeout=5).close()
            assert not _speaks_http2(at["s3_grpc"]), "whoever reaches this port may add identities"
    finally:
        servers.stop()
        shutil.rmtree(home.root)


@contextmanager
def _valkey_and_s3(folder: Path, servers: Servers) -> Iterator[dict[str, int]]:
    """The compose file's own commands with its own files; paths and ports are this machine's."""
    taken: set[int] = set()
    at = {name: ports.choose(taken) for name in ("valkey", "s3", "s3_grpc", "filer", "filer_grpc", "master", "volume")}
    assert servers.postgres
    at["postgres"] = servers.postgres.port
    (folder / "secrets" / "init").mkdir(parents=True)
    known = {"postgres_superuser": servers.postgres.password}
    (folder / "secrets" / "init" / "secrets.json").write_text(json.dumps(known))
    where = {name: f"{ports.HOST}:{at[name]}" for name in ("postgres", "valkey")}
    compose.write_secrets(folder / "secrets", **where, mounted=folder / "secrets" / "s3")

    def command(name: str, *more: str) -> list[str]:
        (data := folder / f"{name}-data").mkdir()
        words = [*SERVICES[name].get("entrypoint", []), *SERVICES[name]["command"]]
        local = {"/run/secrets": str(folder / "secrets" / name), "/data": str(data), "=0.0.0.0": f"={ports.HOST}"}
        local["=8333"] = f"={at['s3']}"
        for theirs, ours in local.items():
            words = [word.replace(theirs, ours) for word in words]
        program = binaries.find(name).path
        return [str(program), *words[1:], *more]

    valkey = command("valkey", "--port", str(at["valkey"]), "--bind", ports.HOST, "--dir", str(folder / "valkey-data"))
    weed = command(
        "s3",
        *(f"-{name}.port={at[name]}" for name in ("filer", "master", "volume")),
        *(f"-{name}.port.grpc={at[f'{name}_grpc']}" for name in ("filer", "s3")),
        *(f"-{name}.localSocket={folder / name}.sock" for name in ("filer", "s3")),
    )
    with _running(valkey, folder), _running(weed, folder):
        yield at


@contextmanager
def _running(command: list[str], folder: Path) -> Iterator[None]:
    with (folder / f"{Path(command[0]).name}.log").open("ab") as log:
        process = subprocess.Popen(
            command, cwd=folder, env={"HOME": str(folder), "PATH": os.defpath}, stdout=log, stderr=log
        )
    try:
        yield
    finally:
        process.kill()
        process.wait()


def _initialize(image: Image, folder: Path, at: dict[str, int]) -> None:
    """As the `init` service does, with the image's own interpreter and files."""
    where = f"postgres='{ports.HOST}:{at['postgres']}', s3='{ports.HOST}:{at['s3']}'"
    arguments = f"Path({str(folder / 'secrets')!r}), {where}"
    code = f"from pathlib import Path; from tunery.embedded import compose; compose.initialize({arguments})"
    for _ in range(2):
        image.run("python", "-c", code, check=True)


def _serves(image: Image, folder: Path, at: dict[str, int]) -> None:
    port = ports.choose(set())
    local = {"TUNERY_API_HOST": ports.HOST, "TUNERY_API_PORT": str(port)}
    local["TUNERY_S3_ENDPOINT_URL"] = f"http://{ports.HOST}:{at['s3']}"
    key = json.loads((folder / "secrets" / "init" / "secrets.json").read_text())["admin_key"]
    started = []
    for name in ("api", "scheduler"):
        environment = SERVICES[name]["environment"] | local | {"TUNERY_SECRETS_DIR": str(folder / "secrets" / name)}
        started.append(image.start(SERVICES[name]["command"], environment, folder / f"{name}.log"))
    try:
        _until(lambda: _answer(f"http://{ports.HOST}:{port}/readyz") == 200, folder / "api.log")
        _until(lambda: '"leading"' in (folder / "scheduler.log").read_text(), folder / "scheduler.log")
        assert _answer(f"http://{ports.HOST}:{port}/v1/fine_tuning/jobs", key) == 200
    finally:
        for process in started:
            process.terminate()
        assert [process.wait(30) for process in started] == [0, 0]


def _answer(url: str, key: str = "") -> int | None:
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def _until(check: Callable[[], bool], log: Path, timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while not check():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)


def _speaks_http2(port: int) -> bool:
    """Whether a plain gRPC client would be answered: HTTP/2 begins with a SETTINGS frame (type 4)."""
    with suppress(OSError), socket.create_connection((ports.HOST, port), timeout=5) as connection:
        connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]))
        frame = connection.recv(9)
        return len(frame) >= 4 and frame[3] == 4
    return False
