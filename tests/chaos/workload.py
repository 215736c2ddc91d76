"""Users: they submit, watch and sometimes cancel through the real API, and remember what they were told.

A request that finds nobody, or whose answer is lost, is tried again, as every client does.
"""

import contextlib
import json
import random
import threading
import time
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any

import httpx

from tests.chaos.evidence import Told

ENDED = ("succeeded", "failed", "cancelled")


class Workload:
    """Keeps `wanted` jobs alive until `finish`, from a thread that submits and some that watch."""

    def __init__(
        self,
        api_url: str,
        api_keys: Sequence[str],
        seed: int,
        *,
        wanted: int,
        steps: int,
        save_steps: int,
        cancels: float = 0.1,
        gangs: float = 0.0,
    ) -> None:
        """One key a project; `gangs` is the share of jobs that ask for two devices."""
        self.told: dict[str, Told] = {}
        self.files: dict[str, str] = {}
        """Of each job."""
        self._deletes: set[str] = set()
        """Files whose deletion was asked for, whatever came back."""
        self.unknown = 0
        """Submissions whose answer was lost: there may be a job, and nobody was told."""
        self.over_budget = 0
        """Submissions that were refused because their project's budget had no room."""
        self.refused: list[str] = []
        """Answers that no client should ever get, whatever happens behind the API."""
        self._requests: deque[float] = deque(maxlen=1000)
        self._random = random.Random(seed)
        self._wanted, self._cancels, self._gangs = wanted, cancels, gangs
        self._keys = list(api_keys)
        self._key_of: dict[str, str] = {}
        """Of each job."""
        self.training = {"max_steps": steps, "save_steps": save_steps}
        self._client = httpx.Client(
            base_url=f"{api_url}/v1",
            headers={"Authorization": f"Bearer {self._keys[0]}"},
            timeout=httpx.Timeout(10),
        )
        self._over, self._enough = threading.Event(), threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._submit_on, daemon=True)]
        self._threads += [threading.Thread(target=self._watch_on, args=(n,), daemon=True) for n in range(2)]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def enough(self) -> None:
        """No new jobs; those that are there are watched to their end."""
        self._enough.set()

    def submits_its_last(self) -> bool:
        """After `enough`: one more job is on its way."""
        return self._enough.is_set() and self._threads[0].is_alive()

    def finish(self) -> list[Told]:
        self._over.set()
        for thread in self._threads:
            thread.join(15)
        self._client.close()
        return list(self.told.values())

    def live(self) -> list[Told]:
        with self._lock:
            return [told for told in self.told.values() if not told.statuses or told.statuses[-1] not in ENDED]

    def requests_lately(self) -> int:
        """In the last second."""
        since = time.monotonic() - 1
        return sum(at > since for at in list(self._requests))

    # ---- what users do -------------------------------------------------------------------------------------------

    def submit(self) -> Told | None:
        """One job, with a file of its own. None if nobody was told that it exists."""
        return self._submit(_rows())

    def submit_bad_rows(self) -> Told | None:
        told = self._submit(b'{"messages": [{"role": "user", "content": "no answer"}]}\n' * 12)
        if told is not None:
            told.bad = True
        return told

    def cancel(self, told: Told) -> None:
        told.cancelled = True
        for _ in range(100):
            path = f"/fine_tuning/jobs/{told.job_id}/cancel"
            if self._over.is_set() or self._ask("POST", path, key=self._key_of[told.job_id], expected=(409,)):
                return
            time.sleep(0.3)

    def delete_file(self) -> None:
        """The newest job's: whatever the answer, no job may suffer from it."""
        newest = max(self.files)
        file = self.files[newest]
        gone_before, self._deletes = file in self._deletes, self._deletes | {file}
        expected = (404, 409) if gone_before else (409,)
        self._ask("DELETE", f"/files/{file}", key=self._key_of[newest], expected=expected)

    def drain(self, node: str) -> bool:
        """Every attempt there goes on elsewhere. False if nobody could be told."""
        return self._order(node, "drain")

    def take_back(self, node: str) -> bool:
        return self._order(node, "uncordon")

    def _order(self, node: str, what: str) -> bool:
        """409 is a node that is down."""
        return self.order("POST", f"/nodes/{node}/{what}", expected=(404, 409)) is not None

    def order(
        self, method: str, path: str, *, tries: int = 30, expected: tuple[int, ...] = (), json: Any = None
    ) -> dict[str, Any] | None:
        """As an operator, who tries again for a while. None if nobody was there, or nobody's answer came back."""
        for _ in range(tries):
            if (answer := self._ask(method, path, expected=expected, json=json)) is not None:
                return answer
            time.sleep(0.3)
        return None

    def _submit_on(self) -> None:
        while not self._over.wait(0.1):
            if self._enough.is_set():
                return
            if len(self.live()) >= self._wanted:
                continue
            told = self.submit()
            if told is not None and self._random.random() < self._cancels:
                threading.Timer(self._random.uniform(0.1, 8), self.cancel, [told]).start()

    def _submit(self, rows: bytes) -> Told | None:
        file, key = None, self._random.choice(self._keys)
        while file is None and not self._over.is_set():
            sent = {"data": {"purpose": "fine-tune"}, "files": {"file": ("rows.jsonl", rows)}}
            file = self._ask("POST", "/files", key=key, **sent)
        if file is None:
            return None
        body = {"model": "tiny", "training_file": file["id"], "suffix": "slow", "seed": self._random.randrange(1000)}
        more: dict[str, Any] = {"training": self.training}
        if self._random.random() < self._gangs:
            more["resources"] = {"gpus": 2}
        job = self._ask("POST", "/fine_tuning/jobs", key=key, json=body | {"tunery": more}, expected=(429,))
        if job is None:
            self.unknown += 1
            return None
        if "id" not in job:
            if job["error"]["code"] == "budget_exceeded":
                self.over_budget += 1
            else:
                self.refused.append(f"POST /fine_tuning/jobs: 429 {job['error']}")
            return None
        with self._lock:
            self.files[job["id"]], self._key_of[job["id"]] = file["id"], key
            self.told[job["id"]] = Told(job["id"], [job["status"]])
            return self.told[job["id"]]

    def _watch_on(self, number: int) -> None:
        while not self._over.wait(0.05):
            for told in self.live()[number::2]:
                job = self._ask("GET", f"/fine_tuning/jobs/{told.job_id}", key=self._key_of[told.job_id])
                with self._lock:
                    if job is not None and told.statuses[-1:] != [job["status"]]:
                        told.statuses.append(job["status"])

    def _ask(
        self, method: str, path: str, *, key: str = "", expected: tuple[int, ...] = (), **more: Any
    ) -> dict[str, Any] | None:
        """The answer's body; None if there was no answer, or one that says to come again."""
        self._requests.append(time.monotonic())
        with contextlib.suppress(httpx.HTTPError):
            own = {"headers": {"Authorization": f"Bearer {key}"}} if key else {}
            answer = self._client.request(method, path, **own, **more)
            if answer.is_success or answer.status_code in expected:
                return answer.json()
            if answer.status_code != 503:
                self.refused.append(f"{method} {path}: {answer.status_code} {answer.text[:300]}")
        time.sleep(0.1)
        return None


def _rows() -> bytes:
    """Never the same twice: equal rows would be checked once."""
    salt = uuid.uuid4().hex
    turns = ({"role": "user", "content": salt}, {"role": "assistant", "content": "yes"})
    return (json.dumps({"messages": turns}) + "\n").encode() * 12
