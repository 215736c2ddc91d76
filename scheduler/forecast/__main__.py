"""The forecaster's process: `python -m scheduler.forecast HOLDER`, started by the scheduler of that name.

A process of its own, and a polite one: simulating takes seconds of CPU, and a pass of the policy has milliseconds. It
works while its scheduler leads and ends with it: nobody writes to its stdin, which closes when the scheduler is gone.
"""

import os
import signal
import sys
import threading

import structlog

from scheduler.forecast.service import Forecaster
from tunery.db import await_own_role, make_engine, make_sessions
from tunery.settings import SchedulerSettings, load
from tunery.telemetry import bind_process, configure_logs
from tunery.unreadable import hide_from_same_user

_NICE = 10


def main(holder: str) -> int:
    hide_from_same_user()
    configure_logs("forecaster")
    settings = load(SchedulerSettings)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the scheduler
    os.nice(_NICE)
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    threading.Thread(target=_await_end_of_input, args=(stop,), daemon=True).start()
    engine = make_engine(settings.database_url.get_secret_value(), pool_size=2)
    await_own_role(engine)
    bind_process(holder=holder)
    structlog.get_logger().info("forecaster started")
    Forecaster(make_sessions(engine), settings, holder).run(stop)
    return 0


def _await_end_of_input(stop: threading.Event) -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    stop.set()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
