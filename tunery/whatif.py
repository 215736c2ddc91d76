"""A job that has not been submitted: what it would ask of the scheduler, worked out as for one that has been."""

import uuid
from dataclasses import dataclass, replace

from sqlalchemy.orm import Session

from tunery import catalogue, files, forecasts, jobs, quotes
from tunery.contracts.scheduling import JobView
from tunery.ids import uuid7
from tunery.needs import LEAST_LIMIT_S, LIMIT_TIMES
from tunery.quotes import OnClass, Quote
from tunery.tenancy import Identity

ROW_BYTES = 1200
"""Of a row's JSON, where neither the file's rows nor their number are known."""


@dataclass(frozen=True)
class Asked:
    question_id: uuid.UUID
    job: JobView
    quote: Quote
    expected_s: tuple[float, float]


def ask(session: Session, who: Identity, asked: quotes.Request, *, max_gpus: int) -> Asked:
    """Put the question to the scheduler, which is woken when this transaction commits.

    Raises:
        NotFound: the model or the file does not exist in this project.
        Invalid: no node could ever give what it asks for, or nothing says how many rows there are.
        Forbidden: it is `urgent`, and the key is not an operator's.
        QuotaExceeded: many questions of this project wait for their answers.
    """
    if asked.model is not None:
        model = catalogue.ready_one(session, asked.model)
        jobs.refuse_impossible(session, who, asked.extension, model, max_gpus)
    quote = quotes.quote(session, who.project_id, _with_rows(session, who, asked))
    fitting = [one for one in quote.classes if one.fits is not False] or list(quote.classes)
    expected_s = fitting[0].hours * 3600, max(one.hours_p90 for one in fitting) * 3600
    job = _job(who, asked, fitting, expected_s)
    return Asked(forecasts.ask(session, job, expected_s), job, quote, expected_s)


def _job(who: Identity, asked: quotes.Request, fitting: list[OnClass], expected_s: tuple[float, float]) -> JobView:
    place, timing = asked.extension.resources, asked.extension.scheduling
    return JobView(
        uuid7(),
        who.organization_id,
        who.project_id,
        0.0,  # the scheduler knows what time it is
        place.gpus,
        # as at the data check: where devices of several kinds would do, the kind that needs the most counts
        max(one.gpu_bytes for one in fitting),
        timing.priority,
        timing.urgent,
        timing.time_limit or max(LEAST_LIMIT_S, LIMIT_TIMES * expected_s[1]),
        place.gpu_class,
        frozenset(place.node_labels.items()),
        place.shareable,
        timing.preemptible,
    )


def _with_rows(session: Session, who: Identity, asked: quotes.Request) -> quotes.Request:
    """A file that no job has used yet: its rows are guessed from its size."""
    if asked.training_file is None or asked.rows is not None:
        return asked
    if quotes.rows_known(session, who.project_id, asked.training_file):
        return asked
    size = files.get(session, who.project_id, asked.training_file, param="training_file").bytes
    return replace(asked, rows=max(1, round(size / ROW_BYTES)))
