"""Random faults, one after another: who is hit, how, and what the victim was doing.

    plan = deck(500, seed)                 # every kind of victim often enough, shuffled
    Nemesis(deployment, workload, seed).strike(plan[0])

A stopped process is continued, a cut link is mended and a killed program is started again after a while that is part
of the fault; the servers are restarted by their own supervisor, as under `tunery up`.
"""

import contextlib
import os
import random
import signal
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

from redis import Redis
from redis.exceptions import RedisError
from sqlalchemy import select
from sqlalchemy.exc import SQLAlchemyError

from tests.chaos.deployment import Deployment, Program
from tests.chaos.evidence import Hurt
from tests.chaos.faults import PASS, SLOW_DOWN, Fault, blackhole, hold, http_error, latency, refuse, reset
from tests.chaos.treasury import Treasury
from tests.chaos.workload import Workload
from tunery.models import Attempt, Job, Leader
from tunery.states import LIVE_ATTEMPT, MAX_FAULTS_WITHOUT_PROGRESS

MAIN = ("trainer", "supervisor", "node", "scheduler", "api", "valkey", "postgres")
"""Victims that every long campaign hits often."""
LINKS = ("node-postgres", "scheduler-postgres", "api-postgres", "node-s3", "api-s3", "valkey-link")
ORDERS = ("drain", "budget")
"""No fault at all: what an operator may ask for at any time, and what no job may suffer from."""
OTHERS = (*ORDERS, *LINKS, "flush", "backends", "disk")
_GOT_OVER_S = 5
_PAUSED_SHARE = 0.25
"""Of the main victims so many are stopped for a while (SIGSTOP) instead of killed."""


@dataclass
class Struck:
    """One fault, as the report tells it."""

    at: float
    """Seconds since the campaign began."""
    how: str
    victim: str
    pid: int | None
    state: str
    busy: bool
    job: str | None = None
    for_s: float = 0
    """How long a pause or a cut lasted, or until a killed program was started again."""
    time: float = 0
    """Seconds since 1970."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Victim:
    kind: str
    name: str
    pid: int | None
    state: str
    busy: bool
    job: str | None = None
    place: str = ""
    """The program whose process, link or disk it is; of a trainer or a supervisor, its attempt."""


def deck(count: int, seed: int, least: int = 0) -> list[str]:
    """So many kinds of victims in random order; each main one at least `least` times, and five in seven are main."""
    main = max(least, count * 5 // 7 // len(MAIN))
    kinds = [kind for kind in MAIN for _ in range(main)]
    rest = max(0, count - len(kinds))
    kinds += [OTHERS[n % len(OTHERS)] for n in range(rest)]
    random.Random(seed).shuffle(kinds)
    return kinds[:count]


class Nemesis:
    def __init__(self, deployment: Deployment, workload: Workload, seed: int, *, scale: float = 1) -> None:
        self.deployment, self.workload = deployment, workload
        self.struck: list[Struck] = []
        self._hit_already: set[tuple[str, str]] = set()
        """An attempt is hit once: what a killed one leaves behind is not its next life."""
        self.spared = 0
        """How often it waited because one more fault would have been a job's third in a row without progress."""
        self._random = random.Random(seed)
        self.treasury = Treasury(deployment, workload, seed)
        self._scale = scale
        """Of every duration; production clocks need longer outages than shortened ones."""
        self._began = time.monotonic()
        self._mending: list[tuple[threading.Timer, Callable[[], Any]]] = []

    def strike(self, kind: str, wait_s: float = 10, manner: Literal["kill", "pause"] | None = None) -> Struck:
        """Hit a victim of this kind: a busy one, if one is busy within `wait_s`."""
        self.spared += self._weak()
        began = time.monotonic()
        while not (victim := self._choose(kind)).busy or self._weak():
            waited = time.monotonic() - began
            if waited > (wait_s if self._is_there(victim) and not self._weak() else 6 * wait_s):
                break  # an idle victim will do; nobody at all, or a job's last life, is worth a longer wait
            time.sleep(0.05)
        now = time.time()
        with self.hurting(kind, victim.place) as lasts:
            how, for_s = self._hit(victim, manner)
            lasts(for_s)
        struck = Struck(
            round(time.monotonic() - self._began, 2), how, victim.name, victim.pid, victim.state, victim.busy,
            victim.job, round(for_s, 2), now,
        )  # fmt: skip
        self.struck.append(struck)
        if kind in ("trainer", "supervisor") and how == "SIGKILL":
            self.deployment.killed.setdefault(uuid.UUID(victim.place), now)
        self._hit_already.add((kind, victim.name.rpartition(" ")[2]))
        return struck

    @contextlib.contextmanager
    def hurting(self, kind: str, place: str = "") -> Iterator[Callable[[float], None]]:
        """Note the time in which little can be expected of whom the fault touches: while it lasts, and until it is
        got over."""
        began, lasted = time.time(), [0.0]
        yield lasted.append
        if kind in ORDERS:
            return
        over = time.time() + max(lasted) + _GOT_OVER_S * self._scale
        if kind in ("trainer", "supervisor"):
            hurt = Hurt(began, over, kind, attempt=uuid.UUID(place) if place else None)
        else:
            hurt = Hurt(began, over, kind, node=place)
        self.deployment.hurt.append(hurt)

    def later(self, seconds: float, mend: Callable[[], Any]) -> None:
        """On a thread of its own: nothing that is to be mended waits for anything else."""
        timer = threading.Timer(seconds, mend)
        timer.start()
        self._mending.append((timer, mend))

    def any_of(self, kind: str) -> Program:
        return self._random.choice(self.deployment.of_kind(kind))

    def heal(self) -> None:
        """Everything that was stopped, cut or killed is well again."""
        for timer, mend in self._mending:
            timer.cancel()
            timer.join()
            mend()  # again is harmless
        self._mending.clear()
        self.deployment.heal()

    # ---- who -----------------------------------------------------------------------------------------------------

    def _choose(self, kind: str) -> Victim:
        with contextlib.suppress(SQLAlchemyError):  # the database may be the last victim
            match kind:
                case "trainer" | "supervisor":
                    return self._of_attempt(kind)
                case "node":
                    return self._node()
                case "scheduler":
                    return self._scheduler()
                case "api":
                    return self._api()
                case _:
                    return self._of_all(kind)
        return Victim(kind, kind, None, "nobody could say", busy=False)

    def _is_there(self, victim: Victim) -> bool:
        return victim.pid is not None or victim.kind in OTHERS

    def _api(self) -> Victim:
        asked, pid = self.workload.requests_lately(), self.deployment.program("api").pid
        return Victim("api", "api", pid, f"{asked} requests in the last second", pid is not None and asked > 0)

    def _of_attempt(self, kind: str) -> Victim:
        found = []
        for attempt in self._live():
            again = (kind, str(attempt.id)) in self._hit_already
            if (pids := self.deployment.pids(kind, attempt.id)) and not again:
                state = f"attempt {attempt.no} {attempt.state}, step {self.deployment.step(attempt.job_id)}"
                busy = attempt.state in ("running", "publishing") or kind == "supervisor"
                found.append(
                    Victim(kind, f"{kind} of {attempt.id}", pids[0], state, busy, str(attempt.job_id), str(attempt.id))
                )
        busy = [each for each in found if each.busy]
        return self._random.choice(busy or found or [Victim(kind, kind, None, "none runs", busy=False)])

    def _node(self) -> Victim:
        program = self._random.choice(self.deployment.of_kind("node"))
        lives = [each for each in self._live() if self.deployment.node_of(each.node_id) == program.name]
        state = f"{len(lives)} attempts" + "".join(f", {each.state}" for each in lives)
        busy = program.pid is not None and bool(lives)
        return Victim("node", program.name, program.pid, state, busy, place=program.name)

    def _scheduler(self) -> Victim:
        with self._look() as session:
            leader = session.execute(select(Leader.holder, Leader.epoch)).first()
        programs = self.deployment.of_kind("scheduler")
        leading = [each for each in programs if leader and each.pid and f"/{each.pid}/" in f"{leader.holder}/"]
        program = leading[0] if leading and self._random.random() < 0.85 else self._random.choice(programs)
        state = f"leading, epoch {leader.epoch}" if leader and program in leading else "following"
        busy = program in leading and bool(self.workload.live())
        return Victim("scheduler", program.name, program.pid, f"{state}, {len(self.workload.live())} jobs", busy)

    def _of_all(self, kind: str) -> Victim:
        """Servers and links carry every job that lives."""
        live = self._live()
        state = f"{len(self.workload.live())} jobs, {len(live) or 'no known'} attempts"
        pid = self.deployment.server_pid(kind) if kind in ("valkey", "postgres") else None
        up = pid is not None or kind not in ("valkey", "postgres")
        return Victim(kind, kind, pid, state, up and bool(self.workload.live()), place=self._whose(kind))

    def _whose(self, kind: str) -> str:
        """The program whose link is cut, or whose disk hangs; nobody's own is everybody's."""
        if kind == "disk":
            return self._random.choice(sorted(self.deployment.disks) or [""])
        return self.any_of(kind.partition("-")[0]).name if kind in LINKS and kind != "valkey-link" else ""

    # ---- how -----------------------------------------------------------------------------------------------------

    def _hit(self, victim: Victim, manner: str | None) -> tuple[str, float]:
        if victim.kind in LINKS:
            return self._cut(victim)
        if victim.kind == "flush":
            with contextlib.suppress(RedisError):
                Redis.from_url(self.deployment.redis_url, socket_timeout=2).flushall()
            return "FLUSHALL", 0
        if victim.kind == "backends":
            self.deployment.end_sessions()
            return "every session ended", 0
        if victim.kind == "disk":
            return self._freeze(victim)
        if victim.kind == "drain":
            return self._drain()
        if victim.kind == "budget":
            return self._run_out()
        if victim.pid is None:
            return "nobody to hit", 0
        if manner == "pause" or (manner is None and self._random.random() < _PAUSED_SHARE):
            return self._pause(victim)
        return self._kill(victim)

    def _kill(self, victim: Victim) -> tuple[str, float]:
        for_s = self._random.uniform(0, 2) if victim.kind in ("node", "scheduler", "api") else 0
        if for_s:
            program = self.deployment.program(victim.name)
            program.signal(signal.SIGKILL)
            self.later(for_s, program.start)
        else:
            _signal(victim.pid, signal.SIGKILL)
        return "SIGKILL", for_s

    def _freeze(self, victim: Victim) -> tuple[str, float]:
        if (disk := self.deployment.disks.get(victim.place)) is None:
            return "no disk to hang", 0
        for_s = self._scale * self._random.uniform(0.3, 4)
        if not disk.freeze():
            return "disk hangs already", 0
        self.later(for_s, disk.thaw)
        return "disk hangs", for_s

    def _drain(self) -> tuple[str, float]:
        """An operator empties a node, and gives it back after a while."""
        name = f"{self.any_of('node').name}-{self.deployment.fleet.database}"
        for_s = self._scale * self._random.uniform(1, 6)
        if not self.workload.drain(name):
            return "nobody took the order to drain", 0
        self.later(for_s, lambda: self.workload.take_back(name))
        return "drained", for_s

    def _run_out(self) -> tuple[str, float]:
        """An operator sets a budget that is used up, and lifts it after a while."""
        for_s = self._scale * self._random.uniform(3, 10)
        if (project_id := self.treasury.run_out()) is None:
            return "nobody took the order to set a budget", 0
        self.later(for_s, lambda: self.treasury.lift(project_id))
        return "budget used up", for_s

    def _pause(self, victim: Victim) -> tuple[str, float]:
        longest = 3 if victim.kind in ("postgres", "valkey") else 8
        for_s = self._scale * self._random.uniform(0.3, longest)
        _signal(victim.pid, signal.SIGSTOP)
        self.later(for_s, lambda: _signal(victim.pid, signal.SIGCONT))
        return "SIGSTOP", for_s

    def _cut(self, victim: Victim) -> tuple[str, float]:
        proxies = self.deployment.link(victim.kind, victim.place)
        for_s = self._scale * self._random.uniform(0.3, 6)
        http = victim.kind.endswith("s3")
        kinds: dict[str, Fault] = {
            "refuse": refuse(),
            "hold": hold(),
            "blackhole": blackhole(),
            "replies lost": blackhole("replies"),
            "latency": latency(0.2, 0.3),
        }
        if http:
            kinds |= {"503 SlowDown": http_error(503, SLOW_DOWN, fraction=0.8), "reset": reset(200, fraction=0.5)}
        name = self._random.choice(sorted(kinds))
        for proxy in proxies:
            proxy.set(kinds[name])
        self.later(for_s, lambda: [proxy.set(PASS) for proxy in proxies])
        return name, for_s

    # ---- looking -------------------------------------------------------------------------------------------------

    def _look(self) -> Any:
        return self.deployment.fleet.look()

    def _live(self) -> list[Attempt]:
        """Attempts that somebody holds; none while the database cannot say."""
        try:
            with self._look() as session:
                return list(session.scalars(select(Attempt).where(Attempt.state.in_(LIVE_ATTEMPT))))
        except SQLAlchemyError:  # the database may be the last victim
            return []

    def _weak(self) -> bool:
        """Three faults in a row without progress end a job, as promised: that rule is not what is tested here."""
        query = select(Job.id).where(
            Job.state.in_(("queued", "starting", "running")),
            Job.faults_without_progress >= MAX_FAULTS_WITHOUT_PROGRESS - 1,
        )
        try:
            with self._look() as session:
                return session.scalar(query) is not None
        except SQLAlchemyError:
            return False  # nobody can say; then the database itself is being hit


def summary(struck: list[Struck]) -> dict[str, Any]:
    """Counts by kind, and the share of busy victims."""
    kinds = Counter(each.victim.split(" of ")[0].rstrip("-12ab") for each in struck)
    return {
        "faults": len(struck),
        "busy_share": round(sum(each.busy for each in struck) / max(1, len(struck)), 3),
        "victims": dict(sorted(kinds.items())),
        "how": dict(sorted(Counter(each.how for each in struck).items())),
    }


def _signal(pid: int | None, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.kill(pid, number)
