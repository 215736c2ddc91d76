"""The node's doorbell: one RQ worker on the node's own queue. It writes to a socket, and runs nothing else.

Whoever can write to Redis can name any importable function in a message; this worker runs the one it knows and
throws everything else away without importing it.
"""

import os
import socket
import sys
import uuid
from typing import Any

import structlog
from redis.exceptions import RedisError
from rq import Queue, SimpleWorker
from rq.job import Job
from rq.serializers import JSONSerializer

from tunery.dispatch import RING, connect, queue_name
from tunery.telemetry import bind_process, configure_logs
from tunery.unreadable import hide_from_same_user
from worker import processes

log = structlog.get_logger(__name__)


def ring(what: str) -> None:
    """Wake the node process. The id is only for its log: the node asks Postgres what there is to do."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bell:
        bell.settimeout(2)
        try:
            bell.sendto(str(what)[:100].encode(), os.environ["TUNERY_NODE_SOCKET"])
        except OSError:
            log.warning("nobody answers the door; the node's own poll will find the work")


class RingWorker(SimpleWorker):
    """Runs `ring` in its own process: a fork for each message would cost more than the message."""

    def execute_job(self, job: Job, queue: Queue) -> None:
        if not _is_ring(job):
            self._refuse(job, queue)
            return
        super().execute_job(job, queue)

    def _refuse(self, job: Job, queue: Queue) -> None:
        log.error("refused a message that is no ring", message_id=job.id[:100])
        self.connection.lrem(queue.intermediate_queue_key, 1, job.id)
        self.connection.delete(job.key)


def _is_ring(job: Job) -> bool:
    """Reading any field of a foreign message may raise; whatever raises is no ring."""
    try:
        extras = (job._success_callback_name, job._failure_callback_name, job._stopped_callback_name)
        more: list[Any] = [getattr(job, name, None) for name in ("webhooks", "retries_left", "dependency_ids")]
        return job.func_name == RING and not any(extras) and not any(more) and len(job.args) == 1 and not job.kwargs
    except Exception:  # noqa: BLE001 - a message may break in any way it likes
        return False


def main() -> int:
    hide_from_same_user()
    configure_logs("ring")
    bind_process(node=os.environ["TUNERY_NODE_ID"])
    processes.follow(int(os.environ["TUNERY_NODE_PID"]))
    connection = connect(os.environ["TUNERY_REDIS_URL"], timeout_s=75)
    node_id = os.environ["TUNERY_NODE_ID"]
    queue = Queue(queue_name(node_id), connection=connection, serializer=JSONSerializer)
    worker = RingWorker(
        [queue],
        # a fixed name would block a restart until its old key has expired
        name=f"{node_id}-{uuid.uuid4().hex[:8]}",
        connection=connection,
        serializer=JSONSerializer,
        worker_ttl=60,
    )
    try:
        worker.work(logging_level="WARNING")
    except RedisError as error:
        log.warning("redis is away; the node polls meanwhile", error=str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
