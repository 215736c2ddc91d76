"""Promise 6: a resumed run shows one coherent curve."""

from pathlib import Path

from tests.chaos.history import collect, violations
from tests.fleet import fleet


def test_a_supervisor_killed_right_behind_a_checkpoint_leaves_no_gap_in_the_curve(tmp_path: Path) -> None:
    with fleet() as running:
        running.scheduler()
        points = {
            "FAILPOINTS_ALLOWED": "1",
            "FAILPOINT_DIR": str(tmp_path),
            "FAILPOINT": "checkpoint.recorded:kill:once",
        }
        running.node(**points)
        job_id = running.submit("ok", steps=40, save_steps=10)
        assert running.ends(job_id) == "succeeded"
        assert len(running.attempts(job_id)) == 2
        running.until(running.nothing_held, 10)
        running.until(running.nothing_left, 10)
        assert violations(collect(running, [])) == []
