"""Simulated time only: what the simulation does to jobs, and what a forecast says of their starts."""

import math
import uuid
from dataclasses import replace

from scheduler.forecast import forecast
from scheduler.simulation import End, Simulation, Work
from tests.test_policy import HOUR, NOW, A, B, job, node, project, running, world
from tunery.contracts.scheduling import PolicySettings, Snapshot

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


def test_a_forecast_knows_the_jobs_ahead_and_how_long_the_running_one_has_run():
    place = node(80)
    held = running(place, 0, project=B, limit_s=9 * HOUR)
    first, second = job(1, limit_s=9 * HOUR), job(2, limit_s=9 * HOUR)
    seen = world([place], [first, second], [held], settings=OFF)
    certain = forecast(seen, {held.job_id: (2 * HOUR, 2 * HOUR), first.id: (600, 600)})
    assert (certain[first.id].p50, certain[first.id].p90) == (NOW + HOUR, NOW + HOUR)
    assert certain[second.id].p90 == NOW + HOUR + 600
    vague = forecast(seen, {held.job_id: (2 * HOUR, 4 * HOUR), first.id: (600, 1200)})
    assert NOW + HOUR / 2 < vague[first.id].p50 < vague[first.id].p90
    assert vague[first.id].p50 + 300 < vague[second.id].p50
    assert vague == forecast(seen, {held.job_id: (2 * HOUR, 4 * HOUR), first.id: (600, 1200)})


def test_a_forecast_of_what_cannot_start_is_infinite_and_of_free_gpus_now():
    small, large = job(1), job(2, need=200)
    seen = world([node(80)], [small, large], settings=OFF)
    found = forecast(seen, {})
    assert (found[small.id].p50, found[large.id].p50) == (NOW, math.inf)


def test_a_forecast_looks_at_those_it_is_asked_about_and_no_further_than_allowed():
    jobs = [job(n, limit_s=HOUR) for n in range(30)]
    seen: Snapshot = replace(world([node(80)], jobs), settings=OFF)
    found = forecast(seen, {one.id: (60, 60) for one in jobs}, [jobs[2].id, uuid.uuid4()], passes=10)
    assert found.keys() == {jobs[2].id}
    assert found[jobs[2].id].p50 == NOW + 120
    far = forecast(seen, {one.id: (60, 60) for one in jobs}, passes=10)
    assert far[jobs[29].id].p90 == math.inf
