"""Small words that several single-fault tests share."""

from pathlib import Path


def failing(at: str, latch: Path | None = None) -> dict[str, str]:
    """Settings of a program that meets a failpoint; with a `latch`, `once` is once for all that are started."""
    once = {"FAILPOINT_DIR": str(latch)} if latch else {}
    return {"FAILPOINT": at, "FAILPOINTS_ALLOWED": "1"} | once
