"""`tunery restore`: a backup into an empty deployment. What is interrupted is run again; then it goes on."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psycopg
from psycopg import sql

from tunery import bootstrap, db_commands
from tunery.backup import postgres
from tunery.backup.deployment import started, storage_of, storage_of_environment, this_home
from tunery.backup.fence import fence
from tunery.backup.folder import Entry, Folder, Manifest, is_whole, sha256
from tunery.backup.make import pepper_check, said
from tunery.embedded.problems import Refused
from tunery.storage import Storage

_DOCS = "docs/backup.md"
_UPLOADS = 4


@dataclass(frozen=True)
class Target:
    """An empty deployment: servers that run, and nothing on them."""

    admin_url: str
    passwords: dict[str, str]
    storage: Storage

    def url(self, role: str) -> str:
        database = bootstrap.database_of(self.admin_url)
        return bootstrap.url_for(self.admin_url, role, self.passwords[role], database)


def into_home(root: Path) -> int:
    """Into this machine's home, whose servers run only for that. How many attempts were interrupted."""
    folder, manifest = _read(root)
    home = this_home()
    if home.holder() is not None:
        raise Refused(
            "tunery is running here",
            why=f"{home.root} is a deployment at work; a restore needs an empty one.",
            fix="tunery down, and TUNERY_HOME=<a new folder> for the restored one",
            reference=_DOCS,
        )
    given = _secrets(folder, manifest, home.secrets().get("key_pepper"))
    home.create()
    for name, value in given.items():
        home.secrets().put(name, value)
    with started(home) as servers:
        secrets = home.secrets()
        if servers.postgres is None:
            for name, value in servers.external.database_secrets.items():
                secrets.put(name, value)
        passwords = {role: secrets.made(f"role_{role}") for role in bootstrap.LOGIN_ROLES}
        return _restore(folder, manifest, Target(servers.admin_url, passwords, storage_of(servers.s3_root)))


def by_url(root: Path, env_file: Path) -> int:
    """Into servers named by URL; passwords and URLs of the roles go to `env_file`."""
    folder, manifest = _read(root)
    admin_url = os.environ.get("TUNERY_ADMIN_DATABASE_URL")
    if not admin_url:
        raise Refused(
            "the database server is not named",
            why="--env-file means servers of your own.",
            fix="export TUNERY_ADMIN_DATABASE_URL=postgresql://admin:...@host/database, or leave out --env-file",
            reference=_DOCS,
        )
    storage = storage_of_environment()
    names = {"key_pepper": "TUNERY_KEY_PEPPER", "admin_key": "TUNERY_API_KEY"}
    given = {names[name]: value for name, value in _secrets(folder, manifest, None).items()}
    _, passwords = db_commands.keep_secrets(env_file, **given)
    interrupted = _restore(folder, manifest, Target(admin_url, passwords, storage))
    db_commands.init(env_file)
    return interrupted


def _read(root: Path) -> tuple[Folder, Manifest]:
    """The backup, if this release can restore it. Raises Refused."""
    folder = Folder(root)
    manifest = folder.read()
    if manifest.schema not in bootstrap.known_versions():
        raise Refused(
            "the backup is of a newer release",
            why=f"Its schema is '{manifest.schema}', made by Tunery {manifest.tunery}; this release does not know it.",
            fix=f"install Tunery {manifest.tunery} or later",
            reference=_DOCS,
        )
    dump = root / manifest.dump
    if not dump.exists() or sha256(dump) != manifest.dump_sha256:
        raise _damaged(manifest.dump)
    for key, entry in manifest.objects.items():
        if not is_whole(folder.place(key), entry):
            raise _damaged(f"objects/{key}")
    return folder, manifest


def _damaged(name: str) -> Refused:
    return Refused(
        "the backup is damaged", why=f"{name} is not what was backed up.", fix="use another copy", reference=_DOCS
    )


def _secrets(folder: Folder, manifest: Manifest, own: str | None) -> dict[str, str]:
    """What the deployment takes over: the pepper, without which no API key opens, and the admin key. Raises Refused."""
    given = folder.secrets()
    pepper = os.environ.get("TUNERY_KEY_PEPPER") or own or given.get("key_pepper")
    if pepper is None:
        said("warning: the backup holds no pepper and TUNERY_KEY_PEPPER is not set: every API key has to be made anew")
        return {}
    if manifest.pepper_check is not None and pepper_check(pepper) != manifest.pepper_check:
        raise Refused(
            "the pepper is not the one of this backup",
            why="Its API keys would not open anything.",
            fix="export the right TUNERY_KEY_PEPPER, or unset it",
            reference=_DOCS,
        )
    return {"key_pepper": pepper} | {name: value for name, value in given.items() if name == "admin_key"}


def _restore(folder: Folder, manifest: Manifest, target: Target) -> int:
    database = bootstrap.create_roles(target.admin_url, target.passwords)
    major = postgres.server_major(target.url("tunery_migrate"))
    if major < manifest.postgres:
        raise Refused(
            f"this server is PostgreSQL {major}, the backup is of {manifest.postgres}",
            why="A dump does not go back to an older version.",
            fix=f"restore into PostgreSQL {manifest.postgres} or later",
            reference=_DOCS,
        )
    loaded = _begun(target, database, manifest)
    _refuse_other_objects(target.storage, manifest)
    _upload_all(folder, target.storage, manifest)
    said(f"{len(manifest.objects)} objects stored and read back")
    if not loaded:
        _mark(target, database, f"restoring {manifest.id}")
        postgres.load(target.url("tunery_migrate"), folder.root / manifest.dump, major)
        said(f"database restored: {', '.join(f'{count} {name}' for name, count in manifest.counts.items())}")
    bootstrap.migrate(target.url("tunery_migrate"))
    interrupted = fence(target.url("tunery_migrate"), target.url("tunery_scheduler"))
    _mark(target, database, None)
    return interrupted


def _begun(target: Target, database: str, manifest: Manifest) -> bool:
    """Whether an interrupted restore of this backup has loaded the database already. Raises Refused."""
    with psycopg.connect(target.url("tunery_migrate")) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        query = "SELECT shobj_description(oid, 'pg_database') FROM pg_database WHERE datname = %s"
        comment = connection.execute(query, [database]).fetchone()
    if tables == (0,):
        return False
    if comment == (f"restoring {manifest.id}",):
        return True
    raise Refused(
        "the deployment is not empty",
        why=f"The database '{database}' has tables already; a restore replaces nothing.",
        fix="TUNERY_HOME=<a new folder>, or name an empty database",
        reference=_DOCS,
    )


def _mark(target: Target, database: str, comment: str | None) -> None:
    with psycopg.connect(target.url("tunery_migrate")) as connection:
        connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(bootstrap.OWNER)))
        statement = sql.SQL("COMMENT ON DATABASE {} IS {}")
        connection.execute(statement.format(sql.Identifier(database), sql.Literal(comment)))


def _refuse_other_objects(storage: Storage, manifest: Manifest) -> None:
    """Those of this backup may be there: an interrupted restore is run again."""
    for prefix in ("u/", "a/"):
        for key in storage.keys(prefix):
            if key not in manifest.objects:
                raise Refused(
                    "the deployment is not empty",
                    why=f"The bucket '{storage.bucket}' holds {key}, which is not in the backup.",
                    fix="name an empty bucket",
                    reference=_DOCS,
                )


def _upload_all(folder: Folder, storage: Storage, manifest: Manifest) -> None:
    def upload(item: tuple[str, Entry]) -> None:
        key, entry = item
        storage.put_verified(key, folder.place(key), entry.sha256)

    run: Callable[..., object] = upload
    with ThreadPoolExecutor(_UPLOADS) as pool:
        for _ in pool.map(run, manifest.objects.items()):
            pass
