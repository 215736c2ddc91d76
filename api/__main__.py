"""`python -m api`: settings from the environment, one engine, one server; SIGTERM lets requests finish."""

import signal
import sys

import structlog
import uvicorn
from pydantic import ValidationError

from api.main import create_app
from tunery.db import PrivilegedRole, make_engine, make_sessions, refuse_privileged_role
from tunery.settings import ApiSettings
from tunery.storage import Storage
from tunery.telemetry import configure_logs
from tunery.unreadable import hide_from_same_user

log = structlog.get_logger(__name__)

POOL = 20
"""With as many again on demand, one connection for each of the 40 threads that plain routes run on."""
GRACE_S = 30


def main() -> int:
    hide_from_same_user()
    configure_logs("api")
    try:
        settings = ApiSettings()  # pyright: ignore[reportCallIssue] - read from the environment
    except ValidationError as error:
        missing = ", ".join(f"TUNERY_{str(problem['loc'][0]).upper()}" for problem in error.errors())
        log.error("settings are missing or wrong", variables=missing)
        return 2
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=POOL)
    try:
        refuse_privileged_role(engine)
    except PrivilegedRole as error:
        log.error("refusing to start", reason=str(error))
        return 2
    # uvicorn stops in order and then raises the signal anew: an orderly stop should end with 0, not as if killed
    signal.signal(signal.SIGTERM, lambda *_: None)
    app = create_app(make_sessions(engine), Storage(settings), settings)
    uvicorn.run(
        app,
        host=settings.api_host,
        port=settings.api_port,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    engine.dispose()
    return 0


if __name__ == "__main__":
    sys.exit(main())
