"""Which deployment is meant: servers named by URL, or those of this machine's home, started if they do not run."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

from pydantic import SecretStr, ValidationError

from tunery import bootstrap
from tunery.embedded import ports
from tunery.embedded.home import Home, default_home
from tunery.embedded.identity import run_as
from tunery.embedded.objects import BUCKET, REGION
from tunery.embedded.problems import Refused
from tunery.embedded.servers import External, S3Identity, Servers
from tunery.settings import StorageSettings
from tunery.storage import Storage


@dataclass(frozen=True)
class Source:
    """What a backup reads: the database as `tunery_backup`, the store, and, where they are known, the secrets."""

    url: str
    storage: Storage
    secrets: dict[str, str]


def this_home() -> Home:
    return Home(default_home(os.environ), run_as(os.environ.get("TUNERY_RUN_AS")))


@contextlib.contextmanager
def source() -> Iterator[Source]:
    """Raises Refused."""
    if url := os.environ.get("TUNERY_BACKUP_DATABASE_URL"):
        known = {"key_pepper": os.environ.get("TUNERY_KEY_PEPPER"), "admin_key": os.environ.get("TUNERY_API_KEY")}
        yield Source(url, storage_of_environment(), {name: value for name, value in known.items() if value})
        return
    home = this_home()
    if not home.secrets_file.exists():
        raise Refused(
            "there is no deployment to back up",
            why=f"{home.root} holds none, and TUNERY_BACKUP_DATABASE_URL is not set.",
            fix="TUNERY_HOME=<its folder>; or TUNERY_BACKUP_DATABASE_URL and TUNERY_S3_* for servers of your own",
        )
    with contextlib.ExitStack() as stack:
        if home.holder() is None:
            servers = stack.enter_context(started(home))
            admin_url, s3 = servers.admin_url, servers.s3_root
        else:
            admin_url, s3 = _running(home)
        secrets = home.secrets()
        password = secrets.get("role_tunery_backup") or ""
        url = bootstrap.url_for(admin_url, "tunery_backup", password, bootstrap.database_of(admin_url))
        kept = {name: value for name in ("key_pepper", "admin_key") if (value := secrets.get(name))}
        yield Source(url, storage_of(s3), kept)


@contextlib.contextmanager
def started(home: Home) -> Iterator[Servers]:
    """The servers alone, without a program that would work on them."""
    with home.lock():
        servers = Servers(home, External.from_environment(os.environ))
        try:
            servers.start()
            yield servers
        finally:
            servers.stop()


def storage_of(s3: S3Identity) -> Storage:
    return Storage(
        StorageSettings(
            s3_endpoint_url=s3.endpoint_url,
            s3_bucket=s3.bucket,
            s3_region=s3.region,
            s3_access_key_id=SecretStr(s3.access_key_id),
            s3_secret_access_key=SecretStr(s3.secret_access_key),
        )
    )


def storage_of_environment() -> Storage:
    try:
        return Storage(StorageSettings())  # type: ignore[call-arg] - from the environment
    except ValidationError:
        raise Refused(
            "the object store is not named",
            why="The database is given by URL, so the store must be too.",
            fix="export TUNERY_S3_ENDPOINT_URL, TUNERY_S3_BUCKET, TUNERY_S3_ACCESS_KEY_ID, TUNERY_S3_SECRET_ACCESS_KEY",
        ) from None


def _running(home: Home) -> tuple[str, S3Identity]:
    """Of a deployment that runs: its files say where, and nothing is started."""
    external = External.from_environment(os.environ)
    known: dict[str, int] = home.state().get("ports", {})
    secrets = home.secrets()
    admin_url = external.database_url or f"postgresql://{ports.HOST}:{known['postgres']}/postgres"
    if external.s3_endpoint_url:
        key_id, secret = external.s3_access_key_id or "", external.s3_secret_access_key or ""
        return admin_url, S3Identity(external.s3_endpoint_url, external.s3_bucket, external.s3_region, key_id, secret)
    endpoint = f"http://{ports.HOST}:{known['s3']}"
    key_id, secret = secrets.get("s3_root_id") or "", secrets.get("s3_root_secret") or ""
    return admin_url, S3Identity(endpoint, BUCKET, REGION, key_id, secret)
