"""The older `/finetune` shape: a translation onto the same jobs."""

import json

import httpx
import pytest

from tests.factories import Tenant


@pytest.fixture
def http(api_url: str, project: Tenant):
    with httpx.Client(base_url=api_url, headers={"Authorization": f"Bearer {project.key}"}, trust_env=False) as client:
        yield client


@pytest.fixture
def file_id(http: httpx.Client) -> str:
    rows = b"".join(json.dumps({"prompt": f"say {n}", "completion": str(n)}).encode() + b"\n" for n in range(20))
    return http.post("/v1/files", data={"purpose": "fine-tune"}, files={"file": ("rows.jsonl", rows)}).json()["id"]


def test_a_job_without_a_config_gets_the_old_defaults(http, file_id, base_model):
    accepted = http.post("/finetune", json={"base_model": base_model, "dataset": file_id})
    assert accepted.status_code == 200
    assert accepted.json()["status"] == "queued"
    shown = http.get(f"/finetune/{accepted.json()['job_id']}").json()
    assert shown.keys() == {
        "job_id", "user_id", "base_model", "dataset", "config", "status", "created_at", "started_at", "completed_at",
        "gpu_id", "metrics",
    }  # fmt: skip
    assert shown["status"] == "pending"
    adapter, training = shown["config"]["adapter"], shown["config"]["training"]
    assert (adapter["r"], adapter["lora_alpha"]) == (16, 32)
    assert (training["num_train_epochs"], training["per_device_train_batch_size"]) == (3, 4)
    assert (training["learning_rate"], training["max_length"]) == (2e-4, 2048)


def test_what_is_submitted_here_is_listed_there(http, file_id, base_model):
    body = {"base_model": base_model, "dataset": file_id, "config": {"epochs": 1}}
    job_id = http.post("/finetune", json=body).json()["job_id"]
    assert http.get("/v1/fine_tuning/jobs").json()["data"][0]["id"] == job_id
    assert http.post(f"/v1/fine_tuning/jobs/{job_id}/cancel").status_code == 200
    assert http.get(f"/finetune/{job_id}").json()["status"] == "cancelled"


def test_an_unknown_setting_is_refused_by_name(http, file_id, base_model):
    refused = http.post("/finetune", json={"base_model": base_model, "dataset": file_id, "config": {"colour": "red"}})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "config.colour"
