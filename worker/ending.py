"""How an attempt ends: what its outcome means, publishing, and writing it down under the fence."""

from dataclasses import dataclass

import structlog

from tunery import adapters, failpoints, leases, progress
from tunery.contracts.events import (
    EXIT_MEMORY,
    EXIT_STOPPED,
    EXIT_USER,
    Event,
    Failed,
    Finished,
    Stopped,
)
from tunery.db import Sessions, transaction
from tunery.settings import NodeSettings
from tunery.states import FailureCode, StopReason
from tunery.storage import CorruptObject, Storage
from worker.patience import OutageTooLong, persist
from worker.uploads import STORAGE_GRACE_S, prefix, upload
from worker.workspace import Work, Workspace

log = structlog.get_logger(__name__)

_TAIL = 1500
_TAIL_BYTES = 200_000
_EXIT_CODES = {
    EXIT_USER: FailureCode.INVALID_SPEC,
    EXIT_MEMORY: FailureCode.OUT_OF_MEMORY,
}


@dataclass(frozen=True)
class NoOutcome:
    """The trainer went without a word. `exit_code` is None if it had to be killed or was an engine."""

    exit_code: int | None
    lost: FailureCode


class Ending:
    """Writes the end of one attempt. Every method may raise Fenced or OutageTooLong."""

    def __init__(
        self, work: Work, workspace: Workspace, storage: Storage, sessions: Sessions, settings: NodeSettings
    ) -> None:
        self._work, self._workspace, self._storage = work, workspace, storage
        self._sessions, self._settings = sessions, settings

    def settle(self, outcome: Event | NoOutcome, stop: StopReason | None, *, trainer_gone: bool) -> None:
        """Publish, requeue, fail or cancel, as the outcome says."""
        match outcome:
            case Finished():
                self._publish(outcome, trainer_gone)
            case Failed():
                peak = outcome.peak_memory_bytes
                self.fail(outcome.code, outcome.message, trainer_gone=trainer_gone, peak_memory_bytes=peak)
            case Stopped():
                self._stopped(stop or outcome.reason, trainer_gone)
            case NoOutcome() if stop is not None or outcome.exit_code == EXIT_STOPPED:
                self._stopped(stop or StopReason.SHUTDOWN, trainer_gone)
            case NoOutcome():
                code = _EXIT_CODES.get(outcome.exit_code or 0, outcome.lost)
                self.fail(code, f"{_how(outcome)} {self._tail()}".strip(), trainer_gone=trainer_gone)
            case _:
                raise AssertionError(f"{outcome.type} is no outcome")

    def fail(self, code: FailureCode, message: str, *, trainer_gone: bool = True, peak_memory_bytes: int = 0) -> None:
        told = message[:4000].replace("\0", "\ufffd")  # Postgres stores no NUL, and a log may be full of them

        def write() -> None:
            with transaction(self._sessions) as session:
                held = leases.hold(session, self._work.attempt_id, self._work.fence)
                if code is FailureCode.CORRUPT_CHECKPOINT:
                    progress.discard_checkpoint(session, held)
                leases.fail(
                    session,
                    held,
                    code,
                    told,
                    still_holds_gpu=not trainer_gone,
                    peak_memory_bytes=peak_memory_bytes,
                )

        log.warning("attempt failed", code=code, reason=message[:300])
        persist("ending the attempt", write, self._settings.outage_grace_s)

    def _stopped(self, reason: StopReason, trainer_gone: bool) -> None:
        def write() -> None:
            with transaction(self._sessions) as session:
                held = leases.hold(session, self._work.attempt_id, self._work.fence)
                leases.stopped(session, held, reason, still_holds_gpu=not trainer_gone)

        persist("ending the attempt", write, self._settings.outage_grace_s)

    def _publish(self, finished: Finished, trainer_gone: bool) -> None:
        """Free the GPU, store and verify every file, then publish and succeed in one transaction."""

        def begin() -> None:
            with transaction(self._sessions) as session:
                held = leases.hold(session, self._work.attempt_id, self._work.fence)
                leases.begin_publishing(session, held, still_holds_gpu=not trainer_gone)

        def commit() -> None:
            with transaction(self._sessions) as session:
                held = leases.hold(session, self._work.attempt_id, self._work.fence)
                adapters.publish(session, held, output)
                peak = finished.peak_memory_bytes
                leases.succeed(session, held, finished.tokens, peak, still_holds_gpu=not trainer_gone)

        if not any(file.name == adapters.WEIGHTS for file in finished.files):
            message = f"The trainer finished without {adapters.WEIGHTS}."
            self.fail(FailureCode.CORRUPT_ARTIFACT, message, trainer_gone=trainer_gone)
            return
        persist("publishing", begin, self._settings.outage_grace_s)
        output = adapters.Published(
            f"{prefix(self._work)}/output", finished.files, progress.json_safe(finished.metrics)
        )
        try:
            upload(
                self._storage,
                self._workspace.root,
                finished.path,
                finished.files,
                output.prefix,
                STORAGE_GRACE_S,
            )
        except (CorruptObject, OSError, KeyError) as error:
            message = f"The result could not be stored: {error}"
            self.fail(FailureCode.CORRUPT_ARTIFACT, message, trainer_gone=trainer_gone)
            return
        except OutageTooLong:
            message = "The object store stayed away while the result was to be stored."
            self.fail(FailureCode.STORAGE_UNAVAILABLE, message, trainer_gone=trainer_gone)
            return
        failpoints.reach("result.uploaded")
        persist("publishing", commit, self._settings.outage_grace_s)
        failpoints.reach("result.published")
        log.info("published", model=self._work.model_name, prefix=output.prefix)

    def _tail(self) -> str:
        """First and last of what the trainer printed: a traceback's end says what, its beginning sometimes why."""
        if not self._workspace.log.exists():
            return ""
        with self._workspace.log.open("rb") as log_file:
            log_file.seek(max(0, self._workspace.log.stat().st_size - _TAIL_BYTES))
            text = log_file.read().decode(errors="replace").replace("\0", "\ufffd").strip()
        if len(text) <= 2 * _TAIL:
            return text
        return f"{text[:_TAIL]}\n...\n{text[-_TAIL:]}"


def _how(outcome: NoOutcome) -> str:
    if outcome.lost is FailureCode.ENGINE_LOST:
        return "The engine went away."
    if outcome.exit_code is None:
        return "The trainer stopped answering."
    if outcome.exit_code < 0:
        return f"The trainer was killed by signal {-outcome.exit_code}."
    return f"The trainer ended with exit code {outcome.exit_code}."
