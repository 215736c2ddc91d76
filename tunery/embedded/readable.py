"""Log lines for people: the time, how bad, who, what, and the rest as name=value."""

import json
from datetime import datetime
from typing import Any

_SHOWN = ("time", "level", "program", "version", "logger", "message", "exception")


def readable(line: str) -> str:
    """A JSON line of a program in words; anything else, such as a server's own line, as it is."""
    if not line.startswith("{"):
        return line
    try:
        said: dict[str, Any] = json.loads(line)
        at = datetime.fromisoformat(said["time"]).astimezone().strftime("%H:%M:%S.%f")[:-3]
        head = f"{at} {said['level']:<8} {said['program']:<10} {said['message']}"
    except (ValueError, KeyError, TypeError):
        return line
    more = " ".join(f"{name}={_value(value)}" for name, value in said.items() if name not in _SHOWN)
    trace = f"\n{said['exception']}" if "exception" in said else ""
    return f"{head}  {more}".rstrip() + trace


def _value(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return json.dumps(text) if " " in text or not text else text
