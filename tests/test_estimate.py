"""Estimates of memory and time: the closed forms against known figures, and the rules of their correction."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunery.contracts.spec import LoraSpec, Recipe, TrainingArgs
from tunery.estimate import correction, memory, places, time
from tunery.estimate.correction import PRIOR_RUNS, Seen, after_out_of_memory, factor, reservation, tail_mean
from tunery.estimate.memory import Method, closed_form, lora_parameters, of_recipe
from tunery.estimate.places import Ask, Device
from tunery.estimate.time import token_flops

GIB, MIB = 1 << 30, 1 << 20
LLAMA_8B: dict[str, Any] = {
    "parameters": 8_030_261_248, "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM_135M: dict[str, Any] = {
    "parameters": 134_515_008, "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536,
    "vocab_size": 49152, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
}  # fmt: skip
RANK_16 = LoraSpec(r=16)
RATIOS = st.lists(st.floats(0.05, 10), min_size=1, max_size=60)
ESTIMATES = st.integers(GIB, 80 * GIB)


# ---- memory -------------------------------------------------------------------------------------------------------


def test_parameters_of_an_adapter_are_pefts_count() -> None:
    assert lora_parameters(LLAMA_8B, RANK_16) == 41_943_040
    assert lora_parameters(SMOLLM_135M, RANK_16) == 4_884_480
    assert lora_parameters(LLAMA_8B, LoraSpec(r=16, target_modules=("q_proj", "v_proj"))) == 6_815_744
    assert lora_parameters(LLAMA_8B, LoraSpec(r=16, target_modules=("elsewhere",))) == 41_943_040, "at most all"


@pytest.mark.parametrize(
    ("method", "tokens", "checkpointing", "measured_gb"),
    # one H100, 2 x 2048 tokens, rank 16: TRL, TRL without checkpointing, and TRL over NF4
    [(Method.LORA, 4096, True, 19.3), (Method.LORA, 4096, False, 45.9), (Method.QLORA, 4096, True, 16.3)],
)
def test_the_closed_form_is_near_what_was_measured(
    method: Method, tokens: int, checkpointing: bool, measured_gb: float
) -> None:
    form = closed_form(LLAMA_8B, method=method, trained=41_943_040, tokens=tokens, checkpointing=checkpointing)
    assert 0.5 * measured_gb < form.total / 1e9 < 1.25 * measured_gb


def test_weights_by_method_and_precision() -> None:
    def weights(method: Method, **how: Any) -> float:
        return closed_form(LLAMA_8B, method=method, trained=0, tokens=1, **how).weights / 1e9

    assert weights(Method.LORA) == pytest.approx(16.06, abs=0.01)
    assert weights(Method.LORA, kind="cpu") == weights(Method.LORA, precision="fp32") == 2 * weights(Method.LORA)
    assert weights(Method.QLORA) == pytest.approx(5.7, abs=0.1)
    full = closed_form(LLAMA_8B, method=Method.FULL, trained=LLAMA_8B["parameters"], tokens=1)
    assert full.total / LLAMA_8B["parameters"] == pytest.approx(16, abs=0.2)


def test_what_an_engine_counts_once_is_not_a_jobs_own() -> None:
    form = of_recipe(LLAMA_8B, Recipe(), 4000)
    assert form.own == form.trainable + form.activations + form.head
    assert form.total - form.own == form.weights + memory.CONTEXT_BYTES


def test_longer_rows_and_larger_batches_need_more_up_to_the_cut() -> None:
    def total(row_bytes: int, batch: int = 4) -> int:
        training = TrainingArgs(per_device_train_batch_size=batch, max_length=1024)
        return of_recipe(SMOLLM_135M, Recipe(training=training), row_bytes).total

    assert total(100) < total(1000) < total(2048) == total(1_000_000)
    assert total(1000, batch=1) < total(1000, batch=4)


def test_the_demo_fits_a_small_machine() -> None:
    recipe = Recipe(adapter=LoraSpec(r=8), training=TrainingArgs(per_device_train_batch_size=4))
    needed = of_recipe(SMOLLM_135M, recipe, 400, kind="cpu").total
    assert needed > 1.5 * GIB and reservation(needed, Seen()) < 4 * GIB


# ---- correction ---------------------------------------------------------------------------------------------------


def seen(ratios: list[float], largest: int = 0) -> Seen:
    return Seen(samples=len(ratios), tail=tail_mean(ratios), largest_bytes=largest)


@given(ESTIMATES, RATIOS)
def test_never_below_the_largest_peak_of_its_like_and_a_margin(estimate: int, ratios: list[float]) -> None:
    largest = round(max(ratios) * estimate)
    assert reservation(estimate, seen(ratios, largest)) >= largest + max(512 * MIB, 0.03 * largest) - 1


@given(RATIOS, RATIOS)
def test_the_factor_is_bounded_and_follows_the_ratios(ratios: list[float], more: list[float]) -> None:
    assert 0.5 <= factor(seen(ratios)) <= 2
    worse = [ratio + extra for ratio, extra in zip(ratios, more, strict=False)] + ratios[len(more) :]
    assert factor(seen(worse)) >= factor(seen(ratios)) - 1e-9


@given(ESTIMATES, ESTIMATES, RATIOS)
def test_more_asked_is_never_less_reserved(one: int, other: int, ratios: list[float]) -> None:
    low, high = sorted((one, other))
    assert reservation(low, seen(ratios)) <= reservation(high, seen(ratios))


@given(st.lists(st.floats(0.05, 10), max_size=60), st.floats(0.01, 10))
def test_one_run_cannot_halve_what_the_others_say(ratios: list[float], one: float) -> None:
    """Down it goes slowly; up it may go at once, which is the safe side."""
    assert factor(seen([*ratios, one])) >= factor(seen(ratios)) / 1.5


@given(st.floats(0.5, 2), st.integers(30, 50))
def test_many_runs_are_believed(ratio: float, runs: int) -> None:
    assert factor(seen([ratio] * runs)) == pytest.approx(ratio, rel=0.11)


@given(st.floats(0.01, 10), st.integers(0, 50))
def test_runs_of_other_models_may_warn_but_not_reassure(tail: float, runs: int) -> None:
    assert 1 <= factor(Seen(elsewhere=runs, elsewhere_tail=tail)) <= 2


def test_nothing_seen_is_the_estimate_and_its_margin() -> None:
    assert factor(Seen()) == 1.0 and tail_mean([]) == 1.0
    assert reservation(20 * GIB, Seen()) == math.ceil(1.15 * 20 * GIB)
    assert reservation(GIB, Seen()) == GIB + 512 * MIB


def test_a_tail_is_the_worst_fifth() -> None:
    assert tail_mean([1.0, 1.0, 1.0, 1.5]) == 1.5, "at least one"
    assert tail_mean([0.6] * 8 + [1.0, 2.0]) == 1.5
    assert tail_mean([9.0] + [1.0] * 4) == 2.0, "no run counts for more than twice"


def test_one_bad_run_of_many_moves_little() -> None:
    assert factor(seen([1.0] * 40 + [2.0])) < 1.15


@given(ESTIMATES, st.integers(0, 200 * GIB))
def test_a_second_try_gets_more_than_the_first_had_and_held(reserved: int, peak: int) -> None:
    assert after_out_of_memory(reserved, peak) >= max(1.5 * reserved, 1.15 * peak)


def test_what_the_rule_says_is_what_the_code_has() -> None:
    assert (correction.LEAST, correction.MOST, PRIOR_RUNS, correction.TAIL_SHARE) == (0.5, 2.0, 3, 0.2)


# ---- places -------------------------------------------------------------------------------------------------------


def test_a_place_is_one_node() -> None:
    fleet = [Device(1, "a", "cuda", 40), Device(1, "a", "cuda", 80), Device(2, "b", "cuda", 24, {"rack": "x"})]
    assert places.largest_place(fleet, Ask()) == 80
    assert places.largest_place(fleet, Ask(2)) == 40 and places.largest_place(fleet, Ask(3)) is None
    assert places.largest_place(fleet, Ask(gpu_class="b")) == 24
    assert places.largest_place(fleet, Ask(labels={"rack": "x"})) == 24
    assert places.largest_place(fleet, Ask(gpu_class="a", labels={"rack": "x"})) is None


# ---- time ---------------------------------------------------------------------------------------------------------


def test_flops_of_a_token_are_the_usual_count() -> None:
    assert token_flops(LLAMA_8B, Method.LORA, 41_943_040) / 1e9 == pytest.approx(30.3, abs=0.1)  # 4 N + 6 N_lora
    assert token_flops(LLAMA_8B, Method.FULL) / 1e9 == pytest.approx(45.0, abs=0.1)
    assert token_flops(SMOLLM_135M, Method.LORA) / 1e9 == pytest.approx(0.54, abs=0.01)


@pytest.mark.parametrize(
    ("card", "gpu_class", "kind", "tokens", "measured_s"),
    [
        (LLAMA_8B, "h100-80gb", "cuda", 1_000_000, 160),  # TRL, 6,242 tokens/s
        (LLAMA_8B, "h100-80gb", "cuda", 1_000_000, 685),  # TRL's defaults on short rows, 1,460 tokens/s
        (SMOLLM_135M, "cpu", "cpu", 10_000, 45),  # two cores
    ],
)
def test_measured_times_lie_within_the_spread(
    card: dict[str, Any], gpu_class: str, kind: memory.Kind, tokens: int, measured_s: float
) -> None:
    flops = tokens * token_flops(card, Method.LORA)
    guess = time.training(flops, tokens // 4096, gpu_class, kind)
    assert guess.p50 / 2 < measured_s < guess.p90


def test_more_gpus_take_less_and_an_unknown_gpu_is_no_h100() -> None:
    one, two = (time.training(1e18, 10, "h100-80gb", "cuda", gpus) for gpus in (1, 2))
    assert two.p50 == pytest.approx(one.p50 / 2)
    assert time.training(1e18, 10, "unclassified", "cuda").p50 > 5 * one.p50


@given(st.floats(0.001, 1e6), st.floats(0, 1e6), st.integers(1, 1000))
def test_few_runs_say_little_about_the_worst(p50: float, extra: float, samples: int) -> None:
    told = time.measured(p50, p50 + extra, samples)
    assert told.p90 >= p50 + extra and told.p90 >= p50 * (1 + samples**-0.5) - 1e-9
