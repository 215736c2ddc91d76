"""Training in this process over a real socket: the numbers, the failures, the folders."""

import hashlib
import json
import shutil
import socket
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.tiny_model import (
    HUB_ID,
    REVISION,
    Listener,
    chat_rows,
    spec_for,
    tiny_tokenizer,
    write_jsonl,
)
from trainer.evaluate import Judge
from trainer.failures import TrainingFailed, classify
from trainer.run import run
from trainer.session import Session
from tunery.contracts.events import Checkpoint, Eval, Finished, Phase, Sample, Started, Stop, Stopped, Warning
from tunery.states import FailureCode, StopReason

torch.set_num_threads(1)  # two threads over a tiny model wait for each other, and for every other process

QUICK = {"learning_rate": 0.01, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}


@pytest.fixture
def files(tmp_path):
    return write_jsonl(tmp_path / "train.jsonl", chat_rows(24)), write_jsonl(tmp_path / "v.jsonl", chat_rows(6, 100))


def train(spec, *, on_event=None, stores=True):
    """Run an attempt to its outcome. Returns the outcome and the listener."""
    ours, theirs = socket.socketpair()
    listener = Listener(ours, stores=stores)
    if on_event:
        listener.on_event = lambda event: on_event(event, listener)
    session = Session(theirs)
    try:
        outcome = session.send(run(spec, session))
    finally:
        session.close()
        listener.wait()
        ours.close()
    return outcome, listener


def adapter_of(folder):
    return load_file(f"{folder}/adapter_model.safetensors")


def test_a_job_reports_itself_and_gets_better(tmp_path, base, files):
    evaluation = {"exact_match": True, "samples": 2, "max_new_tokens": 8}
    spec = spec_for(
        tmp_path / "a", base, *files, training={**QUICK, "max_steps": 12, "eval_steps": 5}, evaluation=evaluation
    )
    outcome, heard = train(spec)
    assert isinstance(outcome, Finished)
    [started] = heard.of(Started)
    assert (started.total_steps, started.train_rows, started.eval_rows, started.precision) == (12, 24, 6, "fp32")
    assert [event.seq for event in heard.events] == list(range(1, len(heard.events) + 1))
    assert list(heard.losses()) == list(range(1, 13))
    assert [(event.when, event.step) for event in heard.of(Eval)] == [
        ("before", 0), ("during", 5), ("during", 10), ("after", 12),
    ]  # fmt: skip
    assert [(s.model, s.index) for s in heard.of(Sample)] == [("base", 0), ("base", 1), ("tuned", 0), ("tuned", 1)]
    assert outcome.metrics["eval/loss"] < 0.9 * outcome.metrics["eval/loss_before"]
    assert 0 <= outcome.metrics["eval/exact_match"] <= 1
    rows = [json.loads(line) for line in files[0].read_text().splitlines()]
    epoch = sum(len(tiny_tokenizer().apply_chat_template(row["messages"])["input_ids"]) for row in rows)
    assert outcome.tokens == 4 * epoch  # 12 steps of 8 rows are four passes over 24 rows
    assert [event.phase for event in heard.of(Phase)][:4] == ["loading", "evaluating", "sampling", "training"]


def test_one_times_eight_rows_is_eight_times_one(tmp_path, base, files):
    results = []
    for rows, accumulate in ((8, 1), (1, 8), (4, 2)):
        batch = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": accumulate}
        spec = spec_for(tmp_path / f"{rows}", base, files[0], training={**QUICK, **batch, "max_steps": 4})
        outcome, heard = train(spec)
        results.append((list(heard.losses().values()), adapter_of(outcome.path)))
    (losses, weights), *others = results
    for other_losses, other_weights in others:
        assert losses == pytest.approx(other_losses, abs=1e-6)
        for name, tensor in weights.items():
            torch.testing.assert_close(tensor, other_weights[name], atol=1e-5, rtol=1e-4)


def test_the_seed_decides_and_nothing_else(tmp_path, base, files):
    runs = []
    for number, seed in enumerate((5, 5, 6)):
        spec = spec_for(tmp_path / f"{number}", base, files[0], training={**QUICK, "max_steps": 4, "seed": seed})
        runs.append(list(train(spec)[1].losses().values()))
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize("resume_at", [6, 8], ids=["between epochs", "inside an epoch"])
def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(tmp_path, base, files, resume_at):
    recipe = {"training": {**QUICK, "max_steps": 11, "save_steps": resume_at}, "adapter": {"lora_dropout": 0.1}}
    spec = spec_for(tmp_path / "whole", base, *files, **recipe)
    whole, heard_whole = train(spec)
    [saved, *_] = heard_whole.of(Checkpoint)
    assert saved.step == resume_at
    resumed = spec_for(tmp_path / "resumed", base, *files, **recipe).model_copy(update={"resume": saved.path})
    again, heard = train(resumed)
    expected = {step: loss for step, loss in heard_whole.losses().items() if step > resume_at}
    assert heard.losses() == expected
    assert again.tokens == whole.tokens
    assert [event.when for event in heard.of(Eval)] == ["after"]  # the base is not scored twice
    assert again.metrics["eval/loss_before"] == whole.metrics["eval/loss_before"]
    assert heard.of(Started)[0].start_step == resume_at
    weights = adapter_of(again.path)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapter_of(whole.path).items())


def test_a_finished_training_that_was_stopped_only_evaluates_when_it_goes_on(tmp_path, base, files):
    recipe = {"training": {**QUICK, "max_steps": 3, "save_steps": 3}}
    whole, heard = train(spec_for(tmp_path / "a", base, *files, **recipe))
    [saved] = heard.of(Checkpoint)
    spec = spec_for(tmp_path / "b", base, *files, **recipe).model_copy(update={"resume": saved.path})
    outcome, heard = train(spec)
    assert heard.losses() == {}
    assert outcome.metrics["eval/loss"] == whole.metrics["eval/loss"]
    assert outcome.tokens == whole.tokens


def test_a_stop_leaves_a_checkpoint_of_the_last_step(tmp_path, base, files):
    spec = spec_for(tmp_path / "a", base, files[0], training={**QUICK, "max_steps": 2000})
    stop = Stop(reason=StopReason.PAUSE, checkpoint=True, deadline_s=30)
    outcome, heard = train(spec, on_event=lambda event, sup: sup.send(stop) if event.step == 3 else None)
    assert isinstance(outcome, Stopped)
    assert outcome.reason is StopReason.PAUSE
    [saved] = heard.of(Checkpoint)
    assert saved.step == outcome.step == max(heard.losses())
    assert (
        outcome.tokens == heard.of(type(heard.events[-3]))[-1].tokens if hasattr(heard.events[-3], "tokens") else True
    )


def test_a_cancellation_leaves_no_checkpoint(tmp_path, base, files):
    spec = spec_for(tmp_path / "a", base, files[0], training={**QUICK, "max_steps": 2000})
    stop = Stop(reason=StopReason.CANCEL, checkpoint=False, deadline_s=30)
    outcome, heard = train(spec, on_event=lambda event, sup: sup.send(stop) if event.step == 3 else None)
    assert isinstance(outcome, Stopped)
    assert heard.of(Checkpoint) == []


@pytest.mark.parametrize("phase", ["loading", "evaluating", "sampling"])
def test_a_stop_is_obeyed_before_training_too(tmp_path, base, files, phase):
    evaluation = {"exact_match": True, "max_new_tokens": 400}
    spec = spec_for(tmp_path / "a", base, *files, training={**QUICK, "max_steps": 3}, evaluation=evaluation)
    stop = Stop(reason=StopReason.CANCEL, checkpoint=True, deadline_s=30)
    asked = lambda event, sup: sup.send(stop) if isinstance(event, Phase) and event.phase == phase else None  # noqa: E731
    outcome, heard = train(spec, on_event=asked)
    assert isinstance(outcome, Stopped)
    assert heard.losses() == {}
    assert heard.of(Checkpoint) == []  # no step was done, so there is nothing to keep


def test_a_stop_in_the_last_evaluation_keeps_the_training(tmp_path, base, files):
    evaluation = {"exact_match": True, "max_new_tokens": 400}
    spec = spec_for(tmp_path / "a", base, *files, training={**QUICK, "max_steps": 3}, evaluation=evaluation)
    stop = Stop(reason=StopReason.PREEMPT, checkpoint=True, deadline_s=30)
    asked = lambda event, sup: sup.send(stop) if isinstance(event, Phase) and event.step == 3 else None  # noqa: E731
    outcome, heard = train(spec, on_event=asked)
    assert isinstance(outcome, Stopped)
    assert [event.step for event in heard.of(Checkpoint)] == [3]


def test_two_unstored_checkpoints_are_enough(tmp_path, base, files):
    spec = spec_for(tmp_path / "a", base, files[0], training={**QUICK, "max_steps": 5, "save_steps": 1})
    _, heard = train(spec, stores=False)
    assert [event.step for event in heard.of(Checkpoint)] == [1, 2]
    assert {warning.code for warning in heard.of(Warning)} == {"checkpoint_skipped"}


def test_a_checkpoint_comes_by_the_clock_too(tmp_path, base, files):
    spec = spec_for(tmp_path / "a", base, files[0], training={**QUICK, "max_steps": 2, "save_interval_s": 0.001})
    assert [event.step for event in train(spec)[1].of(Checkpoint)] == [1, 2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, base):
    work = tmp_path_factory.mktemp("checkpoint")
    rows = write_jsonl(work / "train.jsonl", chat_rows(24))
    spec = spec_for(work / "a", base, rows, training={**QUICK, "max_steps": 2, "save_steps": 1})
    [first, _] = train(spec)[1].of(Checkpoint)
    return spec, first


def test_a_checkpoint_lists_its_files_and_pickles_nothing(checkpoint):
    _, saved = checkpoint
    names = [entry.name for entry in saved.files]
    assert names[-1] == "MANIFEST.json"
    assert not [name for name in names if name.endswith((".pt", ".pth", ".bin", ".pkl"))]
    for entry in saved.files:
        content = Path(saved.path, entry.name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry.bytes, entry.sha256)
    assert {"step", "train_loss", "train_mean_token_accuracy"} <= saved.metrics.keys()


@pytest.mark.parametrize("damage", ["flip", "remove", "add", "no manifest"])
def test_a_damaged_checkpoint_is_never_loaded(tmp_path, checkpoint, damage):
    spec, saved = checkpoint
    copy = tmp_path / "step-1"
    shutil.copytree(saved.path, copy)
    weights = copy / "optimizer.safetensors"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "remove":
        weights.unlink()
    elif damage == "add":
        (copy / "extra.pt").write_bytes(b"")
    else:
        (copy / "MANIFEST.json").unlink()
    with pytest.raises(TrainingFailed) as failure:
        train(spec.model_copy(update={"resume": str(copy)}))
    assert failure.value.code is FailureCode.CORRUPT_CHECKPOINT


def test_another_jobs_checkpoint_is_refused(checkpoint):
    spec, saved = checkpoint
    other = spec.recipe.training.model_copy(update={"learning_rate": 0.5})
    recipe = spec.recipe.model_copy(update={"training": other})
    with pytest.raises(TrainingFailed, match="another recipe") as failure:
        train(spec.model_copy(update={"resume": saved.path, "recipe": recipe}))
    assert failure.value.code is FailureCode.INVALID_SPEC


def test_the_output_loads_with_peft_and_gives_the_trainers_logits(tmp_path, base, files, monkeypatch):
    seen = {}
    original = Judge.loss

    def remember(self, model, examples):
        row = torch.tensor([examples[0].input_ids])
        with torch.no_grad():
            seen["logits"] = model(input_ids=row).logits
        seen["row"] = row
        return original(self, model, examples)

    monkeypatch.setattr(Judge, "loss", remember)
    spec = spec_for(tmp_path / "a", base, *files, training={**QUICK, "max_steps": 3})
    (tmp_path / "a" / "output").mkdir()  # a supervisor may have made it
    outcome, _ = train(spec)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), outcome.path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=seen["row"]).logits, seen["logits"], atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(outcome.path).chat_template == tiny_tokenizer().chat_template


def test_the_output_folder_is_what_servers_and_hubs_expect(tmp_path, base, files):
    adapter = {"r": 32, "target_modules": ["v_proj", "q_proj"]}
    outcome, _ = train(spec_for(tmp_path / "a", base, *files, training={**QUICK, "max_steps": 2}, adapter=adapter))
    names = {entry.name for entry in outcome.files}
    assert names == {path.name for path in (tmp_path / "a" / "output").iterdir()}
    wanted = {"adapter_config.json", "adapter_model.safetensors", "README.md", "tunery.json", "SHA256SUMS"}
    assert wanted | {"tokenizer.json", "tokenizer_config.json"} <= names
    folder = tmp_path / "a" / "output"
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB_ID, REVISION)
    assert (config["target_modules"], config["inference_mode"], config["r"]) == (["q_proj", "v_proj"], True, 32)
    assert config["task_type"] == "CAUSAL_LM" and config["peft_type"] == "LORA"
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in adapter_of(folder)
    history = json.loads((folder / "tunery.json").read_text())
    assert history["vllm_compatible"] is True
    assert history["vllm_flags"] == ["--max-lora-rank", "32"]
    assert {"recipe", "lineage", "base", "data", "versions", "seed", "before", "after"} <= history.keys()
    card = (folder / "README.md").read_text()
    for line in (f"base_model: {HUB_ID}", "base_model_relation: adapter", "library_name: peft", "license: apache-2.0"):
        assert line in card
    assert "PeftModel.from_pretrained" in card and "--max-lora-rank 32" in card
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_unknown_target_modules_are_answered_with_the_known_ones(tmp_path, base, files):
    spec = spec_for(tmp_path / "a", base, files[0], adapter={"target_modules": ["q_proj", "query"]})
    with pytest.raises(TrainingFailed) as failure:
        train(spec)
    assert failure.value.code is FailureCode.INVALID_TARGETS
    assert "`query`" in failure.value.message
    assert "all-linear, down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj" in failure.value.message
    assert "lm_head" not in failure.value.message


@pytest.mark.parametrize(
    "adapter", [{"use_dora": True}, {"use_rslora": True}, {"bias": "lora_only"}, {"modules_to_save": ["norm"]}], ids=str
)
def test_every_kind_of_adapter_trains_and_resumes(tmp_path, base, files, adapter):
    recipe = {"training": {**QUICK, "max_steps": 4, "save_steps": 2}, "adapter": adapter}
    _, heard = train(spec_for(tmp_path / "a", base, files[0], **recipe))
    spec = spec_for(tmp_path / "b", base, files[0], **recipe)
    _, again = train(spec.model_copy(update={"resume": heard.of(Checkpoint)[0].path}))
    assert again.losses() == {step: loss for step, loss in heard.losses().items() if step > 2}


def test_a_loss_that_is_not_a_number_ends_the_job(tmp_path, base, files):
    broken = tmp_path / "broken"
    shutil.copytree(base, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TrainingFailed, match="step 1") as failure:
        train(spec_for(tmp_path / "a", broken, files[0], training=QUICK))
    assert failure.value.code is FailureCode.NON_FINITE_LOSS


def test_recomputing_activations_changes_nothing_but_memory(tmp_path, base, files, monkeypatch):
    losses = []
    for recompute in (False, True):
        monkeypatch.setattr("trainer.model.needs_checkpointing", lambda *_, answer=recompute: answer)
        _, heard = train(spec_for(tmp_path / str(recompute), base, files[0], training={**QUICK, "max_steps": 3}))
        losses.append(heard.losses())
        assert [warning.code for warning in heard.of(Warning)] == ["activations_recomputed"] * recompute
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_cut_rows_are_reported(tmp_path, base, files):
    rows = [*chat_rows(8), {"prompt": "p", "completion": "c" * 300}]
    cut = write_jsonl(tmp_path / "cut.jsonl", rows)
    _, heard = train(spec_for(tmp_path / "a", base, cut, training={**QUICK, "max_steps": 1, "max_length": 128}))
    assert heard.of(Started)[0].truncated_rows == 1
    assert [warning.code for warning in heard.of(Warning)] == ["rows_truncated"]


def test_known_exceptions_have_their_codes():
    assert classify(torch.OutOfMemoryError("CUDA out of memory"))[0] is FailureCode.OUT_OF_MEMORY
    assert classify(OSError(28, "No space left on device"))[0] is FailureCode.DISK_FULL
    code, message = classify(ValueError("surprise"))
    assert code is FailureCode.INTERNAL and "surprise" in message
