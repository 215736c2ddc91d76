"""The doorbell: one RQ queue a node, one function by name, an id as its only argument. Losing one costs seconds."""

import json
import uuid
from collections.abc import Iterable, Mapping

from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry
from rq import Queue
from rq.serializers import JSONSerializer

from tunery import redis_acl

RING = "worker.ring.ring"
"""A wire contract: this process never imports the worker."""


def connect(url: str, timeout_s: float = 2) -> Redis:
    """A client that gives up quickly: nothing durable waits for Redis."""
    return Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        health_check_interval=30,
        retry=Retry(NoBackoff(), 1),
    )


def queue_name(node_id: uuid.UUID | str) -> str:
    return f"node:{node_id}"


class Doorbell:
    """Rings nodes. Raises redis.RedisError when Redis is away; the node's own poll finds the work all the same."""

    def __init__(self, redis: Redis) -> None:
        self._redis = redis

    def ring(self, node_id: uuid.UUID | str, what: str) -> None:
        queue = Queue(queue_name(node_id), connection=self._redis, serializer=JSONSerializer)
        # the node's id leads, so that a node's own Redis user can be held to its own messages
        message = f"{node_id}-{uuid.uuid4().hex}"
        queue.enqueue_call(RING, args=(what,), job_id=message, timeout=60, result_ttl=0, ttl=300, failure_ttl=3600)

    def keep_users(self, wanted: Mapping[uuid.UUID, str], gone: Iterable[uuid.UUID]) -> list[uuid.UUID]:
        """Joined nodes' own users, as Postgres has them; those that had to be made or ended."""
        return redis_acl.restore(self._redis, wanted, gone)

    def announce(self, job_id: str, state: str) -> None:
        """Tell whoever listens right now that a job has ended. Nothing waits for a listener."""
        self._redis.publish(f"training:done:{job_id}", json.dumps({"job_id": job_id, "status": state}))

    def warn(self, alert: Mapping[str, object]) -> None:
        """Tell whoever listens right now that a budget is nearly, or wholly, used up."""
        self._redis.publish(f"budget:alert:{alert['project_id']}", json.dumps(dict(alert)))
