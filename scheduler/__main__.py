"""The scheduler's process: `python -m scheduler`."""

import os
import signal
import socket
import sys
import threading
import uuid

import structlog
from pydantic import ValidationError

from scheduler.forecast.child import Child
from scheduler.metrics import Fleet, Leadership
from scheduler.service import Scheduler
from tunery import readiness
from tunery.db import await_own_role, make_engine, make_sessions
from tunery.dispatch import Doorbell, connect
from tunery.settings import SchedulerSettings, StorageSettings, load
from tunery.storage import Storage
from tunery.telemetry import bind_process, configure_logs, hide_secrets, tracing
from tunery.telemetry.health import Health, Part
from tunery.telemetry.listener import listen
from tunery.unreadable import hide_from_same_user


def main() -> int:
    hide_from_same_user()
    configure_logs("scheduler")
    settings = load(SchedulerSettings)
    tracing.set_up("scheduler")
    # a frozen leader's transaction holds the leader's row: it may do so no longer than the lead itself lasts
    engine = make_engine(settings.database_url.get_secret_value(), idle_timeout_s=settings.leader_ttl_s)
    await_own_role(engine)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    holder = f"{socket.gethostname()}/{os.getpid()}/{uuid.uuid4().hex[:8]}"
    doorbell = Doorbell(connect(settings.redis_url.get_secret_value()))
    bind_process(holder=holder)
    sessions = make_sessions(engine)
    scheduler = Scheduler(sessions, doorbell, settings, holder, _storage(), Child(holder))
    parts = [readiness.database(settings), readiness.redis(settings.redis_url), Part("loops", scheduler.loops)]
    collectors = [Leadership(lambda: scheduler.epoch), Fleet(sessions, settings.lease_s)]
    listen("scheduler", settings, Health(parts, scheduler.told), collectors)
    structlog.get_logger().info("scheduler started")
    scheduler.run(stop)
    tracing.shut_down()
    return 0


def _storage() -> Storage | None:
    """Only deleting needs one: a scheduler without an identity there does all the rest."""
    try:
        settings = StorageSettings()  # type: ignore[call-arg] - from the environment
        hide_secrets(settings)
        return Storage(settings)
    except ValidationError:
        return None


if __name__ == "__main__":
    sys.exit(main())
