"""What a trainer prints: secrets taken out across the borders of pieces, and no more on disk than the cap."""

import os
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.redaction import Redactor, redact
from worker import trainer_log
from worker.trainer_log import TrainerLog

SECRETS = {
    b"ftk_live_0123456789abcdefABCDEF_-": b"key %s given",
    b"hunter2hunter2": b"postgresql://tunery:%s@db.example:5432/x",
    b"p%40ss:word/9": b"redis://:%s@127.0.0.1",
    b"AKIAIOSFODNN7EXAMPLE": b"id %s",
    b"wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY": b'"aws_secret_access_key": "%s"',
    b"hf_abcdefghijklmnopqrstuvwxyzABCDEFGH": b"token %s",
    b"0123456789abcdef0123456789abcdef01234567": b"WANDB_API_KEY=%s",
    b"sk-proj-0123456789abcdefghijklmn": b"using %s",
    b"abc.def-ghi_jkl0123": b"Authorization: Bearer %s",
    b"eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijk": b"jwt %s",
    b"deadbeefdeadbeefdeadbeefdeadbeef": b"https://s3/x?X-Amz-Signature=%s&y=1",
}
HARMLESS = [
    b"{'loss': 1.2345, 'learning_rate': 2e-05, 'epoch': 0.5}",
    b"pad_token: <|endoftext|>, eos_token='</s>', bos_token_id=1",
    b"https://huggingface.co/docs?x=1 at 10:20:30, me@example.com",
    b"num_key_value_heads: 8, hidden_size: 4096, tokens: 12345678",
    b"sha256 9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_a_secret_is_taken_out_and_the_rest_is_kept(secret: bytes) -> None:
    before, after = (SECRETS[secret] % b"\0").split(b"\0")
    line = SECRETS[secret] % secret
    if secret == b"p%40ss:word/9":  # a slash must be escaped in a URL: what follows it is no password any more
        line = line.replace(b"/9", b"")
    assert redact(line) == before + b"[redacted]" + after


@pytest.mark.parametrize("line", HARMLESS)
def test_what_is_no_secret_stays(line: bytes) -> None:
    assert redact(line) == line


@given(st.lists(st.sampled_from([*(SECRETS[one] % one for one in SECRETS), *HARMLESS]), max_size=6), st.data())
def test_pieces_of_any_size_say_the_same_as_the_whole(lines: list[bytes], data: st.DataObject) -> None:
    text = b"\n".join(lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    redactor, found = Redactor(), b""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        found += redactor.feed(text[start:end])
    assert found + redactor.rest() == redact(text)


def test_a_secret_in_a_line_without_end_is_found_wherever_the_pieces_meet() -> None:
    secret = b" hf_abcdefghijklmnopqrstuvwxyzABCDEFGH "
    text = b"".join(b"x" * size + secret for size in range(8_000, 8_100, 7)) * 4
    redactor, found = Redactor(), b""
    for start in range(0, len(text), 4096):
        found += redactor.feed(text[start : start + 4096])
        assert len(redactor._held) <= 80 * 1024
    found += redactor.rest()
    assert b"hf_abc" not in found
    assert found.count(b"[redacted]") == text.count(b"hf_abc")


def written(path: Path, cap: int, *pieces: bytes) -> bytes:
    log = TrainerLog(path, cap)
    end = log.start()
    for piece in pieces:
        while piece:
            piece = piece[os.write(end, piece) :]
    log.handed_over()
    log.finish()
    return path.read_bytes()


def test_a_flood_is_cut_and_its_end_is_kept(tmp_path: Path) -> None:
    cap = 200_000
    flood = [b"line %06d of a flood\n" % number for number in range(100_000)]
    text = written(tmp_path / "log", cap, *flood, b"Traceback: the reason\n")
    assert len(text) <= cap
    assert text.startswith(flood[0])
    assert text.endswith(b"Traceback: the reason\n")
    assert b"bytes were left out here" in text
    assert (tmp_path / "log").stat().st_mode & 0o077 == 0


def test_a_line_without_end_is_bounded_too(tmp_path: Path) -> None:
    assert len(written(tmp_path / "log", 300_000, *[b"x" * 65_536] * 100)) <= 300_000


def test_a_link_in_the_place_of_the_log_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "log").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        TrainerLog(tmp_path / "log", 1000)
    assert not (tmp_path / "elsewhere").exists()


def test_somebody_who_keeps_the_pipe_open_is_not_waited_for(tmp_path: Path) -> None:
    log = TrainerLog(tmp_path / "log", 100_000)
    end = os.dup(log.start())
    log.handed_over()
    os.write(end, b"last words")
    began = time.monotonic()
    log.finish()
    os.close(end)
    assert time.monotonic() - began < 10
    assert (tmp_path / "log").read_bytes() == b"last words"


def test_a_survivor_that_writes_for_ever_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer_log, "_LAST_WORDS_S", 0.2)
    kept = TrainerLog(tmp_path / "trainer.log", 1 << 20)
    survivor = subprocess.Popen(["yes"], stdout=kept.start())
    kept.handed_over()
    try:
        ended = threading.Thread(target=kept.finish, daemon=True)
        ended.start()
        ended.join(20)
        assert not ended.is_alive()
    finally:
        survivor.kill()
        survivor.wait()
