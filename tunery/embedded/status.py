"""What runs in a home: read from `state.json`, believed only while the supervisor's lock is held."""

import contextlib
import json
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from tunery.embedded.home import Home

PROGRAMS = ("api", "scheduler", "node")
SERVICES = ("postgres", "valkey", "s3", *PROGRAMS)
_ASK_S = 2.5
"""A little longer than a program itself waits for what it needs."""


def report(home: Home) -> dict[str, Any]:
    """A stable document: `tunery status --json` prints it."""
    pid, state = home.holder(), home.state()
    services: dict[str, Any] = state.get("services", {}) if pid else {}
    with ThreadPoolExecutor() as pool:
        asked = {name: pool.submit(_health, one.get("ops_url")) for name, one in services.items()}
    for name, answer in asked.items():
        services[name]["health"] = answer.result()
    return {
        "running": pid is not None,
        "ready": pid is not None and bool(state.get("ready")),
        "pid": pid,
        "home": str(home.root),
        "data": str(home.data),
        "api_url": state.get("api_url"),
        "logs": str(home.logs),
        "services": services,
    }


def text(found: dict[str, Any]) -> str:
    if not found["running"]:
        return f"tunery is not running (home {found['home']})\nstart it: tunery up -d"
    rows = [("SERVICE", "STATE", "PID", "UP", "RESTARTS", "WHERE", "HEALTH")]
    for name, one in found["services"].items():
        pid = str(one["pid"] or "-")
        rows.append(
            (name, one["state"], pid, _age(one["started_at"]), str(one["restarts"]), one["where"], _said(one["health"]))
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
    state = "ready" if found["ready"] else "starting"
    return f"tunery is {state} at {found['api_url']} (pid {found['pid']}, home {found['home']})\n{table}"


def _health(url: str | None) -> dict[str, Any] | None:
    """What a program answers to /readyz on its operations listener; None if it has none."""
    if url is None:
        return None
    try:
        # a proxy of the environment's has no business between us and loopback
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{url}/readyz", timeout=_ASK_S
        ) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as refused:
        with contextlib.suppress(ValueError):
            return json.load(refused)
    except (OSError, ValueError):
        pass
    return {"status": "no answer", "parts": {}}


def _said(health: dict[str, Any] | None) -> str:
    if health is None:
        return ""
    failing = "; ".join(f"{name}: {state}" for name, state in health["parts"].items() if state != "ok")
    role = f", {health['role']}" if "role" in health else ""
    return f"{health['status']}{role}" + (f" ({failing})" if failing else "")


def banner(home: Home) -> str:
    """Said once everything answers. The admin key is shown the first time only; afterwards the file has it."""
    state = home.state()
    profile = json.loads(home.profile.read_text())
    url = profile["api_url"]
    lines = ["", f"Tunery is ready: {url}", ""]
    if not state.get("key_shown"):
        lines += [f"  admin key (shown once; kept in {home.profile}):", f"    {profile['api_key']}", ""]
        home.update_state(key_shown=True)
    lines += [
        "  In a shell that uses it:",
        '    eval "$(tunery status --env)"     # OPENAI_BASE_URL, OPENAI_API_KEY, TUNERY_API_URL, TUNERY_API_KEY',
        f"  API reference   {url}/docs",
        f"  State and logs  {home.root}   (tunery logs api -f)",
        "",
        "  Next:  tunery status",
        "         tunery models list",
        "         tunery jobs create -m MODEL -t FILE.jsonl --watch",
        "         tunery down",
        "",
    ]
    return "\n".join(lines)


def exports(home: Home) -> str:
    """For `eval`: holds the key, so it goes to stdout only when asked for."""
    profile = json.loads(home.profile.read_text())
    url, key = profile["api_url"], profile["api_key"]
    pairs = {"OPENAI_BASE_URL": f"{url}/v1", "OPENAI_API_KEY": key, "TUNERY_API_URL": url, "TUNERY_API_KEY": key}
    return "\n".join(f"export {name}={value}" for name, value in pairs.items())


def _age(started_at: float) -> str:
    seconds = int(time.time() - started_at) if started_at else 0
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"
