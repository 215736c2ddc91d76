"""`python -m tunery.embedded.compose secrets|init|key`: the one-shot services of docker-compose.yml.

`secrets` runs before the servers and writes each container's own files below `/secrets`; `init` runs once they answer
and makes roles, schema, bucket and the first key; `key` prints that key. Each may be repeated.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tunery import bootstrap
from tunery.embedded import objects
from tunery.embedded.home import Secrets
from tunery.embedded.objects import Key

FOLDER = Path("/secrets")
"""One folder a container, each of them a volume: nobody mounts another's."""
MOUNTED = Path("/run/secrets")
"""Where a container sees its own."""
POSTGRES, VALKEY, S3 = "postgres:5432", "valkey:6379", "s3:8333"
_ANSWER_WITHIN_S = 60


def write_secrets(folder: Path, postgres: str = POSTGRES, valkey: str = VALKEY, mounted: Path = MOUNTED) -> None:
    """Every container's files; passwords that are there already are kept."""
    (folder / "init").mkdir(exist_ok=True)
    made = _secrets(folder).made
    redis_url = f"redis://:{made('valkey')}@{valkey}/0"
    names = ("root", "node", "tidy")
    root, node, tidy = (Key(made(f"s3_{name}_id", 12), made(f"s3_{name}_secret")) for name in names)
    signing = {name: made(f"s3_{name}") for name in objects.SIGNING}
    urls = _urls(folder, postgres)
    own: dict[str, dict[str, str]] = {
        "postgres": {"superuser_password": made("postgres_superuser")},
        "valkey": {"valkey.conf": _valkey_conf(made("valkey")), "password": made("valkey")},
        "s3": {
            "security.toml": objects.security(signing) + _closed(folder, mounted),
            "identities.json": json.dumps(objects.identities(root, node, tidy)),
        },
        "api": {
            "tunery_database_url": urls["tunery_api"],
            "tunery_redis_url": redis_url,
            "tunery_key_pepper": made("key_pepper"),
            **_s3_files(root),
            **_s3_files(node, "tunery_node_s3"),  # which it hands to nodes that join
        },
        "scheduler": {
            "tunery_database_url": urls["tunery_scheduler"],
            "tunery_redis_url": redis_url,
            **_s3_files(tidy),
        },
        "worker": {"tunery_database_url": urls["tunery_worker"], "tunery_redis_url": redis_url, **_s3_files(node)},
    }
    for container, files in own.items():
        (folder / container).mkdir(exist_ok=True)
        for name, text in files.items():
            _write(folder / container / name, text)


def initialize(folder: Path, postgres: str = POSTGRES, s3: str = S3) -> None:
    """Roles, schema, bucket and first key."""
    secrets = _secrets(folder)
    passwords = {role: secrets.made(f"role_{role}") for role in bootstrap.LOGIN_ROLES}
    admin = f"postgresql://postgres:{secrets.made('postgres_superuser')}@{postgres}/{bootstrap.DATABASE}"
    bootstrap.create_roles(admin, passwords)
    migrator = _urls(folder, postgres)["tunery_migrate"]
    bootstrap.migrate(migrator)
    if key := bootstrap.first_run(migrator, secrets.made("key_pepper"), secrets.get("admin_key")):
        secrets.put("admin_key", key)
    root = Key(secrets.made("s3_root_id", 12), secrets.made("s3_root_secret"))
    deadline = time.monotonic() + _ANSWER_WITHIN_S
    while not objects.bucket_ready(f"http://{s3}", root):
        if time.monotonic() > deadline:
            raise SystemExit(f"error: the object store at {s3} did not answer in {_ANSWER_WITHIN_S} s")
        time.sleep(0.5)


def _secrets(folder: Path) -> Secrets:
    return Secrets(folder / "init" / "secrets.json")


def _urls(folder: Path, postgres: str) -> dict[str, str]:
    made = _secrets(folder).made
    server = f"postgresql://{postgres}/{bootstrap.DATABASE}"
    return {role: bootstrap.url_for(server, role, made(f"role_{role}")) for role in bootstrap.LOGIN_ROLES}


def _s3_files(key: Key, name: str = "tunery_s3") -> dict[str, str]:
    return {f"{name}_access_key_id": key.access_key_id, f"{name}_secret_access_key": key.secret_access_key}


def _valkey_conf(password: str) -> str:
    lines = (
        "bind * -::*",
        f"requirepass {password}",
        "dir /data",
        "appendonly yes",
        "appendfsync everysec",
        'save ""',
        "maxmemory-policy noeviction",  # an evicted key is a lost job of RQ
    )
    return "\n".join(lines) + "\n"


def _closed(folder: Path, mounted: Path) -> str:
    """Mutual TLS on the gateway's gRPC port, with an authority that has signed nobody: so nobody can enter.

    That port takes new identities from whoever reaches it, and SeaweedFS has no switch to leave it out.
    """
    own = folder / "s3"
    own.mkdir(exist_ok=True)
    if not (own / "closed.crt").exists():
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
        command += ["-days", "36500", "-subj", "/CN=closed", "-keyout", "closed.key", "-out", "closed.crt.part"]
        subprocess.run(command, cwd=own, check=True, capture_output=True)
        (own / "closed.key").chmod(0o440)
        (own / "closed.crt.part").rename(own / "closed.crt")
    certificate, key = mounted / "closed.crt", mounted / "closed.key"
    return f'[grpc]\nca = "{certificate}"\n[grpc.s3]\ncert = "{certificate}"\nkey = "{key}"\n'


def _write(path: Path, text: str) -> None:
    """Readable by the container's user through our group, written whole or not at all."""
    draft = path.with_name(f".{path.name}.part")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o440)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
    draft.replace(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tunery.embedded.compose", description=__doc__)
    parser.add_argument("what", choices=("secrets", "init", "key"))
    what = parser.parse_args(arguments).what
    if what == "secrets":
        write_secrets(FOLDER)
    elif what == "init":
        initialize(FOLDER)
        sys.stderr.write("the database is ready; the admin key: docker compose run --rm init key\n")
    elif key := _secrets(FOLDER).get("admin_key"):
        sys.stdout.write(f"{key}\n")
    else:
        sys.stderr.write("error: there is no key yet\nfix:   docker compose up init\ndocs:  docs/deploy.md\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
