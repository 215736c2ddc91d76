"""The trainer as it is started for real: `python -P -m trainer SPEC`, a unix socket, signals, silence."""

import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.tiny_model import Listener, chat_rows, spec_for, write_jsonl
from tunery.contracts.events import (
    EXIT_OK,
    EXIT_OURS,
    EXIT_STOPPED,
    EXIT_USER,
    Checkpoint,
    Failed,
    Finished,
    Metrics,
    Phase,
    Stop,
    Stopped,
)
from tunery.states import FailureCode, StopReason

ROOT = Path(__file__).parents[1]
LONG = {"max_steps": 3000, "learning_rate": 0.01, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}


@pytest.fixture
def rows(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", chat_rows(24))


@contextmanager
def started(spec, work, *, ticks=True, **environment):
    """A trainer process and its listener; killed at the end if it still runs."""
    (work / "spec.json").write_text(spec.model_dump_json())
    server = socket.socket(socket.AF_UNIX)
    server.bind(spec.socket)
    server.listen(1)
    server.settimeout(60)
    inherited = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "trainer", str(work / "spec.json")],
        cwd=work,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        stdout=(work / "trainer.log").open("wb"),
        stderr=subprocess.STDOUT,
    )
    try:
        connection, _ = server.accept()
        connection.settimeout(None)
        yield process, Listener(connection, ticks=ticks)
    finally:
        process.kill()
        process.wait()
        server.close()


def test_a_whole_attempt_dies_with_us_and_ends_well(tmp_path, base, rows):
    spec = spec_for(tmp_path, base, rows, rows, training={**LONG, "max_steps": 3})
    with started(spec, tmp_path, TUNERY_SUPERVISOR_PID=str(os.getpid())) as (process, heard):
        events = heard.wait()
        assert process.wait(10) == EXIT_OK, (tmp_path / "trainer.log").read_text()
    assert isinstance(events[0], Phase) and events[0].phase == "loading"
    assert isinstance(events[-1], Finished)
    assert len(heard.of(Metrics)) == 3
    assert (tmp_path / "output" / "adapter_model.safetensors").exists()


def test_a_paused_attempt_goes_on_in_another_process_bit_for_bit(tmp_path, base, rows):
    training = {**LONG, "max_steps": 40, "gradient_accumulation_steps": 2}
    work = [tmp_path / name for name in ("whole", "first", "second")]
    recipe = {"training": training, "adapter": {"lora_dropout": 0.05}}
    whole, first, second = (spec_for(folder, base, rows, **recipe) for folder in work)
    with started(whole, work[0]) as (_, heard):
        heard.wait()
        expected = heard.losses()
    with started(first, work[1]) as (process, heard):
        stop = Stop(reason=StopReason.PAUSE, checkpoint=True, deadline_s=30)
        heard.on_event = lambda event: heard.send(stop) if isinstance(event, Metrics) and event.step == 4 else None
        heard.wait()
        assert process.wait(10) == EXIT_STOPPED
        [saved] = heard.of(Checkpoint)
        assert 4 <= saved.step < 40, "stopped too late to prove anything"
        losses = heard.losses()
    with started(second.model_copy(update={"resume": saved.path}), work[2]) as (_, heard):
        assert isinstance(heard.wait()[-1], Finished)
        assert min(heard.losses()) == saved.step + 1
        losses |= heard.losses()
    assert losses == expected


def test_sigterm_means_stop_with_a_checkpoint(tmp_path, base, rows):
    with started(spec_for(tmp_path, base, rows, training=LONG), tmp_path) as (process, heard):
        heard.on_event = lambda event: process.send_signal(signal.SIGTERM) if event.step == 2 else None
        outcome = heard.wait()[-1]
        assert isinstance(outcome, Stopped) and outcome.reason is StopReason.SHUTDOWN
        assert [event.step for event in heard.of(Checkpoint)] == [outcome.step]
        assert process.wait(10) == EXIT_STOPPED


def test_silence_means_that_the_supervisor_is_gone(tmp_path, base, rows):
    spec = spec_for(tmp_path, base, rows, training={**LONG, "max_steps": 10**6})
    with started(spec, tmp_path, ticks=False, TUNERY_TICK_TIMEOUT_S="8") as (process, heard):
        outcome = heard.wait()[-1]
        assert isinstance(outcome, Stopped) and outcome.reason is StopReason.OUTAGE
        assert len(heard.of(Checkpoint)) == (1 if outcome.step else 0)
        assert process.wait(10) == EXIT_STOPPED


def test_a_failure_is_the_last_event(tmp_path, base):
    rows = write_jsonl(tmp_path / "train.jsonl", [{"text": "fine"}, {"nothing": "known"}])
    with started(spec_for(tmp_path, base, rows), tmp_path) as (process, heard):
        outcome = heard.wait()[-1]
        assert isinstance(outcome, Failed)
        assert outcome.code is FailureCode.INVALID_TRAINING_FILE and "Row 2" in outcome.message
        assert process.wait(10) == EXIT_USER


@pytest.mark.parametrize("content", ["{}", "not json"])
def test_without_a_spec_it_says_so_and_leaves(tmp_path, content):
    (tmp_path / "spec.json").write_text(content)
    done = run_by_hand(tmp_path)
    assert done.returncode == EXIT_USER and "spec.json" in done.stderr


def test_a_spec_of_another_release_is_refused_by_name_and_is_not_the_users_fault(tmp_path, base, rows):
    spec = spec_for(tmp_path, base, rows).model_dump(mode="json")
    (tmp_path / "spec.json").write_text(json.dumps(spec | {"version": 2, "something": "new"}))
    done = run_by_hand(tmp_path)
    assert done.returncode == EXIT_OURS
    assert "the spec has version 2, this trainer reads version 1" in done.stderr


def test_it_leaves_when_its_supervisor_died_before_it_began(tmp_path, base, rows):
    (tmp_path / "spec.json").write_text(spec_for(tmp_path, base, rows).model_dump_json())
    assert run_by_hand(tmp_path, TUNERY_SUPERVISOR_PID="1").returncode == EXIT_STOPPED


def run_by_hand(work, **environment):
    return subprocess.run(
        [sys.executable, "-P", "-m", "trainer", str(work / "spec.json")],
        cwd=work,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
