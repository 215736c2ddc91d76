"""The policy is a pure function; so are these tests."""

import uuid

from hypothesis import given
from hypothesis import strategies as st

from scheduler.policy import schedule
from tunery import waiting
from tunery.contracts.scheduling import GpuView, JobView, NodeView, Snapshot

GIB = 1 << 30


def gpu(node: uuid.UUID, size: int, used: int = 0) -> GpuView:
    return GpuView(uuid.uuid4(), node, "H100", "cuda", size * GIB, (size - used) * GIB)


def node(*sizes: int, slots: int = 8, used: int = 0) -> NodeView:
    own = uuid.uuid4()
    return NodeView(own, f"node-{own}", slots, tuple(gpu(own, size, used) for size in sizes))


def job(at: float, need: int = 10, gpus: int = 1) -> JobView:
    return JobView(uuid.uuid4(), uuid.uuid4(), uuid.uuid4(), at, gpus, need * GIB)


def test_the_oldest_starts_first_and_the_rest_say_why_they_wait():
    late, early = job(2), job(1)
    plan = schedule(Snapshot((late, early), (node(80),)))
    assert [start.job_id for start in plan.starts] == [early.id]
    (wait,) = plan.waits
    assert wait.job_id == late.id
    said = waiting.message(wait.reason)
    assert said == "needs 1 x 10.0 GiB; 1 of 1 suitable devices are busy and 0 waiting jobs are ahead"


def test_the_smallest_device_that_is_large_enough_is_taken():
    both = node(80, 24)
    (start,) = schedule(Snapshot((job(1, need=20),), (both,))).starts
    assert start.gpu_ids == (both.gpus[1].id,)


def test_what_fits_nowhere_says_what_the_largest_device_has():
    (wait,) = schedule(Snapshot((job(1, need=100),), (node(80), node(24)))).waits
    assert "the largest device that is up has 80.0 GiB" in waiting.message(wait.reason)


def test_with_no_node_up_a_job_says_so():
    (wait,) = schedule(Snapshot((job(1),), ())).waits
    assert "no node is up" in waiting.message(wait.reason)


def test_a_younger_small_job_does_not_overtake_an_older_one_that_waits_for_the_same_node():
    busy = node(80, 80, used=0)
    busy = NodeView(busy.id, busy.name, 8, (busy.gpus[0], gpu(busy.id, 80, used=80)))
    pair, single = job(1, gpus=2), job(2)
    assert not schedule(Snapshot((pair, single), (busy,))).starts


def test_but_it_may_start_where_the_older_one_could_never_run():
    big, small = node(80, used=80), node(24)
    huge, little = job(1, need=60), job(2, need=10)
    (start,) = schedule(Snapshot((huge, little), (big, small))).starts
    assert start.job_id == little.id
    assert start.node_id == small.id


nodes_strategy = st.lists(
    st.builds(
        lambda sizes, slots, used: node(*sizes, slots=slots, used=used),
        st.lists(st.sampled_from([24, 48, 80]), min_size=1, max_size=4),
        st.integers(0, 4),
        st.sampled_from([0, 24]),
    ),
    max_size=4,
)
jobs_strategy = st.lists(st.builds(job, st.floats(0, 100), st.integers(1, 100), st.integers(1, 3)), max_size=12)


@given(nodes_strategy, jobs_strategy)
def test_no_plan_ever_overcommits_a_gpu_or_a_slot_and_every_job_gets_one_answer(nodes, jobs):
    snapshot = Snapshot(tuple(jobs), tuple(nodes))
    plan = schedule(snapshot)
    starts = plan.starts
    answered = [start.job_id for start in starts] + [wait.job_id for wait in plan.waits]
    assert sorted(answered) == sorted(job.id for job in jobs)
    taken = [gpu_id for start in starts for gpu_id in start.gpu_ids]
    assert len(taken) == len(set(taken))
    by_id = {gpu.id: gpu for node in nodes for gpu in node.gpus}
    for start in starts:
        assert {by_id[gpu_id].node_id for gpu_id in start.gpu_ids} == {start.node_id}
        assert all(
            by_id[gpu_id].free_bytes == by_id[gpu_id].usable_bytes >= start.bytes_per_gpu for gpu_id in start.gpu_ids
        )
    for place in nodes:
        assert sum(start.node_id == place.id for start in starts) <= place.free_slots
    assert schedule(snapshot) == plan
