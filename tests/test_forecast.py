"""Simulated time only: what the simulation does to jobs, and what a forecast says of their starts."""

import uuid

from scheduler.forecast import Expected, forecast, what_if
from scheduler.simulation import End, Simulation, Work
from tests.test_policy import HOUR, NOW, A, B, job, node, project, running, world
from tunery.contracts.scheduling import PolicySettings, Snapshot
from tunery.forecasts import Arrival, Question

OFF = PolicySettings(preemption=False)


def test_jobs_start_when_those_before_them_end_and_the_service_is_what_they_used():
    place, jobs = node(80), [job(n, limit_s=HOUR) for n in range(3)]
    sim = Simulation(world([place], jobs, projects=(project(A),), settings=OFF), {one.id: Work(100) for one in jobs})
    sim.run()
    assert [sim.fates[one.id].starts for one in jobs] == [[NOW], [NOW + 100], [NOW + 200]]
    assert sim.service(A) == 300
    assert all(fate.end is End.DONE and fate.lost == 0 for fate in sim.fates.values())


def test_a_job_that_runs_into_its_limit_is_stopped_there():
    one = job(limit_s=500)
    sim = Simulation(world([node(80)], [one], settings=OFF), {one.id: Work(1000, stop_s=30)})
    sim.run()
    assert (sim.fates[one.id].end, sim.fates[one.id].ended_at) == (End.LIMIT, NOW + 530)


def test_a_lost_node_costs_what_lies_behind_the_newest_checkpoint():
    place, one = node(80), job(limit_s=9 * HOUR)
    work = {one.id: Work(1000, load_s=50, checkpoint_s=300)}
    sim = Simulation(world([place], [one], projects=(project(A),), settings=OFF), work)
    sim.lose(place.id, NOW + 450, NOW + 2000)  # 400 s of training, 300 of them stored
    sim.run()
    fate = sim.fates[one.id]
    assert (fate.starts, fate.faults, fate.lost) == ([NOW, NOW + 2000], 1, 150)
    assert fate.ended_at == NOW + 2000 + 50 + 700
    assert sim.service(A) == 450 + 750 - 150


def test_who_is_moved_off_loses_only_the_loading_and_the_stop():
    place, held = node(80), None
    held = running(place, 0, project=B, limit_s=9 * HOUR)
    tenants = project(A, guarantee=1, service=1e6), project(B)
    urgent = job(limit_s=HOUR)
    work = {held.job_id: Work(2 * HOUR, stop_s=20), urgent.id: Work(600)}
    sim = Simulation(world([place], [urgent], [held], projects=tenants), work)
    sim.run()
    assert sim.fates[urgent.id].starts == [NOW + 20]
    moved = sim.fates[held.job_id]
    assert (moved.preempted, moved.lost) == (1, 20)
    assert moved.starts == [NOW - HOUR, NOW + 620]
    assert moved.ended_at == NOW + 620 + HOUR
    assert [asked.job_id for _, asked in sim.preempts] == [held.job_id]


def test_a_cancelled_job_gives_its_gpus_back():
    place, first, second = node(80), job(1), job(2)
    both = {one.id: Work(1000, stop_s=10) for one in (first, second)}
    sim = Simulation(world([place], [first, second], settings=OFF), both)
    sim.cancel(first.id, NOW + 100)
    sim.run()
    assert sim.fates[first.id].end is End.CANCELLED
    assert sim.fates[second.id].starts == [NOW + 110]


def starts(seen: Snapshot, expected_s: Expected, of: uuid.UUID = A) -> list[tuple[float | None, float | None]]:
    return [(one.start_p50, one.start_p90) for one in forecast(seen, expected_s)[of].jobs.values()]


def test_a_forecast_knows_the_jobs_ahead_and_what_runs():
    place = node(80)
    held = running(place, 0, project=B, limit_s=9 * HOUR)
    first, second = job(1, limit_s=9 * HOUR), job(2, limit_s=9 * HOUR)
    seen = world([place], [second, first], [held], settings=OFF)
    certain = starts(seen, {held.job_id: (HOUR, HOUR), first.id: (600, 600)})
    assert certain == [(NOW + HOUR, NOW + HOUR), (NOW + HOUR + 600, NOW + HOUR + 600)]
    expected_s = {held.job_id: (HOUR, 3 * HOUR), first.id: (600, 1200)}
    [(one_p50, one_p90), (other_p50, other_p90)] = starts(seen, expected_s)
    assert NOW + HOUR / 2 < one_p50 < NOW + 2 * HOUR < one_p90 < NOW + 6 * HOUR
    assert one_p50 + 300 < other_p50 and one_p90 < other_p90
    assert starts(seen, expected_s) == [(one_p50, one_p90), (other_p50, other_p90)]


def test_positions_count_the_jobs_of_others_and_say_no_more():
    jobs = [job(n, project=(A, B)[n % 2], limit_s=HOUR) for n in range(4)]
    found = forecast(world([node(80)], jobs, settings=OFF), {})
    ahead = [
        (one.position, one.ahead_own, one.ahead_others) for one in (*found[A].jobs.values(), *found[B].jobs.values())
    ]
    assert sorted(ahead) == [(1, 0, 0), (2, 0, 1), (3, 1, 1), (4, 1, 2)]
    assert found[A].jobs.keys() == {one.id for one in jobs if one.project_id == A}


def test_what_cannot_start_has_no_time_and_what_may_start_at_once_has_this_one():
    small, large = job(1), job(2, need=200)
    found = forecast(world([node(80)], [small, large], settings=OFF), {})[A].jobs
    assert (found[small.id].start_p50, found[small.id].start_p90) == (NOW, NOW)
    assert found[large.id].start_p50 is found[large.id].not_before is None
    assert found[large.id].position == 2


def test_those_behind_the_first_are_told_a_time_before_which_they_do_not_start():
    jobs = [job(n, limit_s=HOUR) for n in range(12)]
    expected_s = {one.id: (600.0, 600.0) for one in jobs}
    found = forecast(world([node(80)], jobs, settings=OFF), expected_s, told=5)[A]
    assert found.jobs.keys() == {one.id for one in jobs[:5]}
    assert (found.beyond.position, found.beyond.ahead_own) == (6, 5)
    assert NOW + 4 * 600 <= found.beyond.not_before <= NOW + 5 * 600
    certain = forecast(world([node(80)], jobs, settings=OFF), expected_s)[A].jobs
    assert all(certain[one.id].start_p50 >= found.beyond.not_before for one in jobs[5:])


def test_a_forecast_without_time_says_only_what_it_has_seen():
    jobs = [job(n, limit_s=HOUR) for n in range(40)]
    found = forecast(world([node(80)], jobs, settings=OFF), {}, budget_s=0)[A].jobs
    assert found[jobs[0].id].start_p50 == NOW
    assert found[jobs[39].id].start_p50 is None and found[jobs[39].id].not_before >= NOW


def test_jobs_like_those_of_the_last_day_are_expected_again():
    """A project that has had nothing goes before one that has had much."""
    held = running(place := node(80), 0, project=A, limit_s=9 * HOUR)
    mine = job(1, limit_s=HOUR)
    tenants = project(A, service=1e6), project(B)
    seen = world([place], [mine], [held], projects=tenants, settings=OFF)
    recent = [Arrival(job(NOW - n * 300, project=B, limit_s=HOUR), (HOUR, HOUR)) for n in range(1, 200)]
    expected_s = {held.job_id: (HOUR, HOUR), mine.id: (600.0, 600.0)}
    alone = forecast(seen, expected_s)[A].jobs[mine.id]
    crowded = forecast(seen, expected_s, recent)[A].jobs[mine.id]
    assert alone.start_p90 == NOW + HOUR
    assert crowded.start_p90 is not None and crowded.start_p90 >= NOW + 2 * HOUR
    assert crowded.position == alone.position == 1


def test_what_if_answers_in_steps_of_five_minutes_and_says_why():
    place = node(80, 80)
    held = running(place, 0, project=B, limit_s=9 * HOUR)
    asked = job(0, gpus=2, limit_s=HOUR)
    seen = world([place], [], [held], settings=OFF)
    answer = what_if(seen, {held.job_id: (1234, 1234)}, Question(asked.id, asked, (600, 600)))
    assert (answer.forecast.start_p50, answer.forecast.start_p90) == (1500, 1500)
    assert (answer.forecast.position, answer.reason["code"]) == (1, "holds")
    assert answer.reason["numbers"]["by"] % 300 == 0
    free = what_if(seen, {held.job_id: (1234, 1234)}, Question(asked.id, job(0), (600, 600)))
    assert (free.forecast.start_p50, free.forecast.start_p90, free.reason) == (0, 0, None)
    never = what_if(seen, {}, Question(asked.id, job(0, need=500), (600, 600)))
    assert (never.forecast.start_p50, never.reason["code"]) == (None, "too_large")
