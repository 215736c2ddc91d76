"""The node's process: `python -m worker`."""

import logging
import os
import uuid

import structlog

from tunery.db import await_own_role, make_engine, make_sessions
from tunery.ids import uuid7
from tunery.settings import NodeSettings, load
from tunery.storage import Storage
from tunery.telemetry import bind_process, configure_logs, tracing
from tunery.telemetry.listener import listen
from tunery.unreadable import hide_from_same_user
from worker import locks
from worker.isolation.host import NotIsolated, decide
from worker.metrics import NodeMetrics
from worker.node import Node, Replaced

log = structlog.get_logger(__name__)


def main() -> int:
    hide_from_same_user()
    configure_logs("node")
    settings = load(NodeSettings)
    tracing.set_up("node")
    settings.home.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        lock = locks.take(settings.home / "node.lock")
    except locks.Taken:
        log.error("a node already runs in this home", home=str(settings.home))
        return 1
    with lock:
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        url, tasks = settings.database_url.get_secret_value(), settings.cpu_task_slots
        engine = make_engine(url, pool_size=tasks + 2, idle_timeout_s=settings.lease_s)
        await_own_role(engine)
        node_id = _identity(settings)
        bind_process(node=str(node_id))
        try:
            ways, shown = decide(settings)
        except NotIsolated as error:
            log.error("this host does not isolate trainers as required", missing=str(error), docs="docs/isolation.md")
            return 1
        try:
            node = Node(node_id, settings, make_sessions(engine, node_id=node_id), Storage(settings), ways, shown)
            listen("node", settings, node.health, [NodeMetrics(settings.home), node.meters])
            node.run()
        except Replaced:
            log.error("another process has registered as this node; leaving it to that one")
            return 1
        finally:
            tracing.shut_down()
    return 0


def _identity(settings: NodeSettings) -> uuid.UUID:
    """Made once and kept in the node's home: a restarted node is the same node."""
    path = settings.home / "node_id"
    if not path.exists():
        part = path.with_suffix(".part")
        part.write_text(str(uuid7()))
        part.rename(path)
    return uuid.UUID(path.read_text().strip())


if __name__ == "__main__":
    code = main()
    logging.shutdown()
    os._exit(code)  # a task's thread may be in the middle of an import that takes an hour; it is leased, and repeatable
