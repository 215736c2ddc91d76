"""The checker itself: a true history passes, and every kind of false one is named."""

import dataclasses
import uuid
from collections.abc import Callable

import pytest

from tests.chaos import witness
from tests.chaos.evidence import Blocked, Books, Ended, History, Hurt, Stored, Told, Try, Version
from tests.chaos.history import detection_s, judged_stops, judged_windows, violations
from tunery import ids

JOB, FIRST, SECOND, PROJECT = uuid.uuid4(), uuid.uuid4(), uuid.uuid4(), uuid.uuid4()


def true_history() -> History:
    """One job of 20 steps: its first attempt dies after step 12, its second resumes at 10 and publishes. Between the
    two its project's budget was used up for a while."""
    key = f"a/p/{SECOND}/output/adapter_model.safetensors"
    checkpoint = f"a/p/{FIRST}/checkpoints/step-10/step"
    return History(
        told=[Told(ids.encode(ids.JOB, JOB), ["validating_files", "queued", "running", "succeeded"])],
        jobs={JOB: Ended(JOB, "succeeded", "", 20, (1, 2, 3), 1)},
        tries=[
            Try(
                FIRST,
                JOB,
                1,
                7,
                "failed",
                0,
                "trainer_crashed",
                tuple(range(1, 13)),
                witness.STARTED,
                1030.0,
                PROJECT,
                1000.0,
                None,
                10,
                "node-a",
            ),
            Try(
                SECOND,
                JOB,
                2,
                9,
                "succeeded",
                10,
                "",
                tuple(range(11, 21)),
                witness.STARTED,
                1060.0,
                PROJECT,
                1050.0,
            ),
        ],
        versions=[Version(JOB, SECOND, {key: "5ha"})],
        checkpoints=[Stored(JOB, 10, frozenset({checkpoint}))],
        objects={key: "5ha", checkpoint: None},
        held=[],
        processes={},
        logs={"api.log": '{"event": "ready"}'},
        killed={FIRST: 1000.0},
        blocked=[Blocked(PROJECT, 1040, 1045, {JOB: "blocked"})],
        books=[Books(PROJECT, 22.0, 22.0)],
    )


def test_a_true_history_passes():
    assert violations(true_history()) == []


def second(history: History, **changes: object) -> None:
    history.tries[1] = dataclasses.replace(history.tries[1], **changes)


def stopped(history: History, **changes: object) -> None:
    """The first attempt was asked to stop at 1029, had five seconds, and went at 1030."""
    asked: dict[str, object] = {"state": "preempted", "failure": "", "asked": (1029.0, 1034.0)}
    history.tries[0] = dataclasses.replace(history.tries[0], **asked | changes)


def hurt(history: History, kind: str, node: str = "", attempt: uuid.UUID | None = None) -> None:
    """While the first attempt was stopping."""
    history.hurt = [Hurt(1029.5, 1029.6, kind, node, attempt)]


def job(history: History, **changes: object) -> None:
    history.jobs[JOB] = dataclasses.replace(history.jobs[JOB], **changes)


FALSE: dict[str, Callable[[History], object]] = {
    "has not ended": lambda h: job(h, state="running"),
    "nobody cancelled it": lambda h: (job(h, state="failed"), h.versions.clear()),
    "was accepted and is not there": lambda h: h.told.append(Told(ids.encode(ids.JOB, uuid.uuid4()))),
    "do not rise": lambda h: second(h, fence=7),
    "not numbered from 1": lambda h: second(h, no=3),
    "never ended": lambda h: second(h, state="publishing"),
    "with bad rows": lambda h: setattr(h.told[0], "bad", True),
    "has 2 versions": lambda h: h.versions.append(h.versions[0]),
    "has 0 versions": lambda h: h.versions.clear(),
    "noticed after more than": lambda h: h.killed.update({FIRST: 900.0}),
    "did not succeed": lambda h: second(h, state="lost"),
    "is missing": lambda h: h.objects.pop(next(iter(h.versions[0].files))),
    "is damaged": lambda h: h.objects.update(dict.fromkeys(h.versions[0].files, "other")),
    "lacks": lambda h: h.objects.pop(next(iter(h.checkpoints[0].keys))),
    "not behind": lambda h: second(h, start_step=0),
    "was never stored": lambda h: h.checkpoints.clear(),
    "have no loss": lambda h: second(h, steps=tuple(step for step in range(11, 21) if step != 15)),
    "gaps or repeats": lambda h: job(h, event_seqs=(1, 3)),
    "2 terminal events": lambda h: job(h, terminal_events=2),
    "changed after its end": lambda h: h.told[0].statuses.append("running"),
    "another trainer on its device": lambda h: second(h, log=witness.VIOLATION),
    "is still held": lambda h: h.held.append("slot 1 is still held"),
    "are still there": lambda h: h.processes.update({str(SECOND): [17]}),
    "began while its project's budget was used up": lambda h: second(h, began=1044),
    "and says busy": lambda h: setattr(h, "blocked", [Blocked(PROJECT, 1040, 1045, {JOB: "busy"})]),
    "was charged 30.0": lambda h: setattr(h, "books", [Books(PROJECT, 22.0, 30.0)]),
    "was asked to stop at a checkpoint": stopped,
    "holds a secret": lambda h: h.logs.update({"node.log": "postgresql://tunery_worker:hunter2@localhost/tunery"}),
}


@pytest.mark.parametrize("sentence", FALSE)
def test_a_false_history_is_named(sentence):
    history = true_history()
    FALSE[sentence](history)
    assert any(sentence in each for each in violations(history)), violations(history)


EXCUSED: dict[str, Callable[[History], object]] = {
    "it saved its last step": lambda h: (
        stopped(h, kept=12),
        second(h, start_step=12, steps=tuple(range(13, 21))),
        h.checkpoints.append(Stored(JOB, 12, frozenset())),
    ),
    "it did not go in its grace": lambda h: stopped(h, ended_at=1035.0),
    "its supervisor was paused": lambda h: (stopped(h), hurt(h, "supervisor", attempt=FIRST)),
    "its node lost the store": lambda h: (stopped(h), hurt(h, "node-s3", node="node-a")),
    "nobody had a database": lambda h: (stopped(h), hurt(h, "postgres")),
    "nothing was lost: it had come to no step": lambda h: (
        stopped(h, steps=()),
        second(h, start_step=0, steps=tuple(range(1, 21))),
    ),
    "another project's budget": lambda h: setattr(h, "blocked", [Blocked(uuid.uuid4(), 1040, 1055, {})]),
    "a scheduler was away": lambda h: (
        setattr(h, "blocked", [Blocked(PROJECT, 1040, 1045, {JOB: "busy"})]),
        setattr(h, "hurt", [Hurt(1042, 1043, "scheduler", "scheduler-1")]),
    ),
}
"""Why a stop or a wait may not be judged."""
INNOCENT: dict[str, Callable[[History], object]] = {
    "another job's trainer": lambda h: hurt(h, "trainer", attempt=SECOND),
    "another job's supervisor": lambda h: hurt(h, "supervisor", attempt=uuid.uuid4()),
    "another node's disk": lambda h: hurt(h, "disk", node="node-b"),
    "another node's link": lambda h: hurt(h, "node-postgres", node="node-b"),
    "the api's link": lambda h: hurt(h, "api-postgres", node="api"),
    "the scheduler": lambda h: hurt(h, "scheduler", node="scheduler-1"),
    "Valkey": lambda h: hurt(h, "valkey"),
    "what was over before": lambda h: setattr(h, "hurt", [Hurt(1020, 1028.9, "postgres")]),
}
"""What is no excuse for a stop without its last step."""


@pytest.mark.parametrize("why", EXCUSED)
def test_a_stop_is_judged_by_what_it_could_do(why):
    history = true_history()
    EXCUSED[why](history)
    assert violations(history) == []


@pytest.mark.parametrize("what", INNOCENT)
def test_a_fault_excuses_only_what_it_can_touch(what):
    history = true_history()
    stopped(history)
    INNOCENT[what](history)
    assert [each.id for each in judged_stops(history)] == [FIRST]
    assert any("was asked to stop at a checkpoint" in each for each in violations(history))


@pytest.mark.parametrize("kind", ["trainer", "supervisor", "node", "disk", "node-s3", "api", "api-postgres", "valkey"])
def test_no_fault_but_the_schedulers_excuses_what_a_waiting_job_is_told(kind):
    history = true_history()
    history.blocked = [Blocked(PROJECT, 1040, 1045, {JOB: "busy"})]
    history.hurt = [Hurt(1042, 1043, kind, "node-a")]
    assert judged_windows(history) == history.blocked
    assert any("and says busy" in each for each in violations(history))


def test_a_death_is_noticed_within_two_leases_or_what_an_overloaded_machine_takes():
    assert (detection_s(45), detection_s(3)) == (90, 45)
    history = true_history()
    history.killed = {FIRST: 980.0}
    assert violations(history) == []
    history.detection_s = detection_s(3)
    assert any("noticed after more than 45 s" in each for each in violations(history))


def test_a_cancelled_job_need_not_succeed():
    history = true_history()
    job(history, state="cancelled")
    second(history, state="cancelled")
    history.versions.clear()
    history.told[0].statuses[-1] = "cancelled"
    history.told[0].cancelled = True
    assert violations(history) == []
