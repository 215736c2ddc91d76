"""Importing a base model: what is taken, what is refused, and how it is said."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny_model import write_tiny_base
from trainer import base_sources
from trainer.import_base import main
from tunery.contracts.events import EXIT_OK, EXIT_USER


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    write_tiny_base(folder)
    (folder / "base.json").unlink()
    return folder


@pytest.fixture
def source(tmp_path, original):
    return shutil.copytree(original, tmp_path / "Tiny-Llama")


def run(tmp_path, source, *extra):
    return main(["--source", "path", "--path", str(source), "--out", str(tmp_path / "out"), *extra])


def error_of(capsys):
    return json.loads(capsys.readouterr().err)


def test_a_folder_is_taken_with_its_facts(tmp_path, source, capsys):
    assert run(tmp_path, source, "--repo", "me/Tiny-Llama", "--revision", "abc", "--license", "mit") == EXIT_OK
    base = json.loads((tmp_path / "out" / "base.json").read_text())
    assert json.loads(capsys.readouterr().out) == base
    assert (base["name"], base["hub_id"], base["revision"], base["license"]) == (
        "tiny-llama", "me/Tiny-Llama", "abc", "mit",
    )  # fmt: skip
    assert (base["hidden_size"], base["num_hidden_layers"], base["vocab_size"]) == (32, 2, 259)
    assert base["num_key_value_heads"] == 2 and base["parameters"] == 259 * 32 * 2 + 2 * 9280 + 32
    names = {entry["name"] for entry in base["files"]}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert all(
        (tmp_path / "out" / name).stat().st_mode & 0o044 == 0o044 for name in names
    )  # trainers have their own uid
    assert not list(tmp_path.glob(".out.*"))


def test_importing_again_changes_nothing(tmp_path, source):
    assert run(tmp_path, source) == EXIT_OK
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert run(tmp_path, source) == EXIT_OK
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_a_damaged_import_is_told(tmp_path, source, capsys):
    run(tmp_path, source)
    (tmp_path / "out" / "config.json").write_text("{}")
    assert run(tmp_path, source) == EXIT_USER
    assert error_of(capsys)["error"] == "damaged"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "state.pkl", "modeling_own.py"])
def test_files_that_could_run_code_are_refused(tmp_path, source, name, capsys):
    (source / name).write_bytes(b"")
    assert run(tmp_path, source) == EXIT_USER
    error = error_of(capsys)
    assert error["error"] == "unsafe_files" and name in error["message"] and error["fix"]
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.*"))


def test_a_config_that_asks_for_its_own_code_is_refused(tmp_path, source, capsys):
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "own.Model"}}))
    assert run(tmp_path, source) == EXIT_USER
    assert error_of(capsys)["error"] == "remote_code"


def test_weights_must_be_safetensors(tmp_path, source, capsys):
    (source / "model.safetensors").unlink()
    assert run(tmp_path, source) == EXIT_USER
    assert error_of(capsys)["error"] == "no_safetensors"


def test_wrong_arguments_are_one_line_of_json_too(tmp_path, capsys):
    assert main(["--source", "hub", "--out", str(tmp_path / "out")]) == EXIT_USER
    assert error_of(capsys)["error"] == "invalid_arguments"


def test_as_a_program_it_refuses_in_the_same_way(tmp_path, source):
    (source / "model.safetensors").unlink()
    command = [sys.executable, "-P", "-m", "trainer.import_base", "--source", "path", "--path", str(source)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [*command, "--out", str(tmp_path / "out")],
        capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == EXIT_USER
    assert json.loads(done.stderr)["error"] == "no_safetensors"


def test_no_hub_is_known_within_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert not base_sources.hub_answers("any/model")


def test_special_tokens_do_not_depend_on_the_release_that_read_them(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    words = {token: number for number, token in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>"))}
    reader = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    guessed = PreTrainedTokenizerFast(
        tokenizer_object=reader, bos_token="<|im_start|>", eos_token="<|im_start|>", eos_token_id=1, pad_token_id=None
    )
    base_sources._restore_special_tokens(guessed)
    guessed.save_pretrained(tmp_path)
    base_sources._clean_tokenizer_config(tmp_path / "tokenizer_config.json")
    saved = AutoTokenizer.from_pretrained(tmp_path)
    assert (saved.eos_token_id, saved.pad_token_id, saved.bos_token_id, saved.unk_token_id) == (2, 2, 1, 0)
    assert not [key for key in json.loads((tmp_path / "tokenizer_config.json").read_text()) if key.endswith("_id")]
