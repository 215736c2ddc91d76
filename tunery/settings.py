"""Settings of each program: read once from the environment in its entry point, then passed down."""

import os
import sys
from pathlib import Path
from typing import Literal, Self, TypeVar

import structlog
from pydantic import Field, SecretStr, ValidationError, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
)

from tunery import labels
from tunery.telemetry import hide_secrets

MIB = 1024 * 1024


class _Settings(BaseSettings):
    # hide_input: what does not validate may be a URL with its password
    model_config = SettingsConfigDict(env_prefix="TUNERY_", frozen=True, extra="ignore", hide_input_in_errors=True)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment; then, where `TUNERY_SECRETS_DIR` names a folder, its files, such as `tunery_redis_url`.

        A container's environment is shown to whoever may inspect it; its mounted files are not.
        """
        folder = os.environ.get("TUNERY_SECRETS_DIR")
        files = (SecretsSettingsSource(settings_cls, secrets_dir=folder),) if folder else ()
        return init_settings, env_settings, *files


S = TypeVar("S", bound=_Settings)


def load(kind: type[S]) -> S:
    """A program's settings from its environment; ends the program with 2 and names what is missing or wrong."""
    try:
        found = kind()
    except ValidationError as error:
        told = {f"TUNERY_{'_'.join(map(str, one['loc'])).upper()}": one["msg"] for one in error.errors()}
        structlog.get_logger(__name__).error("settings are missing or wrong", variables=told)
        sys.exit(2)
    hide_secrets(found)
    return found


class DatabaseSettings(_Settings):
    """Each program logs in as a role of its own; the URL carries that role's password."""

    database_url: SecretStr


class OpsSettings(_Settings):
    ops_host: str = "127.0.0.1"
    """Where `/livez`, `/readyz` and `/metrics` are served, to operators only."""
    ops_port: int = 0
    """0: nowhere. `tunery up` chooses one for each program and shows it in `tunery status`."""


class RedisSettings(_Settings):
    redis_url: SecretStr


class StorageSettings(_Settings):
    s3_endpoint_url: str | None = None
    """None means AWS itself."""
    s3_bucket: str = "tunery"
    s3_region: str = "us-east-1"
    s3_access_key_id: SecretStr
    s3_secret_access_key: SecretStr


class Clocks(_Settings):
    """Every time of the protocol, in seconds. All comparisons use the database's `now()`."""

    lease_s: float = 45
    """A lease lives so long after its last renewal."""
    renew_s: float = 10
    lost_grace_s: float = 30
    """So long after a lease has expired, the reconciler declares the attempt lost."""
    claim_timeout_s: float = 60
    """An assigned attempt that nobody claims in this time is assigned again."""
    leader_ttl_s: float = 6
    leader_renew_s: float = 2
    sweep_s: float = 5
    """How often the reconciler looks for what fell silent."""
    poll_s: float = 5
    """How often a node asks for work without being rung, and says that it lives."""
    tick_s: float = 10
    """How often a supervisor tells its trainer that it lives."""
    silent_node_s: float = 1200
    """GPUs of a node that says nothing are freed after this: a fenced trainer may still be on them."""
    outage_grace_s: float = 900
    """A trainer goes on for so long while the database cannot be reached."""
    stop_grace_s: float = 120
    """A trainer asked to stop is killed after this."""

    @model_validator(mode="after")
    def _devices_outlast_trainers(self) -> Self:
        """A silent node's trainer may live through the whole grace; its devices must not be given away before."""
        least = self.outage_grace_s + self.stop_grace_s + 60
        if self.silent_node_s < least:
            raise ValueError(f"TUNERY_SILENT_NODE_S must be at least outage_grace_s + stop_grace_s + 60 = {least:.0f}")
        return self


class ApiSettings(DatabaseSettings, RedisSettings, StorageSettings, OpsSettings):
    key_pepper: SecretStr
    """Keys the HMAC of stored API keys; no default, so that a deployment cannot forget it."""
    api_host: str = "127.0.0.1"
    api_port: int = 8400
    drain_s: float = 0
    """So long after SIGTERM requests are still served while `/readyz` says no: load balancers take time to notice."""
    max_file_bytes: int = 512 * MIB
    simulate_wait_s: float = Field(default=5, gt=0, le=30)
    """How long the scheduler may take to say when a job would start. It needs less than two seconds."""
    max_live_jobs: int = 1000
    """Jobs of one project that have not ended."""
    max_gpus_per_job: int = Field(default=1, ge=1, le=64)
    """What one job may ask for, all on one node. One, because the trainer spans no devices yet."""
    max_project_bytes: int = 1024 * 1024 * MIB
    """Files, rows, checkpoints and adapters of one project, unless `projects.max_storage_bytes` says otherwise."""
    docs_url: str = "docs/errors.md"
    """What errors point to: this page of the checkout, or wherever you publish it."""
    node_database_url: SecretStr | None = None
    """Where nodes that join reach the servers, without a login: theirs is made for them. Default: as the api does."""
    node_redis_url: SecretStr | None = None
    node_s3_endpoint_url: str | None = None
    node_s3_access_key_id: SecretStr | None = None
    """The object store's identity for nodes: reads `u/` and `a/`, writes `a/`. Without it no node can join."""
    node_s3_secret_access_key: SecretStr | None = None


class Retention(_Settings):
    """What is given up, and when. Nothing that a job needs to end is ever given up."""

    tidy_s: float = 60
    """Pause between two looks for what may go."""
    keep_checkpoints: int = Field(default=2, ge=1)
    """Newest checkpoints of an unfinished job that keep their optimizer state; older ones keep the adapter alone."""
    keep_optimizer_days: float = Field(default=7, ge=0)
    """After a job has ended, its checkpoints keep their optimizer state for so long."""
    keep_logs_days: float = Field(default=30, ge=0)
    orphan_age_s: float = Field(default=24 * 3600, ge=0)
    """Objects without a row, and uploads in parts that nobody finished, go when they are older than this."""
    orphan_sweep_s: float = 3600
    """How often the whole store is listed to find them."""


class Fairness(_Settings):
    """Constants of the scheduling policy; docs/scheduler.md says what each does and why it has this value."""

    tau_s: float = Field(default=600, gt=0)
    """How far ahead a project's share looks. Keep it at or below the length of a typical job."""
    queue_depth: int = Field(default=100, ge=1)
    """So many waiting jobs of each project are looked at in one pass."""
    preemption: bool = True
    min_runtime_s: float = Field(default=900, ge=0)
    """A job has run so long, or three times what moving it costs, before it may be moved off its GPUs."""
    max_preemptions: int = Field(default=3, ge=0)
    """Of one job within the window; then it is left alone."""
    preemption_window_s: float = Field(default=86400, gt=0)
    gpu_sharing: bool = True
    """Jobs of one project that agree to it may share a GPU."""


class SchedulerSettings(DatabaseSettings, RedisSettings, Clocks, Retention, Fairness, OpsSettings):
    budget_s: float = 10
    """Pause between two looks at what projects have used of their budgets: they may pass them by so much."""
    decide_s: float = 2
    """Pause between two passes of the policy, and between two looks into the outbox, when nothing wakes them sooner."""
    forecast_s: float = Field(default=30, gt=0)
    """Pause between two forecasts of when jobs start. One is shown for three times as long; 0.2 of it is computed."""


class NodeSettings(DatabaseSettings, StorageSettings, Clocks, OpsSettings):
    redis_url: SecretStr | None = None
    """None: nobody can ring, and work is found by polling."""
    home: Path
    """The node's own folder: lock, socket, pid files, workspaces."""
    model_store: Path | None = None
    """Base models on local disk, shared by this node's attempts; default `<home>/models`."""
    node_name: str = "local"
    node_labels: str = ""
    """`rack=b,interconnect=nvlink`: what jobs may ask for. An operator's labels win over these."""
    min_free_disk_bytes: int = Field(default=1024 * MIB, ge=0)
    """With less room on the disk of `home` or `model_store` a node gets no new work; what runs goes on."""
    cpu_task_slots: int = Field(default=2, ge=1)
    cpu_devices: int = Field(default=1, ge=1, le=16)
    """A host without GPUs counts as so many devices. More than one is for tests: trainers on the same cores slow each
    other down."""
    attempts_per_gpu: int = Field(default=4, ge=1)
    """So many attempts may share one GPU, if their jobs agree and their memory fits."""
    max_unstored_checkpoints: int = Field(default=2, ge=1)
    log_chunk_s: float = 5
    sample_s: float = Field(default=15, gt=0)
    """Pause between two samples of what an attempt's devices do, as its job shows them."""
    underused_below: float = Field(default=0.3, ge=0, le=1)
    """A job says so when its devices are busy for less than this share of the time; 0: it never does."""
    underused_after_s: float = Field(default=600, gt=0)
    """So long without a break, from the first step on."""
    hang_s: float = Field(default=1800, gt=0)
    """A trainer that says nothing for so long is ended. Loading a large model from a cold disk takes minutes."""
    max_log_bytes: int = 64 * MIB
    trainer_module: str = "trainer"
    """`python -P -m <module>`; tests put a trainer without torch here."""
    trainer_threads: int | None = None
    """CPU threads of a trainer; default: what the host gives it."""
    trainer_isolation: Literal["auto", "require", "off"] = "auto"
    """`auto`: whatever walls this host allows; `require`: no start without the ones that matter; `off`: none."""
    trainer_uids: str = Field(default="60800-60863", pattern=r"^[1-9]\d*(-[1-9]\d*)?$")
    """As root, each running trainer gets a uid of this range for itself. They need no entry in the password file."""
    trainer_cgroups: str = ""
    """Folders below /sys/fs/cgroup, separated by colons, in which the node may make a cgroup for each trainer."""
    trainer_memory_bytes: int | None = Field(default=None, ge=256 * MIB)
    """Main memory of one trainer; default: the host's, less 5 %. Needs a cgroup, or a trainer without a GPU."""
    trainer_processes: int = Field(default=4096, ge=64)
    """Processes and threads of one trainer. Needs a cgroup, or a uid of its own."""
    trainer_readable: str = ""
    """More paths that trainers may read, separated by colons."""
    trainer_hidden: str = ""
    """Paths that no trainer program may see, separated by colons. The node's home is one anyway."""

    @field_validator("node_labels")
    @classmethod
    def _are_labels(cls, given: str) -> str:
        labels.parse(given)
        return given
