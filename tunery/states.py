"""The life of a job and of an attempt: every state, every legal move, every reason to fail."""

from dataclasses import dataclass
from enum import StrEnum


class JobState(StrEnum):
    """What a user's job is doing. `tunery.state` on the wire."""

    VALIDATING = "validating"
    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    CANCELLING = "cancelling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


_J = JobState
MOVES: dict[JobState, frozenset[JobState]] = {
    _J.VALIDATING: frozenset({_J.QUEUED, _J.FAILED, _J.CANCELLED}),
    _J.QUEUED: frozenset({_J.STARTING, _J.PAUSED, _J.CANCELLED, _J.FAILED}),
    _J.STARTING: frozenset({_J.RUNNING, _J.QUEUED, _J.PAUSING, _J.CANCELLING, _J.FAILED}),
    _J.RUNNING: frozenset({_J.SUCCEEDED, _J.QUEUED, _J.PAUSING, _J.CANCELLING, _J.FAILED}),
    _J.PAUSING: frozenset({_J.PAUSED, _J.SUCCEEDED, _J.CANCELLING, _J.FAILED}),
    _J.PAUSED: frozenset({_J.QUEUED, _J.CANCELLED}),
    _J.CANCELLING: frozenset({_J.CANCELLED, _J.SUCCEEDED, _J.FAILED}),
}

TERMINAL: frozenset[JobState] = frozenset(JobState) - MOVES.keys()

OPENAI_STATUS: dict[JobState, str] = {
    _J.VALIDATING: "validating_files",
    _J.QUEUED: "queued",
    _J.STARTING: "queued",
    _J.RUNNING: "running",
    _J.PAUSING: "running",
    _J.PAUSED: "queued",  # OpenAI's strict client knows no "paused"; `tunery.state` says it
    _J.CANCELLING: "cancelled",
    _J.SUCCEEDED: "succeeded",
    _J.FAILED: "failed",
    _J.CANCELLED: "cancelled",
}


class AttemptState(StrEnum):
    """One try at running a job. `publishing` has no trainer and no GPU, but keeps its lease."""

    ASSIGNED = "assigned"
    CLAIMED = "claimed"
    RUNNING = "running"
    STOPPING = "stopping"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    PREEMPTED = "preempted"
    LOST = "lost"
    CANCELLED = "cancelled"


_A = AttemptState
ATTEMPT_MOVES: dict[AttemptState, frozenset[AttemptState]] = {
    _A.ASSIGNED: frozenset({_A.CLAIMED, _A.CANCELLED, _A.LOST}),
    _A.CLAIMED: frozenset({_A.RUNNING, _A.STOPPING, _A.FAILED, _A.CANCELLED, _A.PREEMPTED, _A.LOST}),
    _A.RUNNING: frozenset({_A.STOPPING, _A.PUBLISHING, _A.FAILED, _A.CANCELLED, _A.PREEMPTED, _A.LOST}),
    _A.STOPPING: frozenset({_A.PUBLISHING, _A.FAILED, _A.CANCELLED, _A.PREEMPTED, _A.LOST}),
    _A.PUBLISHING: frozenset({_A.SUCCEEDED, _A.FAILED, _A.LOST}),
}
LIVE_ATTEMPT: frozenset[AttemptState] = frozenset(ATTEMPT_MOVES)
ENDED_ATTEMPT: frozenset[AttemptState] = frozenset(AttemptState) - LIVE_ATTEMPT
LEASED_ATTEMPT: frozenset[AttemptState] = LIVE_ATTEMPT - {_A.ASSIGNED}


class StopReason(StrEnum):
    """Why a trainer was asked to stop before it had finished."""

    CANCEL = "cancel"
    PAUSE = "pause"
    PREEMPT = "preempt"
    TIME_LIMIT = "time_limit"
    FENCED = "fenced"
    OUTAGE = "outage"
    SHUTDOWN = "shutdown"


class FailureCode(StrEnum):
    """Why something failed. `POLICY` says what follows from each."""

    INVALID_TRAINING_FILE = "invalid_training_file"
    INVALID_VALIDATION_FILE = "invalid_validation_file"
    INVALID_SPEC = "invalid_spec"
    INVALID_TARGETS = "invalid_target_modules"
    NON_FINITE_LOSS = "non_finite_loss"
    OUT_OF_MEMORY = "out_of_memory"
    TIME_LIMIT = "time_limit"
    DISK_FULL = "disk_full"
    STORAGE_UNAVAILABLE = "storage_unavailable"
    CORRUPT_ARTIFACT = "corrupt_artifact"
    CORRUPT_CHECKPOINT = "corrupt_checkpoint"
    TRAINER_CRASHED = "trainer_crashed"
    TRAINER_HUNG = "trainer_hung"
    WORKER_LOST = "worker_lost"
    NOT_CLAIMED = "not_claimed"
    ENGINE_LOST = "engine_lost"
    GPU_LOST = "gpu_lost"
    NO_CAPACITY = "no_capacity"
    INTERNAL = "internal_error"


class Fault(StrEnum):
    """Whose fault a failure is: decides whether it is retried and whether its GPU time is billed."""

    USER = "user"
    PLATFORM = "platform"


@dataclass(frozen=True)
class Policy:
    """What follows from a failure code: whose fault, retried or not, and the fix that the user reads."""

    fault: Fault
    retry: bool
    fix: str


_USER, _PLATFORM = Fault.USER, Fault.PLATFORM
POLICY: dict[FailureCode, Policy] = {
    FailureCode.INVALID_TRAINING_FILE: Policy(_USER, False, "Correct the rows named above and upload the file again."),
    FailureCode.INVALID_VALIDATION_FILE: Policy(
        _USER, False, "Correct the rows named above and upload the file again."
    ),
    FailureCode.INVALID_SPEC: Policy(_USER, False, "Correct the named setting and submit the job again."),
    FailureCode.INVALID_TARGETS: Policy(_USER, False, "Use one of the module names listed, or `all-linear`."),
    FailureCode.NON_FINITE_LOSS: Policy(_USER, False, "Lower the learning rate, or look at the rows of that step."),
    FailureCode.OUT_OF_MEMORY: Policy(
        _USER, False, "Lower max_length or per_device_train_batch_size, or ask for a larger GPU."
    ),
    FailureCode.TIME_LIMIT: Policy(
        _USER, False, "Submit the job again with a longer time_limit, or with fewer epochs; its checkpoints are kept."
    ),
    FailureCode.DISK_FULL: Policy(_PLATFORM, True, "Free disk space on the node; the job is tried again."),
    FailureCode.STORAGE_UNAVAILABLE: Policy(_PLATFORM, True, "Bring the object store back; the job is tried again."),
    FailureCode.CORRUPT_ARTIFACT: Policy(
        _PLATFORM, True, "The stored object did not match its hash; the job is tried again."
    ),
    FailureCode.CORRUPT_CHECKPOINT: Policy(_PLATFORM, True, "An older checkpoint is used."),
    FailureCode.TRAINER_CRASHED: Policy(_PLATFORM, True, "The job is tried again from its newest checkpoint."),
    FailureCode.TRAINER_HUNG: Policy(_PLATFORM, True, "The job is tried again from its newest checkpoint."),
    FailureCode.WORKER_LOST: Policy(_PLATFORM, True, "The job is tried again from its newest checkpoint."),
    FailureCode.NOT_CLAIMED: Policy(_PLATFORM, True, "The node did not answer; the job is assigned again."),
    FailureCode.ENGINE_LOST: Policy(_PLATFORM, True, "The job is tried again from its newest checkpoint."),
    FailureCode.GPU_LOST: Policy(_PLATFORM, True, "The job is tried again on another GPU."),
    FailureCode.NO_CAPACITY: Policy(
        _USER, False, "Ask for less memory or fewer GPUs, or add a node that is large enough."
    ),
    FailureCode.INTERNAL: Policy(
        _PLATFORM, True, "The job is tried again; if it fails again, send the request id to your operator."
    ),
}

MAX_FAULTS_WITHOUT_PROGRESS = 3


def after_failure(code: FailureCode, faults_without_progress: int) -> JobState:
    """Where a failed attempt leaves its job.

    A platform fault goes back to the queue, as long as a newer checkpoint appeared since the last one;
    `faults_without_progress` counts this fault too, and the third in a row ends the job.
    """
    policy = POLICY[code]
    if policy.retry and faults_without_progress < MAX_FAULTS_WITHOUT_PROGRESS:
        return JobState.QUEUED
    return JobState.FAILED
