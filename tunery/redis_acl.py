"""A joined node's user in Redis: its own queue, what RQ keeps about it, and nothing else.

Postgres says which users there should be; the server may forget them (it keeps no ACL file unless told to), and the
scheduler then makes them again. A node whose user is missing works on: it polls.
"""

import uuid
from collections.abc import Iterable, Mapping

from redis import Redis
from redis.exceptions import ResponseError

_PREFIX = "tunery-node-"
_COMMANDS = (
    *("auth", "hello", "ping", "quit", "info", "client|setname", "client|setinfo", "client|info"),
    *("multi", "exec", "discard", "watch", "unwatch", "subscribe", "unsubscribe"),
    *("blmove", "lmove", "llen", "lpos", "lrange", "lrem"),
    *("del", "exists", "expire", "persist", "ttl", "get", "set"),
    *("hdel", "hexists", "hget", "hgetall", "hincrby", "hincrbyfloat", "hset"),
    *("sadd", "scard", "sismember", "smembers", "srem"),
    *("zadd", "zcard", "zrange", "zrangebyscore", "zrem", "zremrangebyscore", "zscore"),
)


def user_of(node_id: uuid.UUID) -> str:
    return f"{_PREFIX}{node_id}"


def rules(node_id: uuid.UUID, password_sha256: str) -> list[str]:
    """For ACL SETUSER, starting from nothing, so that repeating it repairs."""
    own = [f"~rq:*{node_id}*", f"&rq:pubsub:{node_id}-*"]  # every key that RQ makes for this node carries its id
    shared = ["%R~rq:groups", "%R~rq:suspended", "%R~rq:rl-keys"]
    # three names that all workers keep; what another node could spoil there is only what `rq info` shows
    lists = ["(+sadd +srem ~rq:workers ~rq:queues)", "(+set ~rq:clean_groups)"]
    return ["reset", "on", f"#{password_sha256}", *own, *shared, *(f"+{name}" for name in _COMMANDS), *lists]


def is_kept(redis: Redis) -> bool:
    """Does this server let us keep users? Raises redis.ConnectionError or TimeoutError where it cannot be asked."""
    try:
        redis.acl_users()
    except ResponseError:  # an old server, or one that is managed by somebody else
        return False
    return True


def admit(redis: Redis, node_id: uuid.UUID, password_sha256: str) -> None:
    redis.execute_command("ACL SETUSER", user_of(node_id), *rules(node_id, password_sha256))


def remove(redis: Redis, node_id: uuid.UUID) -> None:
    """Its connections end with it."""
    redis.acl_deluser(user_of(node_id))


def restore(redis: Redis, wanted: Mapping[uuid.UUID, str], gone: Iterable[uuid.UUID]) -> list[uuid.UUID]:
    """Make the users that are missing, and end those of removed nodes; the ids whose user was made or ended.

    Users of nodes that nobody named stay: another deployment may share this server.
    """
    there = {name.decode() if isinstance(name, bytes) else str(name) for name in redis.acl_users()}
    made = [node_id for node_id in wanted if user_of(node_id) not in there]
    ended = [node_id for node_id in gone if user_of(node_id) in there]
    for node_id in made:
        admit(redis, node_id, wanted[node_id])
    for node_id in ended:
        remove(redis, node_id)
    return made + ended
