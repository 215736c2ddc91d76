"""`python -m api`: settings from the environment, one engine, one server; SIGTERM lets requests finish."""

import signal
import sys
import threading
from types import FrameType

import structlog
import uvicorn

from api.main import create_app
from tunery.db import PrivilegedRole, await_own_role, make_engine, make_sessions
from tunery.settings import ApiSettings, load
from tunery.storage import Storage
from tunery.telemetry import configure_logs, tracing
from tunery.telemetry.health import Health
from tunery.telemetry.listener import listen
from tunery.unreadable import hide_from_same_user

log = structlog.get_logger(__name__)

POOL = 20
"""With as many again on demand, one connection for each of the 40 threads that plain routes run on."""
GRACE_S = 30


class Server(uvicorn.Server):
    """Says "not ready" first, goes on serving for `drain_s`, then stops taking requests and finishes those it has."""

    def __init__(self, config: uvicorn.Config, health: Health, drain_s: float) -> None:
        super().__init__(config)
        self._health, self._drain_s = health, drain_s
        self._draining = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._draining or self._drain_s <= 0:
            self._health.drain()
            super().handle_exit(sig, frame)
            return
        self._draining = True
        self._health.drain()
        later = threading.Timer(self._drain_s, super().handle_exit, (sig, frame))
        later.daemon = True
        later.start()


def main() -> int:
    hide_from_same_user()
    configure_logs("api")
    settings = load(ApiSettings)
    tracing.set_up("api")
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=POOL)
    try:
        await_own_role(engine)
    except PrivilegedRole as error:
        log.error("refusing to start", reason=str(error))
        return 2
    # uvicorn stops in order and then raises the signal anew: an orderly stop should end with 0, not as if killed
    signal.signal(signal.SIGTERM, lambda *_: None)
    app = create_app(make_sessions(engine), Storage(settings), settings)
    health: Health = app.state.health
    listen("api", settings, health)
    config = uvicorn.Config(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    Server(config, health, settings.drain_s).run()
    tracing.shut_down()
    engine.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
