"""Users and faults as rules of one state machine; Hypothesis finds, and shrinks, the order that breaks a promise.

    python -m tests.chaos.machine --minutes 120 --seed 7

Each example plays on a running deployment: two nodes, two schedulers, an api, servers of its own. At its end everything
is healed, every job must come to its end, and the whole history is checked. A deployment whose history was false is
thrown away, so that the next try of the shrinker begins afresh. Processes are not deterministic: a rerun of the seed
makes the same choices, not always the same races.
"""

import argparse
import os
import random
import signal
import sys
import time
from typing import Any, ClassVar

from hypothesis import HealthCheck, Phase, Verbosity, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from tests.chaos.deployment import Deployment, end_in_order
from tests.chaos.evidence import Told
from tests.chaos.history import violations
from tests.chaos.nemesis import LINKS, MAIN, Nemesis
from tests.chaos.workload import Workload

MOST_JOBS = 4
SETTINGS = settings(
    max_examples=4,
    stateful_step_count=10,
    deadline=None,
    database=None,
    print_blob=True,
    report_multiple_bugs=False,
    verbosity=Verbosity.normal,
    phases=(Phase.generate, Phase.shrink),
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)


class Survives(RuleBasedStateMachine):
    """Nothing is lost, whatever the order of these rules."""

    running: ClassVar[Deployment | None] = None
    told: ClassVar[list[Told]] = []
    """On this deployment, by all examples that it has lived through."""
    examples: ClassVar[int] = 0
    played: ClassVar[int] = 0

    @initialize(choice=st.integers(0, 2**16))
    def begin(self, choice: int) -> None:
        kind = type(self)
        if kind.running is None:
            kind.running, kind.told = Deployment(), []
        kind.examples += 1
        self.deployment = kind.running
        self.workload = Workload(
            self.deployment.api_url,
            self.deployment.api_keys,
            choice,
            wanted=0,
            steps=24,
            save_steps=6,
            cancels=0,
            gangs=0.25,
        )
        self.nemesis = Nemesis(self.deployment, self.workload, choice)
        self.workload.start()

    # ---- users ---------------------------------------------------------------------------------------------------

    @rule()
    def submit(self) -> None:
        type(self).played += 1
        if len(self.workload.live()) < MOST_JOBS:
            self.workload.submit()

    @rule(which=st.integers(0, MOST_JOBS))
    @precondition(lambda self: self.workload.live())
    def cancel(self, which: int) -> None:
        type(self).played += 1
        live = self.workload.live()
        if live:
            self.workload.cancel(live[which % len(live)])

    @rule(seconds=st.floats(0.1, 3))
    def wait(self, seconds: float) -> None:
        time.sleep(seconds)

    @rule()
    def bad_rows(self) -> None:
        """A user's fault ends that user's job, and nothing else."""
        type(self).played += 1
        self.workload.submit_bad_rows()

    @rule()
    @precondition(lambda self: self.workload.told)
    def delete_a_file(self) -> None:
        """Refused while a job needs it."""
        type(self).played += 1
        self.workload.delete_file()

    # ---- faults --------------------------------------------------------------------------------------------------

    @rule(kind=st.sampled_from(MAIN))
    def kill(self, kind: str) -> None:
        type(self).played += 1
        self.nemesis.strike(kind, wait_s=2, manner="kill")

    @rule(kind=st.sampled_from(MAIN))
    def pause(self, kind: str) -> None:
        type(self).played += 1
        self.nemesis.strike(kind, wait_s=2, manner="pause")

    @rule(kind=st.sampled_from((*LINKS, "flush", "backends", "disk", "drain", "budget")))
    def hurt(self, kind: str) -> None:
        type(self).played += 1
        self.nemesis.strike(kind, wait_s=1)

    @rule(kind=st.sampled_from(("node", "scheduler", "api")))
    def restart(self, kind: str) -> None:
        """In order, as for an upgrade: a node checkpoints and gives its jobs back."""
        type(self).played += 1
        program = self.nemesis.any_of(kind)
        for_s = random.Random(self.examples).uniform(0, 1)
        with self.nemesis.hurting(kind, program.name) as lasts:
            program.signal(signal.SIGTERM)
            self.nemesis.later(for_s, program.start)
            lasts(for_s)

    def teardown(self) -> None:
        if not hasattr(self, "nemesis"):
            return
        kind = type(self)
        self.nemesis.heal()
        found = ["the deployment did not come to rest: " + problem for problem in self.deployment.rest(self.workload)]
        kind.told += self.workload.finish()
        found += violations(self.deployment.history(kind.told)) + self.workload.refused
        if found:
            kind.running = None
            self.deployment.close(keep=True)
            sys.stderr.write("\n".join(["false history:", *found, *(str(each) for each in self.nemesis.struck), ""]))
            raise AssertionError("\n".join(found))


def play(minutes: float, first_seed: int) -> dict[str, Any]:
    """Examples until the time is over; raises what the first false history said."""
    began = time.monotonic()
    number = first_seed
    try:
        while time.monotonic() - began < minutes * 60:
            sys.stderr.write(f"state machine, seed {number}, {time.monotonic() - began:.0f} s\n")
            run_state_machine_as_test(seed(number)(Survives), settings=SETTINGS)
            number += 1
    finally:
        if Survives.running is not None:
            Survives.running.close()
            Survives.running = None
    return {"seeds": [first_seed, number - 1], "examples": Survives.examples, "rules": Survives.played}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.machine", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(3)))
    options = parser.parse_args()
    end_in_order()
    print(play(options.minutes, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
