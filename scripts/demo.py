"""`make demo`: the main job, through the command line that a user would type.

Starts the servers, imports the demo base model, uploads the example rows, trains a LoRA adapter with a live progress
line, and shows what came of it. Every step is a `tunery` command; this script only prints them and reads their JSON.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TUNERY = str(Path(sys.executable).parent / "tunery")
MODEL = "smollm2-135m-instruct"
NAME = "ticket-router"


def main() -> int:
    began = time.monotonic()
    os.chdir(ROOT)
    os.environ.setdefault("TUNERY_HOME", str(ROOT / ".tunery"))
    if status() is None and run("up", "-d"):
        return 1
    if run("models", "import", "demo"):
        return 1
    create = ["jobs", "create", "-m", MODEL, "-t", "examples/train.jsonl", "-v", "examples/validation.jsonl"]
    create += ["--suffix", NAME, "--recipe", "examples/demo-recipe.json", "--watch"]
    if code := run(*create):
        return code
    (job,) = read("jobs", "list", "--limit", "1")[:1]
    show(job["id"], time.monotonic() - began)
    return 0


def status() -> dict[str, Any] | None:
    """What `tunery status` says, or None when nothing runs."""
    asked = subprocess.run([TUNERY, "status", "--json"], capture_output=True, text=True)
    return json.loads(asked.stdout) if asked.returncode == 0 else None


def run(*arguments: str) -> int:
    """Run a command as a user would, in sight."""
    say(
        f"\n\033[1m$ tunery {' '.join(arguments)}\033[0m"
        if sys.stdout.isatty()
        else f"\n$ tunery {' '.join(arguments)}"
    )
    return subprocess.run([TUNERY, *arguments]).returncode


def read(*arguments: str) -> Any:
    """What a command says as JSON."""
    asked = subprocess.run([TUNERY, *arguments, "--json"], check=True, capture_output=True, text=True)
    return json.loads(asked.stdout)


def show(job_id: str, seconds: float) -> None:
    events = read("jobs", "events", job_id, "-n", "1000")
    data = [event["data"] for event in events if event.get("data")]
    before, after = evaluation(data, "before"), evaluation(data, "after")
    version = newest_version()
    say(f"\neval loss {before['eval/loss']:.3f} -> {after['eval/loss']:.3f}")
    say(f"exact match {before['eval/exact_match']:.0%} -> {after['eval/exact_match']:.0%}  (held-out rows)")
    say("\nThe adapter")
    say(f"  name    {version['model_name']}  (adapter '{NAME}', version {version['version']})")
    say(f"  size    {version['bytes'] / 1e6:.1f} MB")
    say(f"  sha256  {version['sha256']}")
    say(f"  place   {version['uri']}")
    say("\nUse it")
    say(f"  tunery adapters download {NAME} -o {NAME}")
    say("  from peft import PeftModel                       # base: HuggingFaceTB/SmolLM2-135M-Instruct")
    say(f'  model = PeftModel.from_pretrained(base, "{NAME}")')
    say(f"  vllm serve HuggingFaceTB/SmolLM2-135M-Instruct --enable-lora --lora-modules {NAME}=./{NAME}")
    say(f"\n{seconds:.0f} s in all. Tunery is still running in {os.environ['TUNERY_HOME']}:")
    say("  .venv/bin/tunery jobs list     .venv/bin/tunery status     .venv/bin/tunery down")


def evaluation(data: list[dict[str, Any]], when: str) -> dict[str, float]:
    found = [item["values"] for item in data if item.get("kind") == "eval" and item.get("when") == when]
    return found[-1]


def newest_version() -> dict[str, Any]:
    return read("adapters", "show", NAME)["versions"][0]


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
