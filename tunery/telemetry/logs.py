"""Logs: one JSON object a line on stderr, with the ids that are known, whoever wrote the line.

`TUNERY_LOG_FORMAT=console` is for people at a terminal, `TUNERY_LOG_LEVEL` says how much is told. They are read
here and not in the settings, because wrong settings must be told too.
"""

import json
import logging
import os
import sys
import threading
from collections.abc import Mapping
from types import TracebackType
from typing import Any
from urllib.parse import unquote, urlsplit

import structlog
from pydantic import BaseModel, SecretStr

from tunery import __version__
from tunery.telemetry import tracing

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
_NOISY = ("botocore", "boto3", "urllib3", "s3transfer", "uvicorn.access")
_SHORTEST_SECRET = 6
"""Anything shorter would blank half of every line, and protects nothing."""

_process: dict[str, object] = {}
_secrets: set[str] = set()

log = structlog.get_logger(__name__)


def configure_logs(program: str) -> None:
    """Every line of this process, from structlog and from libraries alike, uncaught exceptions and warnings too."""
    level, form = _chosen("TUNERY_LOG_LEVEL", "INFO", LEVELS), _chosen("TUNERY_LOG_FORMAT", "JSON", ("JSON", "CONSOLE"))
    bind_process(program=program, version=__version__)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        _add_process,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", key="time"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level)),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                _console() if form == "CONSOLE" else structlog.processors.JSONRenderer(),
                _blank_secrets,
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in _NOISY:
        logging.getLogger(noisy).setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = _broke
    threading.excepthook = lambda broken: _broke(broken.exc_type, broken.exc_value, broken.exc_traceback)


def bind_process(**ids: object) -> None:
    """Ids that every line of this process carries from now on, whichever thread writes it. None removes one."""
    _process.update(ids)
    for name in [name for name, value in _process.items() if value is None]:
        del _process[name]


def hide_secrets(settings: BaseModel) -> None:
    """Blank this program's own secrets in whatever it may ever print: an exception's text may quote a URL."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, SecretStr):
            _hide(value.get_secret_value())


def _hide(secret: str) -> None:
    found = {secret}
    if "://" in secret and (password := urlsplit(secret).password):
        found |= {password, unquote(password)}
    found |= {json.dumps(one)[1:-1] for one in found}
    _secrets.update(one for one in found if len(one) >= _SHORTEST_SECRET)


def _add_process(_logger: Any, _method: str, line: structlog.typing.EventDict) -> Mapping[str, Any]:
    return {**_process, **tracing.current_ids(), **line}


def _blank_secrets(_logger: Any, _method: str, line: Any) -> str:
    for secret in _secrets:
        line = line.replace(secret, "***")
    return line


def _console() -> structlog.typing.Processor:
    return structlog.dev.ConsoleRenderer(
        colors=sys.stderr.isatty(),
        event_key="message",
        timestamp_key="time",
        exception_formatter=structlog.dev.plain_traceback,
    )


def _broke(kind: type[BaseException], error: BaseException | None, trace: TracebackType | None) -> None:
    if error is None or issubclass(kind, KeyboardInterrupt | SystemExit):
        return
    log.critical("the program broke", exc_info=(kind, error, trace))


def _chosen(variable: str, default: str, known: tuple[str, ...]) -> str:
    """A wrong word here must not keep a program from starting, nor silence it."""
    given = os.environ.get(variable, default).upper()
    return given if given in known else default
