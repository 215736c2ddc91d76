"""`/v1/queue`: what waits and what is free."""

from fastapi import APIRouter, Depends

from api.deps import Scope, SessionDep
from api.schemas.cluster import QueueOut, queue_out
from tunery import queue_info

router = APIRouter(prefix="/v1/queue", tags=["Queue"], dependencies=[Depends(Scope("jobs:read"))])


@router.get("")
def retrieve_queue(session: SessionDep) -> QueueOut:
    """The queue in numbers, in all and by GPU class. Other projects' jobs are counted, never named."""
    return queue_out(queue_info.counts(session))
