"""The app: routes below `/v1`, a key for each of them, one envelope for every error."""

import anyio
from fastapi import Depends, FastAPI

from api import errors
from api.deps import JOIN, authenticate
from api.documentation import ALWAYS, operation_id
from api.middleware import BodyLimit, Edge
from api.retry import Retry
from api.routes import (
    adapters,
    audit,
    base_models,
    budgets,
    estimates,
    files,
    gpus,
    health,
    identity,
    jobs,
    legacy,
    models,
    nodes,
    projects,
    queue,
    usage,
)
from tunery import __version__, readiness
from tunery.db import Sessions
from tunery.dispatch import connect
from tunery.settings import MIB, ApiSettings
from tunery.storage import Storage
from tunery.telemetry.health import Health

MAX_JSON_BYTES = MIB
_DESCRIPTION = """Fine-tuning on your own GPUs, in the form that OpenAI's API made familiar.

Code written for `client.files`, `client.models` and `client.fine_tuning` needs a new `base_url` and nothing else.
Whatever is ours lies under the key `tunery` of requests and responses. A project is the tenant: a key opens one
project, and another project's objects do not exist for it."""


def create_app(sessions: Sessions, storage: Storage, settings: ApiSettings) -> FastAPI:
    app = FastAPI(
        title="Tunery",
        version=__version__,
        description=_DESCRIPTION,
        dependencies=[Depends(authenticate)],
        generate_unique_id_function=operation_id,
        responses=ALWAYS,
        redoc_url=None,
        swagger_ui_oauth2_redirect_url=None,
        redirect_slashes=False,
    )
    app.state.sessions, app.state.storage, app.state.settings = sessions, storage, settings
    app.state.redis = connect(settings.redis_url.get_secret_value())
    asked = [readiness.database(settings), readiness.storage(settings), readiness.redis(settings.redis_url)]
    app.state.health, app.state.probes = Health(asked), anyio.CapacityLimiter(4)
    errors.install(app)
    ours = (base_models, adapters, nodes, gpus, queue, projects, audit, usage, budgets, identity, legacy, health)
    for module in (files, jobs, estimates, models, *ours):
        app.include_router(module.router)  # routers carry their whole prefix: metrics name a route by it
    uploads = {("POST", "/v1/files"): settings.max_file_bytes}
    app.add_middleware(Retry, once=frozenset({*uploads, ("POST", JOIN)}))
    app.add_middleware(BodyLimit, default=MAX_JSON_BYTES, files=uploads)
    app.add_middleware(Edge)  # added last, so outermost
    return app
