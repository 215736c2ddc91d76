"""The command line as its users meet it: a real process, a real server, and what each stream and exit code says."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.test_cli_server import (
    ADAPTER,
    CONFIG,
    JOB_ID,
    KEY,
    WEIGHTS,
    Server,
    adapter,
    base_model,
    event,
    job,
    progress,
    refuse,
    reply,
    serving,
    story,
)

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def server() -> Iterator[Server]:
    with serving() as state:
        yield state


@pytest.fixture
def environment(server: Server, tmp_path: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TUNERY_")}
    return kept | {
        "XDG_CONFIG_HOME": str(tmp_path / "config"),
        "HOME": str(tmp_path),
        "TUNERY_API_URL": server.url,
        "TUNERY_API_KEY": KEY,
    }


@pytest.fixture
def run(environment: dict[str, str], tmp_path: Path) -> Run:
    def call(*words: str, stdin: str = "", **env: str | None) -> subprocess.CompletedProcess[str]:
        wanted = {name: value for name, value in (environment | env).items() if value is not None}
        return subprocess.run(
            [sys.executable, "-m", "tunery.cli", *words],
            input=stdin,
            capture_output=True,
            text=True,
            env=wanted,
            cwd=tmp_path,
            timeout=30,
        )

    return call


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 4000)
    return path


def four_parts(stderr: str, code: str) -> None:
    lines = stderr.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("error: "))
    assert f"[{code}]" in lines[start]
    assert lines[start + 1].startswith("  ")
    assert lines[-2].startswith("fix:   ")
    assert re.match(r"docs:  \S+#\w+", lines[-1])


def test_help_loads_nothing_heavy(environment: dict[str, str]) -> None:
    program = (
        "import sys; from tunery.cli import main; sys.argv = ['tunery', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = 'httpx rich pydantic sqlalchemy boto3 torch redis tomli_w platformdirs asyncio'.split()\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert "Fine-tuning:" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]", done.stdout


def test_without_a_key_it_says_how_to_get_one(run: Run) -> None:
    done = run("jobs", "list", TUNERY_API_KEY=None)
    assert (done.returncode, done.stdout) == (4, "")
    four_parts(done.stderr, "no_api_key")
    assert "tunery login" in done.stderr


def test_a_wrong_key_is_refused_with_the_request_id(run: Run) -> None:
    done = run("whoami", TUNERY_API_KEY="tk_wrong")
    assert (done.returncode, done.stdout) == (4, "")
    four_parts(done.stderr, "invalid_api_key")
    assert "request: req_42" in done.stderr


def test_what_is_not_there_exits_5(run: Run) -> None:
    done = run("jobs", "show", "ftjob-nope")
    assert done.returncode == 5
    four_parts(done.stderr, "not_found")


def test_bad_rows_are_listed_with_their_lines(run: Run, server: Server, rows: Path) -> None:
    errors = [{"line": 17, "param": "messages[2].role", "message": 'is "bot"'}, {"line": 96, "message": "no answer"}]
    server.routes["POST", "/v1/files"] = lambda: refuse(
        400, "dataset has 2 invalid rows", "invalid_training_file", errors=errors, fix="Correct them."
    )
    done = run("files", "upload", str(rows))
    assert (done.returncode, done.stdout) == (6, "")
    four_parts(done.stderr, "invalid_training_file")
    assert 'line 17  messages[2].role  is "bot"' in done.stderr
    assert "fix:   Correct them." in done.stderr


def test_an_unreachable_server_exits_9_and_a_quota_7(run: Run, server: Server) -> None:
    done = run("whoami", "--api-url", "http://127.0.0.1:9")
    assert done.returncode == 9
    four_parts(done.stderr, "unreachable")
    server.routes["POST", "/v1/fine_tuning/jobs"] = lambda: refuse(
        429, "No GPU hours are left.", "insufficient_quota", headers={"x_should_retry": "false"}
    )
    server.files = [{"id": "file-abc123"}]
    done = run("jobs", "create", "-m", "m", "-t", "file-abc123")
    assert done.returncode == 7
    assert len(server.sent("POST", "/v1/fine_tuning/jobs")) == 1


def test_errors_of_the_server_are_tried_again_then_exit_9(run: Run, server: Server) -> None:
    server.routes["GET", "/v1/whoami"] = lambda: refuse(503, "Restarting.", "unavailable", headers={"retry_after": "0"})
    done = run("whoami")
    assert done.returncode == 9
    assert len(server.sent("GET", "/v1/whoami")) == 3


def test_something_else_at_the_address_is_said_so(run: Run, server: Server) -> None:
    server.routes["GET", "/v1/whoami"] = lambda: (200, {"content-type": "text/html"}, b"<html>hello</html>")
    done = run("whoami")
    assert done.returncode == 1
    four_parts(done.stderr, "not_the_api")


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (("jobs", "list"), "tunery jobs create"),
        (("files", "list"), "tunery files upload"),
        (("models", "list"), "tunery models import demo"),
        (("adapters", "list"), "tunery jobs create"),
    ],
)
def test_an_empty_list_says_how_to_start(run: Run, words: tuple[str, ...], hint: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (0, "")
    assert hint in done.stderr
    assert json.loads(run(*words, "--json").stdout) == []


def test_json_is_one_document_and_quiet_is_one_id_a_line(run: Run, server: Server) -> None:
    server.jobs = [job(f"ftjob-{number:03}") for number in range(130)]
    document = json.loads(run("jobs", "list", "--all", "--json").stdout)
    assert [found["id"] for found in document] == [found["id"] for found in server.jobs]
    done = run("jobs", "list", "-n", "2", "-q")
    assert done.stdout == "ftjob-000\nftjob-001\n"
    assert "there are more" in done.stderr
    assert json.loads(run("jobs", "show", "ftjob-007", "--json").stdout) == server.jobs[7]


def test_a_job_shows_what_its_devices_do_and_how_long_an_epoch_takes(run: Run, server: Server) -> None:
    sampled = {"gpu_utilization": 0.12, "device_memory_bytes": 31_000_000_000, "sampled_at": int(time.time()) - 70}
    mine = progress(12) | sampled | {"underused_since": int(time.time()) - 720, "epoch_seconds": [80.0, 75.2]}
    server.jobs = [job(state="running", progress=mine)]
    shown = run("jobs", "show", "@last").stdout
    assert "12 % busy, 31 GB in use, 1m ago; little to do for 12m" in shown
    assert "1m 20s, 1m 15s" in shown
    server.jobs = [job(state="queued", progress=mine)]  # by a server that still tells it of a job that waits again
    assert "little to do" not in run("jobs", "show", "@last").stdout


def test_tables_keep_ids_whole_and_have_no_colour(run: Run, server: Server) -> None:
    server.jobs = [job(progress=progress(12), state="running")]
    server.base_models, server.adapters = [base_model("ready")], [adapter()]
    done = run("jobs", "list", COLUMNS="20", FORCE_COLOR="1")
    header, line = done.stdout.splitlines()
    assert header.split() == ["ID", "STATE", "MODEL", "SUFFIX", "PROGRESS", "LOSS", "CREATED"]
    assert line.split() == [JOB_ID, "running", "smollm2-135m-instruct", "-", "12/40", "2.600", "2m", "ago"]
    assert "\x1b" not in done.stdout
    assert "135M" in run("models", "list").stdout
    assert "v1" in run("adapters", "list").stdout


def test_an_id_may_be_shortened_while_it_stays_one(run: Run, server: Server) -> None:
    server.jobs = [job("ftjob-aaa1"), job("ftjob-aab2")]
    assert json.loads(run("jobs", "show", "aab", "--json").stdout)["id"] == "ftjob-aab2"
    assert json.loads(run("jobs", "show", "@last", "--json").stdout)["id"] == "ftjob-aaa1"
    done = run("jobs", "show", "ftjob-aa")
    assert done.returncode == 2
    four_parts(done.stderr, "ambiguous_id")


def test_login_stores_a_checked_key_for_its_owner_only(run: Run, server: Server, tmp_path: Path) -> None:
    bare: dict[str, str | None] = {"TUNERY_API_KEY": None, "TUNERY_API_URL": None}
    assert run("login", "--key", KEY, **bare).returncode == 2
    assert run("login", "--key", "-", "--api-url", server.url, stdin="tk_wrong\n", **bare).returncode == 4
    stored = tmp_path / "config" / "tunery" / "config.toml"
    assert not stored.exists()
    done = run("login", "--key", "-", "--api-url", server.url + "/v1/", stdin=KEY + "\n", **bare)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert KEY not in done.stderr
    assert stored.stat().st_mode & 0o777 == 0o600
    assert "profile default" in run("whoami", **bare).stdout
    elsewhere = run("whoami", "--api-url", "http://127.0.0.1:9", **bare)
    four_parts(elsewhere.stderr, "no_api_key")  # the stored key goes to its own server only
    assert run("logout", **bare).returncode == 0
    assert run("whoami", **bare).returncode == 4


def test_the_server_that_was_started_here_needs_no_login(run: Run, server: Server, tmp_path: Path) -> None:
    (tmp_path / ".tunery").mkdir()
    (tmp_path / ".tunery" / "client.json").write_text(json.dumps({"api_url": server.url, "api_key": KEY}))
    bare: dict[str, str | None] = {"TUNERY_API_KEY": None, "TUNERY_API_URL": None}
    assert json.loads(run("whoami", "--json", **bare).stdout)["project"]["name"] == "nlp"


def test_a_model_that_does_not_exist_leaves_no_uploaded_file_behind(run: Run, server: Server, rows: Path) -> None:
    done = run("jobs", "create", "-t", "train.jsonl", "-m", "nope")
    assert done.returncode == 5
    assert server.contents == {}


def test_create_uploads_with_progress_and_sends_what_was_asked(run: Run, server: Server, rows: Path) -> None:
    flags = "-m smollm2-135m-instruct --suffix capitals --seed 7 --epochs 2 --lr 1e-3 --r 8 --max-steps 40 --gpus 1"
    more = "--metadata team=nlp --target-modules q_proj,v_proj --exact-match"
    done = run("jobs", "create", "-t", "train.jsonl", *flags.split(), *more.split())
    assert done.stdout == JOB_ID + "\n", done.stderr
    assert len(re.findall(r"^Uploading train\.jsonl +\d+%", done.stderr, re.M)) > 1
    assert f"tunery jobs watch {JOB_ID}" in done.stderr
    assert server.contents["file-new0"] == rows.read_bytes()
    headers, body = server.sent("POST", "/v1/fine_tuning/jobs")[0]
    assert headers["idempotency-key"]
    assert json.loads(body) == {
        "model": "smollm2-135m-instruct",
        "training_file": "file-new0",
        "suffix": "capitals",
        "seed": 7,
        "metadata": {"team": "nlp"},
        "method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}},
        "tunery": {
            "adapter": {"r": 8, "target_modules": ["q_proj", "v_proj"]},
            "training": {"max_steps": 40, "learning_rate": 0.001},
            "evaluation": {"exact_match": True},
            "resources": {"gpus": 1},
        },
    }


def test_create_says_what_it_asks_of_the_scheduler(run: Run, rows: Path) -> None:
    flags = "--gpus 2 --gpu-class h100-80gb --node-label rack=b --node-label disk=nvme --shareable"
    when = "--priority 20 --time-limit 2h30m --no-preemption --urgent"
    done = run("jobs", "create", "-m", "m", "-t", "train.jsonl", "--dry-run", *flags.split(), *when.split())
    assert json.loads(done.stdout)["tunery"] == {
        "resources": {
            "gpus": 2,
            "gpu_class": "h100-80gb",
            "node_labels": {"rack": "b", "disk": "nvme"},
            "shareable": True,
        },
        "scheduling": {"priority": 20, "time_limit": "2h30m", "preemptible": False, "urgent": True},
    }
    wrong = run("jobs", "create", "-m", "m", "-t", "train.jsonl", "--dry-run", "--node-label", "rack")
    assert wrong.returncode == 2 and "--node-label" in wrong.stderr


def test_an_estimate_sends_numbers_only_and_reads_well(run: Run, server: Server, rows: Path) -> None:
    one = {"gpu_bytes": 21_000_000_000, "hours": 0.31, "hours_p90": 1.2, "price_per_hour": 2.1, "amount": 0.651}
    server.routes["POST", "/v1/fine_tuning/estimate"] = lambda: reply(
        {
            "object": "tunery.estimate", "profile": "learned", "model": "llama", "parameters": 8_000_000_000,
            "rows": 10_000, "epochs": 3.0, "tokens": 9_000_000, "gpus": 1,
            "adapter_parameters": 41_943_040, "adapter_bytes": 167_772_160,
            "classes": [
                {"gpu_class": "h100-80gb", "fits": True, "runs": 12} | one,
                {"gpu_class": "l4-24gb", "fits": False, "runs": 0} | one | {"amount": None},
            ],
        }
    )  # fmt: skip
    done = run("jobs", "estimate", "-m", "llama", "-t", "train.jsonl", "--epochs", "3", "--gpu-class", "h100-80gb")
    assert done.returncode == 0, done.stderr
    ((_, body),) = server.sent("POST", "/v1/fine_tuning/estimate")
    asked = json.loads(body)
    lines = [line for line in rows.read_text().splitlines() if line.strip()]
    assert asked["rows"] == len(lines) and asked["longest_row_bytes"] == max(len(line.encode()) for line in lines)
    assert asked["hyperparameters"] == {"n_epochs": 3}
    assert asked["tunery"] == {"resources": {"gpu_class": "h100-80gb"}}
    assert server.contents == {}
    assert "10,000 x 3 epochs, about 9,000,000 tokens" in done.stdout
    assert re.search(r"h100-80gb +yes +21 GB +18m 36s +1h 12m +0\.65 +12 runs", done.stdout)
    assert re.search(r"l4-24gb +no .* - +a formula", done.stdout)
    assert run("jobs", "estimate", "-m", "m").returncode == 2
    assert run("jobs", "estimate", "--rows", "10").returncode == 2


def test_a_priority_is_set_and_a_job_shows_what_it_asked_for(run: Run, server: Server) -> None:
    asked = {
        "resources": {"gpus": 2, "gpu_class": "h100-80gb", "node_labels": {"rack": "b"}, "gpu_bytes": 21_000_000_000},
        "scheduling": {"priority": 20, "preemptible": False, "limit_s": 9000.0},
    }
    server.jobs = [job(**asked)]
    done = run("jobs", "priority", "@last", "20")
    assert (done.returncode, done.stdout) == (0, JOB_ID + "\n"), done.stderr
    (_, body), *_ = server.sent("POST", f"/v1/fine_tuning/jobs/{JOB_ID}/priority")
    assert json.loads(body) == {"priority": 20}
    shown = run("jobs", "show", "@last").stdout
    assert "2 GPUs with 21 GB, class h100-80gb, rack=b, priority 20, no pre-emption" in shown
    assert re.search(r"time limit +2h 30m", shown)
    assert run("jobs", "priority", "@last", "101").returncode == 2


def test_a_dry_run_sends_nothing_and_flags_go_over_the_recipe(
    run: Run, server: Server, rows: Path, tmp_path: Path
) -> None:
    recipe = {"method": "supervised", "adapter": {"r": 4}, "training": {"num_train_epochs": 9, "max_length": 256}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    words = (
        "jobs",
        "create",
        "-m",
        "m",
        "-t",
        "train.jsonl",
        "--dry-run",
        "--recipe",
        "recipe.json",
        "--epochs",
        "1.5",
    )
    done = run(*words)
    body = json.loads(done.stdout)
    assert body["training_file"] == "train.jsonl"
    assert body["tunery"] == {"adapter": {"r": 4}, "training": {"num_train_epochs": 1.5, "max_length": 256}}
    assert server.requests == []
    (tmp_path / "recipe.json").write_text('{"lora": {}}')
    done = run(*words)
    assert done.returncode == 6
    four_parts(done.stderr, "invalid_recipe")


def test_watch_without_a_terminal_tells_the_story_in_lines(run: Run, server: Server) -> None:
    server.jobs, server.story = [job()], story_without_pauses()
    done = run("jobs", "watch", JOB_ID, "--exit-status", CI="1")
    assert (done.returncode, done.stdout) == (0, "")
    shown = done.stderr
    assert "queued      position 2: needs 1 GPU; 0 free" in shown
    assert re.search(r"90%  step 36/40  loss 1\.400  eval 1\.311  2\.1k tok/s  ETA 1m 20s", shown)
    assert "eval loss 3.214 → 1.180   exact match 12.5% → 81.2%" in shown
    assert "adapter  ft:smollm2-135m-instruct:acme:capitals:8e7c4b" in shown
    assert "\x1b" not in shown


def story_without_pauses() -> Iterator[tuple[dict[str, object], list[dict[str, object]]]]:
    """Each look costs a second: of the story, what the test asks about."""
    whole = story()
    return iter([whole[0], whole[1], whole[3], whole[-2], whole[-1]])


def test_a_failed_job_says_why_and_exits_3(run: Run, server: Server) -> None:
    failed = job(state="failed") | {"error": {"code": "out_of_memory", "message": "79 of 80 GB in use", "param": None}}
    server.jobs = [failed]
    done = run("jobs", "watch", "@last", "--exit-status")
    assert done.returncode == 3
    four_parts(done.stderr, "out_of_memory")
    assert "Lower max_length" in done.stderr
    assert run("jobs", "watch", "@last").returncode == 0
    server.jobs = [job("ftjob-1", "succeeded", adapter=ADAPTER), job("ftjob-2", "cancelled")]
    done = run("jobs", "wait", "ftjob-1", "ftjob-2")
    assert done.returncode == 10
    assert done.stdout == "ftjob-1  succeeded\nftjob-2  cancelled\n"


def test_waiting_can_be_limited(run: Run, server: Server) -> None:
    server.jobs = [job(state="running")]
    done = run("jobs", "wait", JOB_ID, "--timeout", "0.1s")
    assert (done.returncode, done.stdout) == (8, "")
    four_parts(done.stderr, "wait_timeout")


def test_ctrl_c_detaches_and_the_job_goes_on(environment: dict[str, str], server: Server, tmp_path: Path) -> None:
    server.jobs = [job(state="running", progress=progress(4))]
    words = [sys.executable, "-m", "tunery.cli", "jobs", "watch", JOB_ID]
    # a shell starts its background programs with Ctrl-C ignored, and these tests may be one
    listens = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(words, env=environment, cwd=tmp_path, stderr=subprocess.PIPE, text=True, **listens)
    deadline = time.monotonic() + 60
    while not server.sent("GET", f"/v1/fine_tuning/jobs/{JOB_ID}/events") and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"the job continues: `tunery jobs cancel {JOB_ID}`" in stderr
    assert "Traceback" not in stderr
    assert not server.sent("POST", f"/v1/fine_tuning/jobs/{JOB_ID}/cancel")


def test_events_and_logs_come_in_order_and_whole(run: Run, server: Server) -> None:
    server.jobs = [job(state="succeeded")]
    server.events = [event(number, f"event {number}") for number in range(250)]
    document = json.loads(run("jobs", "events", JOB_ID, "-n", "240", "--json").stdout)
    assert [found["message"] for found in document] == [f"event {number}" for number in range(10, 250)]
    followed = run("jobs", "events", JOB_ID, "-f", "-n", "3").stdout.splitlines()
    assert [line[-9:] for line in followed] == ["event 247", "event 248", "event 249"]
    server.log = [{"text": f"line {number}\n"} for number in range(30)]
    whole = "".join(f"line {number}\n" for number in range(30))
    assert run("jobs", "logs", JOB_ID).stdout == whole
    assert run("jobs", "logs", JOB_ID, "-f").stdout == whole
    assert run("jobs", "logs", JOB_ID, "-n", "1").stdout == "line 29\n"


def test_an_adapter_arrives_whole_or_not_at_all(run: Run, server: Server, tmp_path: Path) -> None:
    server.adapters = [adapter()]
    done = run("adapters", "download", "capitals")
    assert (done.returncode, done.stdout) == (0, "capitals-v1\n"), done.stderr
    assert (tmp_path / "capitals-v1" / "adapter_config.json").read_bytes() == CONFIG
    assert (tmp_path / "capitals-v1" / "adapter_model.safetensors").read_bytes() == WEIGHTS
    four_parts(run("adapters", "download", "capitals").stderr, "file_exists")

    server.adapters = [adapter(sha256="0" * 64)]
    done = run("adapters", "download", "capitals", "-o", "again")
    assert (done.returncode, done.stdout) == (1, "")
    four_parts(done.stderr, "corrupt_download")
    assert not list(tmp_path.glob("*again*"))
    assert not list(tmp_path.glob(".again*"))


def test_a_name_that_leads_out_of_the_folder_is_refused(run: Run, server: Server, tmp_path: Path) -> None:
    hostile = adapter()
    hostile["versions"][0]["files"][0]["name"] = "../../outside"
    server.adapters = [hostile]
    done = run("adapters", "download", "capitals")
    assert done.returncode == 1
    four_parts(done.stderr, "unsafe_file_name")
    assert [path.name for path in tmp_path.iterdir() if "capitals" in path.name] == []


def test_files_come_back_under_their_last_name_only(run: Run, server: Server, tmp_path: Path) -> None:
    server.files = [{"id": "file-1", "filename": "../../x.jsonl", "bytes": 4}]
    server.contents["file-1"] = b"rows"
    assert run("files", "download", "file-1").stdout == "x.jsonl\n"
    assert (tmp_path / "x.jsonl").read_bytes() == b"rows"
    assert run("files", "download", "file-1").returncode == 1
    assert run("files", "download", "file-1", "-o", "-").stdout == "rows"
    assert run("files", "delete", "file-1").stdout == "file-1\n"


def test_importing_a_model_waits_until_it_is_ready(run: Run, server: Server) -> None:
    done = run("models", "import", "hub:acme/base@v1", "--name", "base")
    assert done.returncode == 0, done.stderr
    _, body = server.sent("POST", "/v1/base_models")[0]
    assert json.loads(body) == {"source": "hub", "name": "base", "repo": "acme/base", "revision": "v1"}
    assert "is ready" in done.stderr
    failed = base_model("failed") | {"error": "no such revision"}
    server.routes["POST", "/v1/base_models"] = lambda: reply(failed, 202)
    four_parts(run("models", "import", "demo").stderr, "model_import_failed")
    assert run("models", "import", "nonsense").returncode == 2


def test_a_watch_outlives_a_server_that_is_away(run: Run, server: Server) -> None:
    server.jobs = [job(state="succeeded")]
    path = f"/v1/fine_tuning/jobs/{JOB_ID}"
    sick = lambda: refuse(503, "Restarting.", "unavailable", headers={"x_should_retry": "false"})  # noqa: E731
    answers = iter([reply(job(state="running")), sick(), sick(), reply(server.jobs[0])])
    server.routes["GET", path] = lambda: next(answers)
    done = run("jobs", "watch", JOB_ID)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the job is not affected") == 1
