"""A tap on the scheduler's shoulder: Postgres NOTIFY, delivered when the transaction commits.

Only a hint: a lost one costs the pause between two looks. So nothing breaks behind a pooler that does not pass it on.
"""

import threading
from collections.abc import Callable
from typing import LiteralString

import psycopg
import structlog
from sqlalchemy import text
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

log = structlog.get_logger(__name__)

_CHANNEL = "tunery_scheduler"
_QUESTIONS = "tunery_questions"
_LOOK_UP_S = 5.0
_AGAIN_S = 2.0


def scheduler(session: Session) -> None:
    """Something waits for the scheduler, or room has appeared. Many taps of one transaction arrive as one."""
    with session.no_autoflush:  # callers are in the middle of a change, and the rows' checks see only whole ones
        session.execute(text(f"SELECT pg_notify('{_CHANNEL}', '')"))


def forecaster(session: Session) -> None:
    """Somebody asks what would become of a job, and waits for the answer."""
    session.execute(text(f"SELECT pg_notify('{_QUESTIONS}', '')"))


def listen(engine: Engine, heard: Callable[[], None], stop: threading.Event) -> None:
    """Call `heard` at each tap of the scheduler; see `_listen`."""
    _listen(engine, _CHANNEL, heard, stop)


def listen_for_questions(engine: Engine, heard: Callable[[], None], stop: threading.Event) -> None:
    _listen(engine, _QUESTIONS, heard, stop)


def _listen(engine: Engine, channel: LiteralString, heard: Callable[[], None], stop: threading.Event) -> None:
    """Call `heard` at each tap, and whenever some may have been missed, until `stop` is set."""
    while not stop.is_set():
        try:
            _listen_once(engine, channel, heard, stop)
        except (DBAPIError, psycopg.Error, OSError) as error:
            log.warning("not woken by the database meanwhile; looking now and then", error=str(error).strip()[:200])
            stop.wait(_AGAIN_S)


def _listen_once(engine: Engine, channel: LiteralString, heard: Callable[[], None], stop: threading.Event) -> None:
    with engine.connect() as borrowed:
        connection = borrowed.execution_options(isolation_level="AUTOCOMMIT")
        driver = connection.connection.driver_connection
        assert isinstance(driver, psycopg.Connection)
        connection.detach()  # closed afterwards: nobody else should inherit what it listens to
        driver.execute(f"LISTEN {channel}")
        heard()
        while not stop.is_set():
            for _ in driver.notifies(timeout=_LOOK_UP_S, stop_after=1):
                heard()
