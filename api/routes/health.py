"""For whoever runs the program: does it live, can it work, what does it measure. No key needed, nothing told."""

from collections.abc import Callable
from functools import partial
from typing import Any

import anyio
import anyio.to_thread
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import text

from tunery.db import Sessions

router = APIRouter(tags=["Operations"])
READY_WITHIN_S = 3.0


@router.get("/healthz")
async def healthz() -> dict[str, str]:
    """The process answers."""
    return {"status": "ok"}


@router.get("/readyz", responses={503: {"description": "`parts` says what is not ready."}})
async def readyz(request: Request) -> JSONResponse:
    """Database and object store answer; 503 and the name of the part otherwise."""
    checks = {"database": partial(_ask_database, request.app.state.sessions), "storage": request.app.state.storage.ping}
    parts: dict[str, str] = {}
    async with anyio.create_task_group() as group:
        for name, check in checks.items():
            group.start_soon(_look, request.app.state.probes, name, check, parts)
    ready = all(state == "ok" for state in parts.values())
    body = {"status": "ready" if ready else "not ready", "parts": {name: parts[name] for name in checks}}
    return JSONResponse(body, 200 if ready else 503)


@router.get("/metrics", response_class=Response)
async def metrics() -> Response:
    """Prometheus' text format."""
    return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)


def _ask_database(sessions: Sessions) -> None:
    with sessions() as session:
        session.execute(text("SELECT 1"))


async def _look(limiter: anyio.CapacityLimiter, name: str, check: Callable[[], Any], parts: dict[str, str]) -> None:
    """A part that hangs costs a thread of its own few, never one of those that answer requests."""
    parts[name] = f"no answer in {READY_WITHIN_S:g} s"
    with anyio.move_on_after(READY_WITHIN_S):
        try:
            await anyio.to_thread.run_sync(check, abandon_on_cancel=True, limiter=limiter)
            parts[name] = "ok"
        except Exception as error:  # noqa: BLE001 - whatever it is, the part is not ready; its text may hold a URL
            parts[name] = f"failed ({type(error).__name__})"
