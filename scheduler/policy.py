"""Who starts where: a pure function of what is waiting and what is free.

First come, first served, with GPU memory fit. The oldest job that fits nowhere holds back every job behind it that
would take room it is waiting for: nothing behind it may start on a node where it could run.
"""

import uuid
from dataclasses import replace

from tunery.contracts.scheduling import GpuView, JobView, NodeView, Plan, Reason, Snapshot, Start, Wait, WaitCode


def schedule(snapshot: Snapshot) -> Plan:
    """One decision a waiting job, in the order of the queue. No clock, no randomness, no I/O."""
    nodes = {node.id: node for node in snapshot.nodes}
    blocked: set[uuid.UUID] = set()
    """Nodes kept for an older job that will fit there once they are free."""
    starts: list[Start] = []
    waits: list[Wait] = []
    ahead = 0
    for job in sorted(snapshot.jobs, key=lambda job: (job.queued_at, job.id)):
        able = [node for node in nodes.values() if _could_ever_run(node, job)]
        start = _place(job, [node for node in able if node.id not in blocked])
        if start is not None:
            starts.append(start)
            nodes[start.node_id] = _take(nodes[start.node_id], start)
        else:
            waits.append(Wait(job.id, _reason(job, list(nodes.values()), able, ahead)))
            blocked |= {node.id for node in able}
            ahead += 1
    return Plan(tuple(starts), waits=tuple(waits))


def _could_ever_run(node: NodeView, job: JobView) -> bool:
    return sum(gpu.usable_bytes >= job.required_bytes for gpu in node.gpus) >= job.gpus


def _place(job: JobView, nodes: list[NodeView]) -> Start | None:
    """The node that keeps the fewest GPUs idle afterwards, and on it the smallest GPUs that are large enough."""
    fits = [(node, free) for node in nodes if node.free_slots and len(free := _free(node, job)) >= job.gpus]
    if not fits:
        return None
    node, free = min(fits, key=lambda fit: (len(fit[1]), fit[0].name))
    chosen = sorted(free, key=lambda gpu: (gpu.usable_bytes, gpu.id))[: job.gpus]
    return Start(job.id, node.id, tuple(gpu.id for gpu in chosen), job.required_bytes)


def _free(node: NodeView, job: JobView) -> list[GpuView]:
    """GPUs that nobody holds and that are large enough: an attempt has its GPU to itself."""
    return [gpu for gpu in node.gpus if gpu.free_bytes == gpu.usable_bytes and gpu.usable_bytes >= job.required_bytes]


def _take(node: NodeView, start: Start) -> NodeView:
    gpus = tuple(replace(gpu, free_bytes=0) if gpu.id in start.gpu_ids else gpu for gpu in node.gpus)
    return replace(node, free_slots=node.free_slots - 1, gpus=gpus)


def _reason(job: JobView, nodes: list[NodeView], able: list[NodeView], ahead: int) -> Reason:
    need = ("gpus", job.gpus), ("bytes", job.required_bytes)
    if not nodes:
        return Reason(WaitCode.NO_NODE, need)
    if not able:
        largest = max((gpu.usable_bytes for node in nodes for gpu in node.gpus), default=0)
        return Reason(WaitCode.TOO_LARGE, (*need, ("largest", largest)))
    busy = sum(gpu.free_bytes < gpu.usable_bytes for node in able for gpu in node.gpus)
    total = sum(len(node.gpus) for node in able)
    return Reason(WaitCode.BUSY, (*need, ("busy", busy), ("total", total), ("ahead", ahead)))
