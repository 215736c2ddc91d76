"""What every program says of itself: log lines, health, metrics, traces. Set up once, in each entry point."""

from tunery.telemetry.logs import bind_process, configure_logs, hide_secrets

__all__ = ["bind_process", "configure_logs", "hide_secrets"]
