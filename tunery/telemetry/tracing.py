"""Traces: OpenTelemetry over OTLP/HTTP if `OTEL_EXPORTER_OTLP_ENDPOINT` says where to; else nothing is imported.

A trace goes from the client's request to the last step. Between programs it travels as a W3C `traceparent`: in the
request, on the job's row, on the attempt's. That works without an exporter too: a client's own trace id then still
stands in every log line of its job.
"""

import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from tunery import __version__

Kind = Literal["internal", "server", "client", "producer", "consumer"]
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_FLUSH_S = 3.0

_tracer: Any = None
_provider: Any = None
_root: str | None = None


def wanted() -> bool:
    """Whether the standard variables ask for traces."""
    given = os.environ.get
    endpoint = given("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or given("OTEL_EXPORTER_OTLP_ENDPOINT")
    exporter = given("OTEL_TRACES_EXPORTER", "otlp")
    return bool(endpoint) and "otlp" in exporter and given("OTEL_SDK_DISABLED", "").lower() != "true"


def set_up(program: str) -> None:
    """Start exporting, if that is wanted. The sampler, limits and headers are read from `OTEL_*` by the SDK itself."""
    global _tracer, _provider
    if not wanted():
        return
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    ours = {
        "service.name": os.environ.get("OTEL_SERVICE_NAME") or f"tunery-{program}",
        "service.namespace": "tunery",
        "service.version": __version__,
        "service.instance.id": f"{os.uname().nodename}/{os.getpid()}",
    }
    _provider = TracerProvider(resource=Resource.create(ours), shutdown_on_exit=False)
    _provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    _tracer = _provider.get_tracer("tunery", __version__)


def shut_down() -> None:
    """Send what is left, for seconds at most: a collector that hangs must not keep a program from ending."""
    if _provider is not None:
        ending = threading.Thread(target=_provider.shutdown, daemon=True)
        ending.start()
        ending.join(_FLUSH_S)


def on() -> bool:
    return _tracer is not None


def sane(traceparent: str | None) -> str | None:
    """A `traceparent` as the W3C defines it, or None for anything else."""
    return traceparent if traceparent and _TRACEPARENT.fullmatch(traceparent) else None


def trace_id(traceparent: str | None) -> str | None:
    return traceparent.split("-")[1] if sane(traceparent) and traceparent else None


def follow(traceparent: str | None) -> None:
    """From now on spans of this process that have no other parent belong to this one."""
    global _root
    _root = sane(traceparent)


def current() -> str | None:
    """The `traceparent` to hand on: of the span this code runs in, else the one that this process follows."""
    if _tracer is None:
        return _root
    from opentelemetry import trace

    context = trace.get_current_span().get_span_context()
    return _written(context) if context.is_valid else _root


def current_ids() -> dict[str, str]:
    """For log lines."""
    now = current() if _tracer is not None or _root is not None else None
    if now is None:
        return {}
    _, trace, span, *_ = now.split("-")
    return {"trace_id": trace, "span_id": span}


class Span:
    """One span, or nothing at all. Times are Unix seconds."""

    def __init__(self, span: Any) -> None:
        self._span = span

    @property
    def traceparent(self) -> str | None:
        return _written(self._span.get_span_context()) if self._span is not None else None

    def name(self, name: str) -> None:
        if self._span is not None:
            self._span.update_name(name)

    def note(self, attributes: dict[str, Any]) -> None:
        if self._span is not None:
            self._span.set_attributes({name: value for name, value in attributes.items() if value is not None})

    def fail(self, why: str) -> None:
        if self._span is not None:
            from opentelemetry.trace import Status, StatusCode

            self._span.set_status(Status(StatusCode.ERROR, why[:300]))

    def end(self, at: float | None = None) -> None:
        if self._span is not None:
            self._span.end(end_time=_nanos(at))


def start(
    name: str,
    *,
    parent: str | None = None,
    links: Sequence[str | None] = (),
    kind: Kind = "internal",
    at: float | None = None,
    attributes: dict[str, Any] | None = None,
) -> Span:
    """A span that the caller ends. Its parent: the one named, else the current one, else what `follow` named."""
    if _tracer is None:
        return Span(None)
    from opentelemetry import trace
    from opentelemetry.trace import Link, SpanKind

    inside = trace.get_current_span().get_span_context().is_valid
    named = sane(parent) or (None if inside else _root)
    made = _tracer.start_span(
        name,
        context=_read(named) if named else None,
        kind=SpanKind[kind.upper()],
        links=[Link(trace.get_current_span(_read(link)).get_span_context()) for link in links if link and sane(link)],
        start_time=_nanos(at),
    )
    span = Span(made)
    span.note(attributes or {})
    return span


@contextmanager
def span(name: str, **how: Any) -> Iterator[Span]:
    """Around a piece of work, which then runs inside it. Takes what `start` takes."""
    if _tracer is None:
        yield Span(None)
        return
    from opentelemetry import trace

    made = start(name, **how)
    with trace.use_span(made._span, end_on_exit=True):
        yield made


def _read(traceparent: str) -> Any:
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    return TraceContextTextMapPropagator().extract({"traceparent": traceparent})


def _written(context: Any) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{int(context.trace_flags):02x}"


def _nanos(seconds: float | None) -> int:
    return int((time.time() if seconds is None else seconds) * 1e9)
