"""Logs and metrics: JSON lines with ids, Prometheus names in base units. Set up once, in each entry point."""

import logging
import sys

import structlog
from prometheus_client import Counter, Histogram

HTTP_DURATION = Histogram(
    "tunery_http_request_duration_seconds", "Time to answer a request.", ["route", "method", "status"]
)
UPLOADED_BYTES = Counter("tunery_uploaded_bytes_total", "Bytes of files accepted.")


def configure_logs(program: str, level: int = logging.INFO) -> None:
    """One JSON object a line on stderr, from structlog and from libraries alike."""
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso"),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.EventRenamer("message"),
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("botocore", "boto3", "urllib3", "s3transfer", "uvicorn.access"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    structlog.contextvars.bind_contextvars(program=program)
