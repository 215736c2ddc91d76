"""The users of a campaign: what they may be told."""

import httpx
import pytest

from tests.chaos.workload import Workload


@pytest.mark.parametrize(("code", "excused"), [("budget_exceeded", True), ("insufficient_quota", False)])
def test_only_a_budget_may_refuse_a_job(code: str, excused: bool) -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/files":
            return httpx.Response(200, json={"id": "file-1"})
        return httpx.Response(429, json={"error": {"code": code, "message": "no room"}})

    workload = Workload("http://api", ["key"], 1, wanted=0, steps=1, save_steps=1)
    workload._client = httpx.Client(base_url="http://api/v1", transport=httpx.MockTransport(answer))
    assert workload.submit() is None
    assert workload.over_budget == int(excused)
    assert [code in each for each in workload.refused] == ([] if excused else [True])
