"""OpenAI's own client, unchanged and in strict mode: every call that we support, and what it makes of our errors."""

import io
import json
from collections.abc import Callable, Iterator

import openai
import pytest
from openai import OpenAI

from tests import factories
from tests.factories import FleetNode, Tenant
from tunery.states import JobState
from tunery.storage import Storage

ROWS = b"".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}).encode() + b"\n" for n in range(20))


@pytest.fixture
def strict(api_url: str) -> Iterator[Callable[[str], OpenAI]]:
    """A client that validates every answer against OpenAI's types."""
    http = openai.DefaultHttpxClient(trust_env=False)

    def client_of(key: str) -> OpenAI:
        return OpenAI(
            base_url=f"{api_url}/v1", api_key=key, max_retries=0, http_client=http, _strict_response_validation=True
        )

    with http:
        yield client_of


@pytest.fixture
def ai(strict: Callable[[str], OpenAI], project: Tenant) -> OpenAI:
    return strict(project.key)


def upload(ai: OpenAI, rows: bytes = ROWS, purpose: str = "fine-tune") -> str:
    return ai.files.create(file=("rows.jsonl", io.BytesIO(rows)), purpose=purpose).id  # type: ignore[arg-type]


def test_files_through_the_strict_client(ai: OpenAI) -> None:
    file = ai.files.create(file=("rows.jsonl", io.BytesIO(ROWS)), purpose="fine-tune")
    assert (file.object, file.status, file.purpose) == ("file", "processed", "fine-tune")
    assert (file.bytes, file.filename) == (len(ROWS), "rows.jsonl")
    assert ai.files.retrieve(file.id) == file
    assert ai.files.wait_for_processing(file.id).status == "processed"
    assert ai.files.content(file.id).read() == ROWS
    assert ai.files.delete(file.id).deleted is True
    with pytest.raises(openai.NotFoundError):
        ai.files.retrieve(file.id)


@pytest.mark.parametrize("purpose", ["assistants", "batch", "vision", "user_data", "evals"])
def test_every_purpose_is_readable_by_the_strict_client(ai: OpenAI, purpose: str) -> None:
    file_id = upload(ai, b"not JSON, and need not be", purpose)
    assert ai.files.retrieve(file_id).id == file_id


def test_file_pages(ai: OpenAI, project: Tenant) -> None:
    made = [factories.file(project) for _ in range(5)]
    assert [file.id for file in ai.files.list(limit=2)] == made[::-1]
    assert [file.id for file in ai.files.list(limit=2, order="asc")] == made
    assert [file.id for file in ai.files.list(purpose="batch")] == []
    assert len(ai.files.list(limit=0).data) == 5


def test_a_job_from_upload_to_cancel(ai: OpenAI, base_model: str) -> None:
    training, validation = upload(ai), upload(ai)
    job = ai.fine_tuning.jobs.create(
        model=base_model,
        training_file=training,
        validation_file=validation,
        suffix="capitals",
        seed=11,
        metadata={"team": "nlp"},
        method={
            "type": "supervised",
            "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}},
            "dpo": {"hyperparameters": {"beta": 0.1}},
        },
        extra_body={"tunery": {"training": {"learning_rate": 1e-3}, "adapter": {"r": 8}}, "trainingType": 1},
    )
    assert job.id.startswith("ftjob-") and job.object == "fine_tuning.job"
    assert (job.status, job.error, job.fine_tuned_model, job.finished_at) == ("validating_files", None, None, None)
    assert (job.training_file, job.validation_file, job.seed) == (training, validation, 11)
    assert job.hyperparameters.n_epochs == 2 and job.hyperparameters.batch_size == "auto"
    assert job.method and job.method.supervised and job.method.supervised.hyperparameters
    assert job.method.supervised.hyperparameters.n_epochs == 2
    assert job.organization_id.startswith("org-") and job.result_files == [] and job.metadata == {"team": "nlp"}
    assert job.to_dict()["tunery"]["state"] == "validating"  # type: ignore[index]
    assert ai.fine_tuning.jobs.retrieve(job.id).id == job.id
    assert [found.id for found in ai.fine_tuning.jobs.list(metadata={"team": "nlp"})] == [job.id]
    assert list(ai.fine_tuning.jobs.list(metadata={"team": "vision"})) == []
    assert ai.fine_tuning.jobs.cancel(job.id).status == "cancelled"


def test_the_deprecated_hyperparameters_still_count(ai: OpenAI, base_model: str) -> None:
    job = ai.fine_tuning.jobs.create(
        model=base_model, training_file=upload(ai), hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 0.5}
    )
    assert job.hyperparameters.n_epochs == 3 and job.hyperparameters.learning_rate_multiplier == 0.5


@pytest.mark.parametrize("state", list(factories.IN_STATE))
def test_a_job_in_every_state_is_readable(
    ai: OpenAI, project: Tenant, node: FleetNode, base_model: str, state: JobState
) -> None:
    work = factories.IN_STATE[state](project, node)
    job = ai.fine_tuning.jobs.retrieve(work.id)
    assert job.to_dict()["tunery"]["state"] == state  # type: ignore[index]
    assert (job.fine_tuned_model is not None) == (state == "succeeded")
    assert (job.error is not None) == (state == "failed")
    assert (job.finished_at is not None) == (state in ("succeeded", "failed", "cancelled"))
    assert isinstance(job.hyperparameters.n_epochs, int) == (state != "validating")


def test_jobs_come_in_pages_newest_first(ai: OpenAI, project: Tenant, node: FleetNode, base_model: str) -> None:
    made = [factories.submitted(project, node).id for _ in range(5)]
    assert [job.id for job in ai.fine_tuning.jobs.list(limit=2)] == made[::-1]
    assert ai.fine_tuning.jobs.list(limit=0).has_more is False
    assert ai.fine_tuning.jobs.list(after="after").data == []


def test_three_pages_of_events_with_limit_two(ai: OpenAI, project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node)
    factories.tell(work, factories.metrics(2, step=1, loss=1.5), factories.metrics(3, step=2, loss=float("nan")))
    pages = [ai.fine_tuning.jobs.list_events(work.id, limit=2)]
    while pages[-1].has_next_page():
        pages.append(pages[-1].get_next_page())
    events = [event for page in pages for event in page.data]
    assert len(pages) >= 3 and all(len(page.data) == 2 for page in pages[:-1])
    assert len({event.id for event in events}) == len(events) == len(list(ai.fine_tuning.jobs.list_events(work.id)))
    assert events[-1].message.startswith("Created fine-tuning job")
    assert events[0].type == "metrics" and events[0].data["train_loss"] == "nan"  # type: ignore[index]
    assert events[1].data["train_loss"] == 1.5 and events[1].data["step"] == 1  # type: ignore[index]


def test_checkpoints(ai: OpenAI, project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.running(project, node, suffix="capitals")
    values = {"train/loss": 0.5, "eval/loss": 0.75, "train/grad_norm": 3.0, "eval/mean_token_accuracy": float("nan")}
    for step in (10, 20, 30):
        factories.checkpoint(work, step, **values)
    found = list(ai.fine_tuning.jobs.checkpoints.list(work.id, limit=2))
    assert [checkpoint.step_number for checkpoint in found] == [30, 20, 10]
    newest = found[0]
    assert newest.fine_tuned_model_checkpoint.endswith(":ckpt-step-30")
    assert newest.fine_tuned_model_checkpoint.startswith("ft:tiny:") and newest.fine_tuning_job_id == work.id
    assert newest.metrics.to_dict() == {"step": 30.0, "train_loss": 0.5, "valid_loss": 0.75}


def test_models(ai: OpenAI, project: Tenant, node: FleetNode, base_model: str) -> None:
    work = factories.succeeded(project, node, suffix="capitals")
    name = ai.fine_tuning.jobs.retrieve(work.id).fine_tuned_model
    assert name is not None
    listed = {model.id: model for model in ai.models.list()}
    assert listed[base_model].owned_by == "tunery" and listed[name].owned_by == project.identity.organization
    assert ai.models.retrieve(name) == listed[name]
    with pytest.raises(openai.NotFoundError) as refused:
        ai.models.retrieve("meta-llama/Llama-3.2-1B")  # its slash travels as %2F
    assert refused.value.code == "model_not_found"


def test_a_wrong_key(strict: Callable[[str], OpenAI], project: Tenant) -> None:
    flipped = project.key[:-7] + ("A" if project.key[-7] != "A" else "B") + project.key[-6:]
    for key in ("nonsense", flipped):
        with pytest.raises(openai.AuthenticationError) as refused:
            strict(key).models.list()
        assert refused.value.code == "invalid_api_key"


def test_errors_arrive_as_the_clients_own_exceptions(
    ai: OpenAI, project: Tenant, node: FleetNode, base_model: str, storage: Storage
) -> None:
    with pytest.raises(openai.BadRequestError) as bad:
        ai.fine_tuning.jobs.create(model=base_model, training_file="file-x", extra_body={"epochs": 3})
    assert (bad.value.param, bad.value.code) == ("epochs", "invalid_request")
    assert bad.value.request_id and "epochs" in bad.value.message
    with pytest.raises(openai.ConflictError) as conflict:
        ai.fine_tuning.jobs.cancel(factories.succeeded(project, node).id)
    assert conflict.value.response.headers["x-should-retry"] == "false"
    with pytest.raises(openai.APIStatusError) as large:
        upload(ai, b'{"a": "' + b"x" * 40 * 1024 * 1024 + b'"}\n')
    assert (large.value.status_code, large.value.code) == (413, "file_too_large")
    assert list(storage.keys(f"u/{project.project_id}/")) == [] and len(ai.files.list().data) == 1  # the job's
