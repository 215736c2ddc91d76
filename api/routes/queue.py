"""`/v1/queue`: what waits, what is free, and what would become of one more job."""

import time
from typing import Annotated

from fastapi import APIRouter, Depends

from api import pages, waits
from api.deps import Scope, SessionDep, SettingsDep, Tenant, TenantDep
from api.documentation import problems
from api.schemas.queue import QueueOut, SimulateIn, SimulationOut, quote_of, shown, simulation_out
from tunery import forecasts, jobs, queue_info, whatif
from tunery.errors import Unavailable
from tunery.forecasts import Answer
from tunery.whatif import Asked

router = APIRouter(prefix="/v1/queue", tags=["Queue"], dependencies=[Depends(Scope("jobs:read"))])

MAX_JOBS = 100
_PAUSE_S = 0.05


@router.get("", responses=problems(400))
def retrieve_queue(
    tenant: TenantDep, session: SessionDep, limit: Annotated[int, pages.limit_query(MAX_JOBS)] = 0
) -> QueueOut:
    """The queue in numbers, in all and by GPU class, and your own waiting jobs: why each waits, and when it starts.

    Other projects' jobs are counted, never named.
    """
    rows = jobs.waiting_jobs(session, tenant.project_id, limit or MAX_JOBS)
    return shown(queue_info.counts(session), rows, waits.told(session, tenant.project_id, rows, first=True))


@router.post("/simulate", responses=problems(400, 404, 429, 503))
def simulate_job(body: SimulateIn, tenant: TenantDep, settings: SettingsDep) -> SimulationOut:
    """When a job would start if it were submitted now: its place, why it would wait, what it would cost.

    The scheduler answers from what it sees at this moment. Nothing is submitted. Times are rounded to five minutes.
    """
    with tenant.transaction() as session:
        asked = whatif.ask(session, tenant.identity, quote_of(body), max_gpus=settings.max_gpus_per_job)
    return simulation_out(asked, _answer(tenant, asked, settings.simulate_wait_s))


def _answer(tenant: Tenant, asked: Asked, wait_s: float) -> Answer:
    """Raises Unavailable when the scheduler has not answered in time."""
    until = time.monotonic() + wait_s
    while True:
        with tenant.transaction() as session:
            found = forecasts.answer_of(session, asked.question_id)
        if found is not None:
            return found
        if time.monotonic() > until:
            fix = "See whether a scheduler runs (`tunery status`, its /readyz), and ask again."
            raise Unavailable(f"The scheduler did not answer within {wait_s:g} s.", fix=fix)
        time.sleep(_PAUSE_S)
