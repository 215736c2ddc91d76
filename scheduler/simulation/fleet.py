"""The simulation's nodes: what each device has free, who shares it, and the engines on them."""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial

from scheduler.simulation.fate import Live
from tunery.contracts.scheduling import EngineView, GpuView, JobView, NodeView, RunningView, Start


@dataclass(slots=True)
class _Node:
    view: NodeView
    free: dict[uuid.UUID, int]
    held_by: dict[uuid.UUID, uuid.UUID | None]
    slots: int
    up: bool = True
    shown: NodeView | None = None
    """`view` as it is now, while nothing has changed."""


class Fleet:
    def __init__(self, nodes: Iterable[NodeView], engines: Iterable[EngineView]) -> None:
        self._nodes = {one.id: _node(one) for one in nodes}
        self._engines = {one.id: one for one in engines}

    def take(self, start: Start, job: JobView) -> None:
        node = self._nodes[start.node_id]
        node.shown = None
        node.slots -= 1
        for gpu_id in start.gpu_ids:
            node.free[gpu_id] = 0 if start.exclusive else node.free[gpu_id] - start.bytes_per_gpu
            if not start.exclusive and start.engine_id is None:
                node.held_by[gpu_id] = job.project_id
        if start.engine_id is not None and start.engine_id not in self._engines:
            first, key = start.gpu_ids[0], job.engine_key or ""
            self._engines[start.engine_id] = EngineView(start.engine_id, start.node_id, first, job.organization_id, key)

    def give_back(self, one: Live, staying: Iterable[RunningView]) -> None:
        """`staying`: everybody else who runs. An engine's base stays as long as anybody of it does."""
        view = one.view
        if (node := self._nodes.get(view.node_id)) is None:
            return
        node.shown = None
        node.slots += 1
        others = [other for other in staying if other.node_id == view.node_id]
        for gpu in node.view.gpus:
            if gpu.id not in view.gpu_ids:
                continue
            if any(gpu.id in other.gpu_ids for other in others):
                opened = view.engine_id is not None and view.bytes_per_gpu == one.job.required_bytes
                node.free[gpu.id] += one.job.engine_bytes if opened else view.bytes_per_gpu
            else:
                node.free[gpu.id] = gpu.usable_bytes
                node.held_by[gpu.id] = None
        if view.engine_id is not None and all(other.engine_id != view.engine_id for other in others):
            self._engines.pop(view.engine_id, None)

    def turn(self, node_id: uuid.UUID, *, up: bool) -> None:
        node = self._nodes[node_id]
        node.up, node.shown = up, None

    def nodes(self) -> tuple[NodeView, ...]:
        return tuple(map(_shown, self._nodes.values()))

    def engines(self) -> tuple[EngineView, ...]:
        return tuple(self._engines.values())


def _node(view: NodeView) -> _Node:
    free = {gpu.id: gpu.free_bytes for gpu in view.gpus}
    return _Node(view, free, {gpu.id: gpu.held_by for gpu in view.gpus}, view.free_slots)


def _shown(node: _Node) -> NodeView:
    if node.shown is None:
        gpus = tuple(map(partial(_gpu, node.free, node.held_by), node.view.gpus))
        node.shown = replace(node.view, free_slots=node.slots, gpus=gpus)
        if not node.up:
            node.shown = replace(node.shown, schedulable=False, why_not="silent")
    return node.shown


def _gpu(free: dict[uuid.UUID, int], held_by: dict[uuid.UUID, uuid.UUID | None], gpu: GpuView) -> GpuView:
    if gpu.free_bytes == free[gpu.id] and gpu.held_by == held_by[gpu.id]:
        return gpu
    return replace(gpu, free_bytes=free[gpu.id], held_by=held_by[gpu.id])
