"""What a trainer says, as spans: one a phase, one for each half minute of steps. The trainer itself has no network."""

import math

from tunery.contracts.events import OUTCOMES, Event, Failed, Metrics, Phase
from tunery.telemetry import tracing
from tunery.telemetry.tracing import Span

_STEPS_S = 30.0
"""A span a step would be thousands a minute, and would say nothing that the metrics do not."""


class TrainingTrace:
    """Spans below the one that this process follows. Times are the trainer's own."""

    def __init__(self) -> None:
        self._phase: Span | None = None
        self._first: Metrics | None = None
        self._last: Metrics | None = None
        self._count = 0
        self._said_at: float | None = None
        self._on = tracing.on()

    def hear(self, event: Event) -> None:
        if not self._on:
            return
        self._said_at = event.time or self._said_at
        if isinstance(event, Metrics):
            self._step(event)
        elif isinstance(event, Phase):
            self._end_phase()
            attributes = {"tunery.step": event.step}
            self._phase = tracing.start(f"tunery.train.{event.phase}", at=event.time, attributes=attributes)
        elif isinstance(event, OUTCOMES):
            self._end_phase(event.code.value if isinstance(event, Failed) else None)

    def over(self, why: str | None = None) -> None:
        """The trainer is gone. `why`: it went without a word."""
        self._end_phase(why)

    def _step(self, event: Metrics) -> None:
        self._first = self._first or event
        self._last, self._count = event, self._count + 1
        if event.time - self._first.time >= _STEPS_S:
            self._end_steps()

    def _end_steps(self) -> None:
        first, last = self._first, self._last
        if first is None or last is None:
            return
        loss = last.values.get("train/loss", math.nan)
        span = tracing.start(
            "tunery.train.steps",
            parent=self._phase.traceparent if self._phase else None,
            at=first.time,
            attributes={
                "tunery.step.first": first.step,
                "tunery.step.last": last.step,
                "tunery.step.reported": self._count,
                "tunery.tokens": last.tokens,
                "tunery.loss": loss if math.isfinite(loss) else None,
            },
        )
        span.end(max(last.time, first.time))
        self._first, self._last, self._count = None, None, 0

    def _end_phase(self, why: str | None = None) -> None:
        self._end_steps()
        if self._phase is not None:
            if why is not None:
                self._phase.fail(why)
            self._phase.end(self._said_at)
            self._phase = None
