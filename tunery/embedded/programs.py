"""The api, the scheduler and one node: each with its own role, its own S3 identity, and nothing of the others'."""

import http.client
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from tunery.embedded import ports
from tunery.embedded.home import CHECKOUT, Home
from tunery.embedded.process import Child, Command
from tunery.embedded.servers import Servers

_STEADY_START_S = 0.3
_SECRET_NAMES = (
    "TUNERY_DATABASE_URL",
    "TUNERY_REDIS_URL",
    "TUNERY_KEY_PEPPER",
    "TUNERY_API_KEY",
    "TUNERY_HOME",
    "TUNERY_NODE_TOKEN",
)

_SECRET_PATTERN = re.compile(r"TUNERY_((NODE_)?S3_.*|ADMIN_.*|.*_PASSWORD|.*_DATABASE_URL)|PG.*")


class Programs:
    def __init__(
        self,
        home: Home,
        servers: Servers,
        database_urls: Mapping[str, str],
        api_port: int,
        ops_ports: Mapping[str, int],
        folder: Path = CHECKOUT,
    ) -> None:
        self.ops_ports = ops_ports
        self.home, self.servers, self.urls = home, servers, database_urls
        self.api_port, self.folder = api_port, folder

    def children(self) -> dict[str, Child]:
        """In the order they start; the reverse is the order they stop in."""
        found = [self._api(), self._scheduler(), self._node()]
        return {child.name: child for child in found}

    def _api(self) -> Child:
        own = {
            "TUNERY_DATABASE_URL": self.urls["tunery_api"],
            "TUNERY_KEY_PEPPER": self.home.secrets().made("key_pepper"),
            "TUNERY_API_HOST": ports.HOST,
            "TUNERY_API_PORT": str(self.api_port),
            **self.servers.s3_root.environment(),
            **self.servers.s3_for_joined(),
        }
        return self._child("api", "api", own, self.home.root, self._api_ready)

    def _scheduler(self) -> Child:
        own = {"TUNERY_DATABASE_URL": self.urls["tunery_scheduler"], **self.servers.s3_tidy.environment()}
        return self._child("scheduler", "scheduler", own, self.home.root)

    def _node(self) -> Child:
        own = {
            "TUNERY_DATABASE_URL": self.urls["tunery_worker"],
            "TUNERY_HOME": str(self.home.node),
            "TUNERY_TRAINER_HIDDEN": os.pathsep.join(dict.fromkeys((str(self.home.root), str(self.home.data)))),
            **self.servers.s3_node.environment(),
        }
        return self._child("node", "worker", own, self.home.node, stop_wait_s=30)

    def _child(
        self,
        name: str,
        module: str,
        own: Mapping[str, str],
        cwd: Path,
        ready: Callable[[], bool] | None = None,
        stop_wait_s: float = 10,
    ) -> Child:
        command = Command(
            name=name,
            argv=[sys.executable, "-P", "-m", module],  # -P: nothing in the working directory may shadow a module
            environment=inherited(self.folder)
            | {"TUNERY_OPS_HOST": ports.HOST, "TUNERY_OPS_PORT": str(self.ops_ports[name])}
            | {"TUNERY_REDIS_URL": self.servers.redis_url, **own},
            cwd=cwd,
            stop_wait_s=stop_wait_s,
            # All that they know is in Postgres, and running attempts survive their node: a clean slate is safest.
            orphan_signal=signal.SIGKILL,
        )
        child = Child(command, self.home.logs / f"{name}.log", lambda: False)
        child.ready = ready or (lambda: time.time() - child.started_at > _STEADY_START_S)
        return child

    def _api_ready(self) -> bool:
        connection = http.client.HTTPConnection(ports.HOST, self.api_port, timeout=2)
        try:
            connection.request("GET", "/readyz")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def inherited(folder: Path) -> dict[str, str]:
    """The user's environment without what belongs to one program alone, and with the checkout importable."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _SECRET_NAMES and not _SECRET_PATTERN.fullmatch(name)
    }
    return kept | {"PYTHONPATH": import_path(folder), "PYTHONUNBUFFERED": "1"}


def import_path(folder: Path = CHECKOUT) -> str:
    """The programs' folder and the package's before what the user has; each once."""
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join(filter(None, dict.fromkeys((str(folder), str(CHECKOUT), *given))))
