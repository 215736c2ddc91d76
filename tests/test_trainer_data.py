"""Which tokens are trained: exact ids, for every shape of row."""

import pytest

from tests.tiny_model import GENERATION_TEMPLATE, PLAIN_TEMPLATE, tiny_tokenizer
from trainer.data import IGNORED, prepare, question
from trainer.failures import TrainingFailed
from tunery.states import FailureCode

CODE = FailureCode.INVALID_TRAINING_FILE


@pytest.fixture(scope="module", params=[PLAIN_TEMPLATE, GENERATION_TEMPLATE], ids=["prefixes", "generation"])
def tokenizer(request):
    return tiny_tokenizer(request.param)


def trained(tokenizer, row, max_length=512) -> list[str]:
    """The text of every run of trained tokens."""
    [example] = prepare([row], tokenizer, max_length, CODE).examples
    assert len(example.input_ids) == len(example.labels)
    assert all(label in (IGNORED, token) for label, token in zip(example.labels, example.input_ids, strict=True))
    runs, current = [], []
    for label in [*example.labels, IGNORED]:
        if label != IGNORED:
            current.append(label)
        elif current:
            runs.append(tokenizer.decode(current))
            current = []
    return runs


def chat(*turns):
    return {"messages": [{"role": role, "content": content, **extra} for role, content, extra in turns]}


def test_a_chat_row_trains_the_answer_and_its_end_but_not_its_header(tokenizer):
    row = chat(("system", "S", {}), ("user", "hi", {}), ("assistant", "yes", {}))
    [example] = prepare([row], tokenizer, 512, CODE).examples
    text = "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n"
    assert tokenizer.decode(example.input_ids) == text
    answer = tokenizer("yes<|im_end|>")["input_ids"]
    assert answer[-1] == tokenizer.eos_token_id == 2
    header = len(example.input_ids) - len(answer) - 1
    assert example.labels == [IGNORED] * header + answer + [IGNORED]


def test_every_assistant_turn_is_trained_unless_its_weight_is_zero(tokenizer):
    turns = [("user", "a", {}), ("assistant", "one", {}), ("user", "b", {}), ("assistant", "two", {})]
    assert trained(tokenizer, chat(*turns)) == ["one<|im_end|>", "two<|im_end|>"]
    turns[1] = ("assistant", "one", {"weight": 0})
    assert trained(tokenizer, chat(*turns)) == ["two<|im_end|>"]
    turns[3] = ("assistant", "two", {"weight": 1})
    assert trained(tokenizer, chat(*turns)) == ["two<|im_end|>"]


def test_answers_with_odd_white_space_are_trained_whole(tokenizer):
    assert trained(tokenizer, chat(("user", "a", {}), ("assistant", "\n x \n", {}))) == ["\n x \n<|im_end|>"]


def test_a_completion_row_trains_the_completion_and_the_end(tokenizer):
    [example] = prepare([{"prompt": "2+2=", "completion": "4"}], tokenizer, 512, CODE).examples
    assert example.input_ids == [*tokenizer("2+2=4")["input_ids"], 2]
    assert example.labels == [IGNORED] * 4 + [*tokenizer("4")["input_ids"], 2]


def test_a_text_row_trains_everything_that_something_predicts(tokenizer):
    [example] = prepare([{"text": "abc"}], tokenizer, 512, CODE).examples
    assert example.input_ids == [*tokenizer("abc")["input_ids"], 2]
    assert example.labels == [IGNORED, *example.input_ids[1:]]


def test_cut_rows_are_counted_and_rows_without_an_answer_left_are_dropped(tokenizer):
    rows = [{"prompt": "p" * 4, "completion": "c" * 40}, {"prompt": "p" * 30, "completion": "c"}, {"text": "short"}]
    prepared = prepare(rows, tokenizer, 20, CODE)
    assert (prepared.truncated, prepared.dropped) == (2, 1)
    assert [len(example.input_ids) for example in prepared.examples] == [20, 6]


def test_nothing_left_to_train_fails_the_file(tokenizer):
    with pytest.raises(TrainingFailed, match="Nothing to train on") as failure:
        prepare([{"prompt": "p" * 30, "completion": "c"}], tokenizer, 16, CODE)
    assert failure.value.code is CODE


def test_a_row_of_no_known_shape_is_named(tokenizer):
    with pytest.raises(TrainingFailed, match="Row 2"):
        prepare([{"text": "fine"}, {"question": "?"}], tokenizer, 64, CODE)


def test_a_template_that_rewrites_earlier_turns_is_refused():
    tokenizer = tiny_tokenizer(
        "{% for m in messages %}{{ m.role }}{{ m.content if loop.last or m.role != 'assistant' else '' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    turns = [("user", "a", {}), ("assistant", "one", {}), ("user", "b", {}), ("assistant", "two", {})]
    with pytest.raises(TrainingFailed, match="rewrites earlier turns") as failure:
        prepare([chat(*turns)], tokenizer, 64, CODE)
    assert failure.value.code is FailureCode.INVALID_SPEC


def test_a_question_is_the_prompt_that_the_answer_was_trained_behind(tokenizer):
    row = chat(("user", "hi", {}), ("assistant", "yes", {}))
    asked = question(row, tokenizer, 7)
    [example] = prepare([row], tokenizer, 512, CODE).examples
    first = next(i for i, label in enumerate(example.labels) if label != IGNORED)
    assert asked.prompt_ids == example.input_ids[:first]
    assert (asked.index, asked.prompt, asked.expected) == (7, "hi", "yes")
    assert question({"text": "x"}, tokenizer, 0) is None
