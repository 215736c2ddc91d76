"""The policy is a pure function; so are these tests. One small world each: what it decides, and what it says."""

import uuid
from dataclasses import replace
from typing import Any

from scheduler.policy import schedule
from tunery.contracts.scheduling import (
    GpuView,
    Hold,
    HoldKind,
    JobView,
    NodeView,
    PastPreemption,
    Plan,
    PolicySettings,
    PreemptKind,
    RunningView,
    Snapshot,
    Tenant,
    WaitCode,
)

GIB = 1 << 30
ORG, A, B = uuid.UUID(int=1), uuid.UUID(int=2), uuid.UUID(int=3)
NOW = 100_000.0
HOUR = 3600.0


def node(*sizes: int, slots: int = 8, name: str = "", gpu_class: str = "h100", **more: Any) -> NodeView:
    own = uuid.uuid4()
    gpus = tuple(GpuView(uuid.uuid4(), own, "H100", "cuda", size * GIB, size * GIB, gpu_class) for size in sizes)
    return NodeView(own, name or f"node-{own}", slots, gpus, **more)


def job(at: float = 0, need: int = 10, gpus: int = 1, project: uuid.UUID = A, **more: Any) -> JobView:
    return JobView(uuid.uuid4(), ORG, project, at, gpus, need * GIB, **more)


def running(place: NodeView, *which: int, project: uuid.UUID = A, since: float = HOUR, **more: Any) -> RunningView:
    """Holds these GPUs of the node, whole, for `since` seconds by now."""
    ids = tuple(place.gpus[one].id for one in which)
    size = place.gpus[which[0]].usable_bytes
    values: dict[str, Any] = {"limit_s": 2 * HOUR, "checkpoint_at": NOW - 60} | more
    return RunningView(
        uuid.uuid4(), uuid.uuid4(), ORG, project, place.id, ids, size, True, float(len(which)), NOW - since, **values
    )


def world(nodes: list[NodeView], jobs: list[JobView], held: list[RunningView] | None = None, **more: Any) -> Snapshot:
    """What is held is taken from its node's room."""
    taken = {gpu_id for one in held or [] for gpu_id in one.gpu_ids}
    shown = [
        replace(
            one,
            free_slots=one.free_slots - sum(other.node_id == one.id for other in held or []),
            gpus=tuple(replace(gpu, free_bytes=0) if gpu.id in taken else gpu for gpu in one.gpus),
        )
        for one in nodes
    ]
    return Snapshot(tuple(jobs), tuple(shown), NOW, tuple(held or []), **more)


def project(id: uuid.UUID, **more: Any) -> Tenant:
    return Tenant(id, ORG, active=True, **more)


def code(plan: Plan, one: JobView) -> WaitCode:
    return plan.reasons([one])[one.id].code


def test_the_oldest_of_a_project_starts_first_and_the_rest_say_why_they_wait():
    late, early = job(2), job(1)
    plan = schedule(world([node(80)], [late, early]))
    assert [start.job_id for start in plan.starts] == [early.id]
    assert code(plan, late) is WaitCode.BUSY


def test_priority_goes_before_age_inside_a_project_and_never_across():
    old, important, others = job(1), job(2, priority=5), job(3, project=B)
    served = project(A, service=0), project(B, service=50)
    plan = schedule(world([node(80)], [old, important, others], projects=served))
    assert [start.job_id for start in plan.starts] == [important.id]
    less = project(A, service=50), project(B, service=0)
    plan = schedule(world([node(80)], [old, important, others], projects=less))
    assert [start.job_id for start in plan.starts] == [others.id]


def test_an_operators_urgent_job_goes_before_every_projects():
    first, urgent = job(1), job(2, project=B, urgent=True)
    tenants = project(A), project(B, service=1e6)
    plan = schedule(world([node(80)], [first, urgent], projects=tenants))
    assert [start.job_id for start in plan.starts] == [urgent.id]


def test_two_idle_projects_that_come_at_once_share_evenly():
    """History alone would give the first one everything."""
    jobs = [job(0, project=one) for one in (A, B) for _ in range(40)]
    plan = schedule(world([node(*[80] * 8)], jobs, projects=(project(A), project(B))))
    assert len(plan.starts) == 8
    owner = {one.id: one.project_id for one in jobs}
    assert sum(owner[start.job_id] == A for start in plan.starts) == 4


def test_weights_divide_the_gpus():
    jobs = [job(0, project=one) for one in (A, B) for _ in range(40)]
    plan = schedule(world([node(*[80] * 8)], jobs, projects=(project(A, weight=3.0), project(B))))
    owner = {one.id: one.project_id for one in jobs}
    assert sum(owner[start.job_id] == A for start in plan.starts) == 6


def test_a_guarantee_is_served_before_shares():
    mine, theirs = job(2, project=A), job(1, project=B)
    tenants = project(A, service=1e6, guarantee=1), project(B)
    plan = schedule(world([node(80)], [mine, theirs], projects=tenants))
    assert [start.job_id for start in plan.starts] == [mine.id]


def test_a_cap_is_never_exceeded_and_blocks_nobody_else():
    jobs = [job(n, project=A) for n in range(3)] + [job(9, project=B)]
    plan = schedule(world([node(80, 80, 80)], jobs, projects=(project(A, cap=1), project(B))))
    assert {start.job_id for start in plan.starts} == {jobs[0].id, jobs[3].id}
    assert code(plan, jobs[1]) is WaitCode.PROJECT_CAP


def test_an_organizations_cap_holds_for_all_its_projects():
    jobs = [job(0, project=A), job(1, project=B)]
    plan = schedule(world([node(80, 80)], jobs, organizations=(Tenant(ORG, ORG, cap=1),)))
    assert len(plan.starts) == 1
    assert code(plan, jobs[1]) is WaitCode.ORGANIZATION_CAP


def test_no_more_run_at_once_than_a_project_may():
    jobs = [job(0), job(1)]
    plan = schedule(world([node(80, 80)], jobs, projects=(project(A, max_running=1),)))
    assert len(plan.starts) == 1
    assert code(plan, jobs[1]) is WaitCode.RUNNING_LIMIT


def test_a_blocked_project_starts_nothing_and_is_told_why():
    plan = schedule(world([node(80)], [one := job()], projects=(project(A, blocked="its budget"),)))
    assert not plan.starts
    assert dict(plan.reasons([one])[one.id].numbers) == {"why": "its budget"}


def test_the_smallest_device_that_is_large_enough_is_taken():
    both = node(80, 24)
    (start,) = schedule(world([both], [job(need=20)])).starts
    assert start.gpu_ids == (both.gpus[1].id,)


def test_a_gang_gets_all_its_gpus_on_one_node_or_none():
    first, second = node(80, 80), node(80, 80, 80)
    (start,) = schedule(world([first, second], [job(gpus=3)])).starts
    assert start.node_id == second.id
    assert len(set(start.gpu_ids)) == 3
    plan = schedule(world([first, node(80)], [one := job(gpus=3)]))
    assert not plan.starts
    assert code(plan, one) is WaitCode.TOO_LARGE


def test_a_class_and_labels_are_kept_to():
    cheap, fast = node(80, gpu_class="a100"), node(80, gpu_class="h100", labels=frozenset({("rack", "b")}))
    for asked in (job(gpu_class="h100"), job(labels=frozenset({("rack", "b")}))):
        (start,) = schedule(world([cheap, fast], [asked])).starts
        assert start.node_id == fast.id
    plan = schedule(world([cheap, fast], [one := job(gpu_class="b200")]))
    assert code(plan, one) is WaitCode.NO_SUCH_PLACE


def test_a_node_that_takes_no_work_explains_a_wait():
    plan = schedule(world([node(80, schedulable=False, why_not="cordoned")], [one := job()]))
    assert code(plan, one) is WaitCode.UNAVAILABLE
    assert dict(plan.reasons([one])[one.id].numbers)["why"] == "1 cordoned"
    assert code(schedule(world([], [one])), one) is WaitCode.NO_NODE


def test_jobs_of_one_project_share_a_gpu_where_both_agree():
    one, other, foreign = job(1, shareable=True), job(2, shareable=True), job(3, shareable=True, project=B)
    plan = schedule(world([node(80, slots=3)], [one, other, foreign]))
    assert {start.job_id for start in plan.starts} == {one.id, other.id}
    assert all(not start.exclusive and start.rate == 10 / 80 for start in plan.starts)
    alone = schedule(world([node(80)], [one, other], settings=PolicySettings(sharing=False)))
    assert len(alone.starts) == 1


def test_jobs_with_one_engine_key_join_one_base_where_engines_are_on():
    jobs = [job(n, need=40, engine_key="llama", engine_bytes=GIB) for n in range(3)]
    plan = schedule(world([node(80)], jobs, settings=PolicySettings(engines=True)))
    assert len({start.engine_id for start in plan.starts}) == 1
    assert [start.bytes_per_gpu for start in plan.starts] == [40 * GIB, GIB, GIB]
    assert len(schedule(world([node(80)], jobs)).starts) == 1
    apart = schedule(
        world([node(80)], jobs, projects=(project(A, dedicated=True),), settings=PolicySettings(engines=True))
    )
    assert len(apart.starts) == 1


# ---- backfill ----------------------------------------------------------------------------------------------------


def test_a_small_job_may_pass_a_blocked_gang_only_if_it_is_gone_in_time():
    place = node(80, 80)
    held = running(place, 0, project=B, limit_s=2 * HOUR)  # gone in an hour, and a grace
    pair, short, long = job(1, gpus=2), job(2, limit_s=HOUR), job(3, limit_s=2 * HOUR)
    plan = schedule(world([place], [pair, short, long], [held], settings=PolicySettings(preemption=False)))
    assert [start.job_id for start in plan.starts] == [short.id]
    (hold,) = plan.holds
    assert (hold.job_id, hold.kind, hold.promised_at) == (pair.id, HoldKind.GANG, NOW + HOUR + 120)
    assert code(plan, pair) is WaitCode.HOLDS
    plan = schedule(world([place], [pair, long], [held], settings=PolicySettings(preemption=False)))
    assert not plan.starts
    reason = plan.reasons([long])[long.id]
    assert reason.code is WaitCode.RESERVED
    assert dict(reason.numbers)["limit_s"] == HOUR


def test_a_gang_keeps_its_place_until_it_starts():
    place = node(80, 80)
    pair, other = job(1, gpus=2), job(0, project=B)
    hold = Hold(pair.id, HoldKind.GANG, "h100", place.id, (), NOW)
    least_served = project(A, service=1e6), project(B)
    (start,) = schedule(world([place], [pair, other], projects=least_served, holds=(hold,))).starts
    assert start.job_id == pair.id


def test_a_gang_that_finds_another_place_takes_no_other_gangs_promise():
    """The first of two held the other class; what became free early on the second's is still the second's."""
    fast, slow = node(80, 80, name="a"), node(80, 80, 80, gpu_class="a100", name="b")
    held = [running(fast, 0, 1, limit_s=2 * HOUR), running(slow, 2, limit_s=2 * HOUR)]
    first, second = job(1, gpus=2, limit_s=9 * HOUR), job(2, gpus=3)
    holds = (
        Hold(first.id, HoldKind.GANG, "h100", fast.id, (), NOW + HOUR),
        Hold(second.id, HoldKind.GANG, "a100", slow.id, (), NOW + HOUR + 120),
    )
    plan = schedule(world([fast, slow], [first, second], held, holds=holds))
    assert not plan.starts
    assert {hold.job_id: hold.promised_at for hold in plan.holds} == {one.job_id: one.promised_at for one in holds}


def test_a_promise_counts_what_the_promised_devices_cost():
    """On the cheap class it would be within the cap beside the small one; where it was promised it is not."""
    fast, slow = node(80, 80, name="a"), node(80, gpu_class="a100", name="b")
    slow = replace(slow, gpus=tuple(replace(gpu, cost=0.5) for gpu in slow.gpus))
    held = running(fast, 0, project=B, limit_s=2 * HOUR)
    pair, small = job(1, gpus=2), job(2, limit_s=9 * HOUR)
    plan = schedule(world([fast, slow], [pair, small], [held], projects=(project(A, cap=2), project(B))))
    assert not plan.starts
    assert code(plan, small) is WaitCode.RESERVED


def test_a_start_leaves_room_for_all_promises_together():
    """Beside each of the two gangs the small one would be within the cap; beside both it is not."""
    one, two, free = node(80, 80, name="a"), node(80, 80, gpu_class="a100", name="b"), node(80, name="c")
    held = [running(one, 0, project=B), running(two, 0, project=B)]
    gangs = [job(1, gpus=2, gpu_class=name) for name in ("h100", "a100")]
    holds = tuple(
        Hold(gang.id, HoldKind.GANG, place.gpus[0].gpu_class, place.id, (), NOW + HOUR + 120)
        for gang, place in zip(gangs, (one, two), strict=True)
    )
    small = job(2, limit_s=9 * HOUR)
    tenants = project(A, cap=4), project(B)
    plan = schedule(world([one, two, free], [*gangs, small], held, projects=tenants, holds=holds))
    assert not plan.starts
    assert code(plan, small) is WaitCode.RESERVED


def test_a_promise_is_for_a_time_at_which_the_earlier_promises_leave_room():
    """The devices of the second gang are free before the first starts; then three would run where two may."""
    one, two, other = node(80, 80, name="a"), node(80, 80, gpu_class="a100", name="b"), node(80, name="c")
    held = [
        running(one, 0, project=B, limit_s=2 * HOUR),
        running(two, 0, project=B, limit_s=3 * HOUR),
        running(other, 0, limit_s=4 * HOUR),
    ]
    first, second = job(1, gpus=2, gpu_class="a100", limit_s=9 * HOUR), job(2, gpus=2, limit_s=1.5 * HOUR)
    hold = Hold(first.id, HoldKind.GANG, "a100", two.id, (), NOW + 2 * HOUR + 120)
    tenants = project(A, max_running=2), project(B)
    plan = schedule(world([one, two, other], [first, second], held, projects=tenants, holds=(hold,)))
    promised = {hold.job_id: hold.promised_at for hold in plan.holds}
    assert promised == {first.id: NOW + 2 * HOUR + 120, second.id: NOW + 3 * HOUR + 120}


def test_a_promise_in_one_class_is_not_kept_with_devices_of_another():
    place = node(80, 80, 80, 80)
    slow = {gpu.id for gpu in place.gpus[2:]}
    mixed = replace(
        place, gpus=tuple(replace(gpu, gpu_class="a100" if gpu.id in slow else "h100") for gpu in place.gpus)
    )
    fast = [mixed.gpus.index(gpu) for gpu in mixed.gpus if gpu.gpu_class == "h100"]
    other = [mixed.gpus.index(gpu) for gpu in mixed.gpus if gpu.gpu_class == "a100"]
    held = [
        running(mixed, fast[0], project=B, limit_s=2 * HOUR),
        running(mixed, other[0], project=B, limit_s=9 * HOUR),
    ]
    pair, filler = job(1, gpus=2), job(2, limit_s=20 * HOUR, gpu_class="h100")
    plan = schedule(world([mixed], [pair, filler], held, settings=PolicySettings(preemption=False)))
    assert not plan.starts
    (hold,) = plan.holds
    assert (hold.job_id, hold.gpu_class, hold.promised_at) == (pair.id, "h100", NOW + HOUR + 120)


def test_a_held_gang_is_told_so_whatever_others_of_its_kind_ask_for():
    place = node(80, 80)
    held = running(place, 0, project=B)
    first, longer = job(1, gpus=2, limit_s=HOUR), job(0, gpus=2, limit_s=2 * HOUR)
    hold = Hold(first.id, HoldKind.GANG, "h100", place.id, (), NOW + HOUR)
    plan = schedule(world([place], [first, longer], [held], holds=(hold,), settings=PolicySettings(preemption=False)))
    assert (code(plan, first), code(plan, longer)) == (WaitCode.HOLDS, WaitCode.BUSY)


def test_jobs_that_can_never_start_keep_none_behind_them_out():
    hopeless = [job(n, gpus=2) for n in range(3)] + [job(n, need=99) for n in range(3)]
    last = job(9)
    plan = schedule(world([node(80)], [*hopeless, last], settings=PolicySettings(depth=2)))
    assert [start.job_id for start in plan.starts] == [last.id]


# ---- pre-emption --------------------------------------------------------------------------------------------------


def test_a_guarantee_is_reclaimed_from_whoever_has_more_than_its_own():
    place = node(80)
    held = running(place, 0, project=B)
    tenants = project(A, guarantee=1, service=1e6), project(B)
    plan = schedule(world([place], [one := job()], [held], projects=tenants))
    (asked,) = plan.preempts
    assert (asked.attempt_id, asked.for_job, asked.kind) == (held.attempt_id, one.id, PreemptKind.GUARANTEE)
    (hold,) = plan.holds
    assert (hold.kind, hold.gpu_ids, hold.promised_at) == (HoldKind.PREEMPTION, held.gpu_ids, NOW + 120)
    assert code(plan, one) is WaitCode.PREEMPTING
    safe = project(A, guarantee=1), project(B, guarantee=1)
    assert not schedule(world([place], [one], [held], projects=safe)).preempts


def test_what_was_freed_for_a_job_goes_to_nobody_else():
    place = node(80)
    beneficiary, other = job(5, project=A), job(0, project=B)
    hold = Hold(beneficiary.id, HoldKind.PREEMPTION, "h100", place.id, (place.gpus[0].id,), NOW + 60)
    tenants = project(A, service=1e6), project(B)
    waits = schedule(
        world([place], [beneficiary, other], [running(place, 0, stopping=True)], projects=tenants, holds=(hold,))
    )
    assert waits.holds == (hold,)
    (start,) = schedule(world([place], [beneficiary, other], projects=tenants, holds=(hold,))).starts
    assert start.job_id == beneficiary.id
    gone = schedule(world([place], [other], projects=tenants, holds=(hold,)))
    assert [start.job_id for start in gone.starts] == [other.id]
    assert not gone.holds


def test_a_share_is_evened_out_only_while_the_other_stays_no_worse_off():
    place = node(80, 80)
    both = [running(place, 0, project=B), running(place, 1, project=B, since=2 * HOUR, limit_s=9 * HOUR)]
    ahead = project(A, service=10), project(B, service=1e6)
    plan = schedule(world([place], [one := job()], both, projects=ahead))
    assert [asked.kind for asked in plan.preempts] == [PreemptKind.FAIR_SHARE]
    assert plan.preempts[0].for_job == one.id
    alone = node(80)
    only = running(alone, 0, project=B)
    assert not schedule(world([alone], [one], [only], projects=ahead)).preempts  # 1 against 0 afterwards
    served = project(A, service=2e6), project(B, service=1e6)
    assert not schedule(world([place], [one], both, projects=served)).preempts


def test_a_gang_is_broken_up_for_a_gang_of_its_size_and_for_a_guarantee_never_for_a_little_fairness():
    first, second = node(80, 80, name="a"), node(80, 80, name="b")
    gangs = [running(first, 0, 1, project=B), running(second, 0, 1, project=B)]
    ahead = project(A, service=10), project(B, service=1e6)
    assert not schedule(world([first, second], [job()], gangs, projects=ahead)).preempts
    assert len(schedule(world([first, second], [job(gpus=2)], gangs, projects=ahead)).preempts) == 1
    entitled = project(A, service=10, guarantee=1), project(B, service=1e6)
    (asked,) = schedule(world([first, second], [job()], gangs, projects=entitled)).preempts
    assert asked.kind is PreemptKind.GUARANTEE


def test_who_may_not_be_moved_is_not():
    place = node(80)
    tenants = project(A, guarantee=1), project(B)
    for more in (
        {"since": 600.0},
        {"overhead_s": HOUR},
        {"preemptible": False},
        {"preemptions": 3},
        {"stopping": True},
    ):
        held = running(place, 0, project=B, **more)
        assert not schedule(world([place], [job()], [held], projects=tenants)).preempts, more
    held = running(place, 0, project=B)
    past = (PastPreemption(B, A, NOW - HOUR),)
    assert not schedule(world([place], [job()], [held], projects=tenants, preemptions=past)).preempts
    off = PolicySettings(preemption=False)
    assert not schedule(world([place], [job()], [held], projects=tenants, settings=off)).preempts
    assert schedule(world([place], [job()], [held], projects=tenants)).preempts


def test_nobody_is_moved_for_devices_that_the_beneficiary_may_not_have():
    """Within its cap on the cheap class only; room on the dear one would be made again and again."""
    fast, slow = node(80, 80, name="a"), node(80, 80, gpu_class="a100", name="b")
    slow = replace(slow, gpus=tuple(replace(gpu, cost=0.5) for gpu in slow.gpus))
    held = [running(fast, 0, 1, project=B), running(slow, 0, 1, project=B, preemptible=False)]
    tenants = project(A, guarantee=1, cap=1), project(B)
    assert not schedule(world([fast, slow], [job(gpus=2)], held, projects=tenants)).preempts


def test_nobody_is_moved_who_is_not_needed_and_the_least_loss_goes_first():
    place = node(80, 80, 80)
    late = running(place, 0, project=B, checkpoint_at=NOW - 3000)
    saved = running(place, 1, project=B, checkpoint_at=NOW - 1)
    pair = running(place, 2, project=B, checkpoint_at=NOW - 2000)
    tenants = project(A, guarantee=1), project(B)
    plan = schedule(world([place], [job()], [late, saved, pair], projects=tenants))
    assert [asked.attempt_id for asked in plan.preempts] == [saved.attempt_id]


# ---- idle time banks nothing --------------------------------------------------------------------------------------


def test_a_project_that_wakes_up_starts_level_with_the_least_served():
    tenants = Tenant(A, ORG, service=10, active=False), project(B, service=5000)
    plan = schedule(world([], [job(project=A), job(project=B)], projects=tenants))
    assert [(one.id, one.active, one.credit) for one in plan.projects] == [(A, True, 4990)]


def test_the_order_of_rows_does_not_matter():
    nodes = [node(80, 80, name="a"), node(80, 24, name="b")]
    jobs = [job(n % 3, need=10 + n, gpus=1 + n % 2, project=(A, B)[n % 2]) for n in range(9)]
    held = [running(nodes[0], 0, project=B)]
    one = schedule(world(nodes, jobs, held))
    other = schedule(world(nodes[::-1], jobs[::-1], held))
    assert one == other


def test_a_key_says_nothing_while_engines_are_off():
    jobs = [job(n, need=10 + n, engine_key="llama", engine_bytes=GIB) for n in range(3)]
    plan = schedule(world([node(80)], jobs, projects=(project(A, cap=1),)))
    assert len(plan.starts) == 1
    assert {code(plan, one) for one in jobs[1:]} == {WaitCode.PROJECT_CAP}
    assert len(plan.explanations) == 1


# ---- reasons -----------------------------------------------------------------------------------------------------


def test_where_only_dearer_devices_are_free_the_cap_is_told_not_a_reservation():
    cheap, dear = node(80, gpu_class="a100"), node(80)
    dear = replace(dear, gpus=tuple(replace(gpu, cost=4.0) for gpu in dear.gpus))
    held = running(cheap, 0, project=B)
    plan = schedule(world([cheap, dear], [one := job()], [held], projects=(project(A, cap=2), project(B))))
    reason = plan.reasons([one])[one.id]
    assert reason.code is WaitCode.PROJECT_CAP
    assert dict(reason.numbers) == {"used": 0.0, "cap": 2, "needs": 1.0, "counts": 4.0}


def test_a_project_is_told_when_a_place_is_free_for_it_not_for_another_with_limits():
    cheap, dear = node(80, 80, 80, gpu_class="a100"), node(80)
    dear = replace(dear, gpus=tuple(replace(gpu, cost=4.0) for gpu in dear.gpus))
    held = [running(cheap, n, limit_s=6 * HOUR) for n in range(3)]
    held.append(running(dear, 0, project=B, limit_s=2 * HOUR))
    limited, free = job(1), job(2, project=B)
    tenants, calm = (project(A, cap=4), project(B)), PolicySettings(preemption=False)
    plan = schedule(world([cheap, dear], [limited, free], held, projects=tenants, settings=calm))
    told = {one: dict(plan.reasons([one])[one.id].numbers)["free_at"] for one in (limited, free)}
    assert told[limited] - told[free] == 4 * HOUR
