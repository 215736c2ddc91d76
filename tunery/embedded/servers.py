"""The servers together: those that no URL replaces are started at the same time and waited for."""

import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Literal

from tunery import bootstrap
from tunery.embedded import ports
from tunery.embedded.home import Home
from tunery.embedded.objects import BUCKET, GRPC_OFFSET, PORTS, REGION, Key, Objects
from tunery.embedded.postgres import Postgres
from tunery.embedded.problems import Refused
from tunery.embedded.process import Child
from tunery.embedded.valkey import Valkey

READY_TIMEOUT_S = 60
FULL_BYTES, ROOM_BYTES = 32 << 20, 64 << 20
"""With less than the first the disk is called full, until there is more than the second."""
_GIVE_UP_AFTER = 3


@dataclass(frozen=True)
class External:
    """What the user brings; an embedded server starts for each that is None."""

    database_url: str | None = None
    redis_url: str | None = None
    s3_endpoint_url: str | None = None
    s3_access_key_id: str | None = None
    s3_secret_access_key: str | None = None
    s3_bucket: str = BUCKET
    s3_region: str = REGION
    node_s3_access_key_id: str | None = None
    node_s3_secret_access_key: str | None = None
    database_secrets: Mapping[str, str] = field(default_factory=dict)
    """What `tunery db init` made on that database, by its name in the secrets file: passwords, pepper and key."""

    @classmethod
    def from_environment(cls, environ: Mapping[str, str]) -> "External":
        def given(name: str) -> str | None:
            return environ.get(f"TUNERY_{name}") or None

        found = cls(
            database_url=given("DATABASE_URL"),
            redis_url=given("REDIS_URL"),
            s3_endpoint_url=given("S3_ENDPOINT_URL"),
            s3_access_key_id=given("S3_ACCESS_KEY_ID"),
            s3_secret_access_key=given("S3_SECRET_ACCESS_KEY"),
            s3_bucket=given("S3_BUCKET") or BUCKET,
            s3_region=given("S3_REGION") or REGION,
            node_s3_access_key_id=given("NODE_S3_ACCESS_KEY_ID"),
            node_s3_secret_access_key=given("NODE_S3_SECRET_ACCESS_KEY"),
            database_secrets=_database_secrets(environ),
        )
        if found.s3_endpoint_url and not (found.s3_access_key_id and found.s3_secret_access_key):
            raise Refused(
                "TUNERY_S3_ENDPOINT_URL is set, its key is not",
                why="An object store of your own needs credentials.",
                fix="export TUNERY_S3_ACCESS_KEY_ID and TUNERY_S3_SECRET_ACCESS_KEY, or unset TUNERY_S3_ENDPOINT_URL",
            )
        return found


@dataclass(frozen=True)
class S3Identity:
    endpoint_url: str
    bucket: str
    region: str
    access_key_id: str
    secret_access_key: str

    def environment(self) -> dict[str, str]:
        return {
            "TUNERY_S3_ENDPOINT_URL": self.endpoint_url,
            "TUNERY_S3_BUCKET": self.bucket,
            "TUNERY_S3_REGION": self.region,
            "TUNERY_S3_ACCESS_KEY_ID": self.access_key_id,
            "TUNERY_S3_SECRET_ACCESS_KEY": self.secret_access_key,
        }


def _database_secrets(environ: Mapping[str, str]) -> dict[str, str]:
    """All or nothing: a lone TUNERY_API_KEY is the command line's, for whatever deployment it speaks to."""
    found = {f"role_{role}": environ.get(f"{role.upper()}_PASSWORD", "") for role in bootstrap.LOGIN_ROLES}
    if not all(found.values()):
        return {}
    more = {"key_pepper": environ.get("TUNERY_KEY_PEPPER"), "admin_key": environ.get("TUNERY_API_KEY")}
    return found | {name: value for name, value in more.items() if value}


class Servers:
    """`start()`, then the URLs; call `tend()` now and then to restart what died; `stop()` at the end."""

    def __init__(
        self,
        home: Home,
        external: External | None = None,
        postgres_options: tuple[str, ...] = (),
        allowed_origins: tuple[str, ...] = (),
    ) -> None:
        self.home, self.external = home, external or External()
        self.postgres_options, self.allowed_origins = postgres_options, allowed_origins
        self.children: dict[str, Child] = {}
        self.postgres: Postgres | None = None
        self.valkey: Valkey | None = None
        self.objects: Objects | None = None
        self._disk_was_full = False

    def start(self) -> None:
        """Ready in about a second. A port lost between choosing and binding fails this start; the next chooses anew."""
        self.launch()
        self.wait()

    def launch(self) -> None:
        """Begin; `wait` for what is needed. From the main thread, which parent-death signals are tied to."""
        self._configure()
        chosen = [server for server in (self.valkey, self.objects, self.postgres) if server is not None]
        with ThreadPoolExecutor(max_workers=3) as pool:  # initdb and copies at the same time; the starts are ours
            prepared = [(server.name, pool.submit(server.prepare)) for server in chosen]
            for name, future in prepared:
                self.children[name] = future.result()
                self.children[name].start()

    def wait(self, *names: str, timeout_s: float = READY_TIMEOUT_S) -> None:
        """Until those named (or all) are ready."""
        wanted = [self.children[name] for name in names or self.children if name in self.children]
        deadline = time.monotonic() + timeout_s
        while not all(child.is_ready for child in wanted):
            self.tend()
            for child in wanted:
                if time.monotonic() > deadline or child.restarts >= _GIVE_UP_AFTER:
                    raise _never_ready(child)
            time.sleep(0.02)

    def tend(self) -> list[Child]:
        """Look after every child once; those that changed."""
        changed = [child for child in self.children.values() if child.tend()]
        if self.objects and self._has_room_again() and (store := self.children[self.objects.name]).process:
            # SeaweedFS notices room a minute late, and what failed to write its index while there was none may fail
            # ever after. A new start cures both; nothing that was acknowledged is lost.
            store.renew()
            changed.append(store)
        return changed

    def _has_room_again(self) -> bool:
        free, was_full = shutil.disk_usage(self.home.data).free, self._disk_was_full
        self._disk_was_full = free < (ROOM_BYTES if was_full else FULL_BYTES)
        return was_full and not self._disk_was_full

    def stop(self) -> None:
        """Objects, Valkey, Postgres: what others still write to goes last."""
        for name in ("s3", "valkey", "postgres"):
            if child := self.children.get(name):
                child.stop()

    @property
    def admin_url(self) -> str:
        """A URL whose role may create roles."""
        if self.postgres:
            return self.postgres.admin_url
        assert self.external.database_url
        return self.external.database_url

    @property
    def redis_url(self) -> str:
        if self.valkey:
            return self.valkey.url
        assert self.external.redis_url
        return self.external.redis_url

    @property
    def s3_root(self) -> S3Identity:
        """For the api."""
        return self._s3("root")

    @property
    def s3_node(self) -> S3Identity:
        """For the node here. On a store of the user's own: TUNERY_NODE_S3_*, or else the user's one identity."""
        found = self._s3("node")
        if self.objects or not (own := self.s3_for_joined()):
            return found
        return replace(
            found,
            access_key_id=own["TUNERY_NODE_S3_ACCESS_KEY_ID"],
            secret_access_key=own["TUNERY_NODE_S3_SECRET_ACCESS_KEY"],
        )

    def s3_for_joined(self) -> dict[str, str]:
        """For the api, which hands it to nodes that join: never the root identity. Empty where the user named none."""
        own = self.external
        if self.objects:
            key = self.objects.node
        elif own.node_s3_access_key_id and own.node_s3_secret_access_key:
            key = Key(own.node_s3_access_key_id, own.node_s3_secret_access_key)
        else:
            return {}
        return {
            "TUNERY_NODE_S3_ACCESS_KEY_ID": key.access_key_id,
            "TUNERY_NODE_S3_SECRET_ACCESS_KEY": key.secret_access_key,
        }

    @property
    def s3_tidy(self) -> S3Identity:
        """For the scheduler, which deletes what may go."""
        return self._s3("tidy")

    def _s3(self, identity: Literal["root", "node", "tidy"]) -> S3Identity:
        own = self.external
        if self.objects:
            key_id, secret = getattr(self.objects, identity)
            return S3Identity(self.objects.endpoint_url, BUCKET, REGION, key_id, secret)
        assert own.s3_endpoint_url and own.s3_access_key_id and own.s3_secret_access_key
        return S3Identity(
            own.s3_endpoint_url, own.s3_bucket, own.s3_region, own.s3_access_key_id, own.s3_secret_access_key
        )

    def _configure(self) -> None:
        known: dict[str, int] = self.home.state().get("ports", {})
        single = [
            name
            for name, url in (("postgres", self.external.database_url), ("valkey", self.external.redis_url))
            if not url
        ]
        chosen = ports.remembered(single, known)
        weed = {} if self.external.s3_endpoint_url else ports.remembered(list(PORTS), known | chosen, GRPC_OFFSET)
        self.home.update_state(ports=known | chosen | weed)
        if "postgres" in chosen:
            self.postgres = Postgres(self.home, chosen["postgres"], self.postgres_options)
        if "valkey" in chosen:
            self.valkey = Valkey(self.home, chosen["valkey"])
        if weed:
            self.objects = Objects(self.home, weed, self.allowed_origins)


def _never_ready(child: Child) -> Refused:
    state = f"it ended with {child.exit_code}" if child.process is None else "it runs but does not answer"
    return Refused(
        f"{child.name} did not become ready",
        why=f"{state}. The end of its log:\n{child.last_words()}",
        fix=f"read {child.log}; tunery doctor checks disk, memory and ports",
    )
