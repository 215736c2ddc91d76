"""For whoever runs the program: does it live, can it work. No key needed, nothing told of what it works on.

Metrics are not here: they are on the operations listener (`tunery.telemetry.listener`), which tenants do not reach.
"""

import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from tunery.telemetry.health import Health

router = APIRouter(tags=["Operations"])


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/livez", include_in_schema=False)
async def livez() -> dict[str, str]:
    """The same, under the name that Kubernetes uses."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "`parts` says what is not ready."}})
async def readyz(request: Request) -> JSONResponse:
    """Postgres has the schema that is needed and the object store answers; 503 and the name of the part otherwise."""
    app = request.app.state
    health: Health = app.health
    report = await anyio.to_thread.run_sync(health.report, limiter=app.probes)
    return JSONResponse(report.body(), 200 if report.ready else 503)
