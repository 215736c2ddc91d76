"""Rows: what is accepted, what is named as wrong, and what comes out."""

import io
import json

import pytest

from tunery import datasets


def normalise(text: str | bytes) -> tuple[datasets.Report, list[dict]]:
    out = io.BytesIO()
    data = text.encode() if isinstance(text, str) else text
    report = datasets.normalise([data[i : i + 7] for i in range(0, len(data), 7)], out)
    return report, [json.loads(line) for line in out.getvalue().splitlines()]


def chat(*turns: tuple[str, str], **more: object) -> str:
    return json.dumps({"messages": [{"role": role, "content": content} for role, content in turns], **more})


GOOD = chat(("user", "hi"), ("assistant", "hello"))


def test_alpaca_rows_become_the_prompts_of_the_paper_byte_for_byte():
    rows = [
        {"instruction": "Name a colour.", "input": "", "output": "Red."},
        {"instruction": "Add.", "input": "1 and 2", "output": "3"},
    ]
    report, made = normalise("\n".join(json.dumps(row) for row in rows))
    assert report.errors == []
    assert made[0] == {
        "prompt": "Below is an instruction that describes a task. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:\n",
        "completion": "Red.",
    }
    assert made[1]["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1 and 2\n\n### Response:\n"
    )


def test_a_byte_order_mark_blank_lines_and_a_missing_last_newline_are_no_errors():
    report, made = normalise("\ufeff" + GOOD + "\n\n  \n" + GOOD)
    assert (report.rows, report.error_count, len(made)) == (2, 0, 2)


def test_weights_are_kept_where_they_mean_something():
    row = {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"}, {"role": "assistant", "content": "d", "weight": 1},
    ]}  # fmt: skip
    _, made = normalise(json.dumps(row))
    assert [message.get("weight") for message in made[0]["messages"]] == [None, 0, None, None]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{oops", "not valid JSON"),
        ("[1]", "a JSON object is expected, not list"),
        ('{"messages": []}', "'messages' is empty"),
        (chat(("user", "x")), "the last message must be from the assistant"),
        (chat(("user", "x"), ("assistant", "  ")), "the assistant's message is empty"),
        (chat(("user", "x"), ("system", "y"), ("assistant", "z")), "a system message may only come first"),
        (chat(("tool", "x"), ("assistant", "z")), "messages[0].role is 'tool'"),
        ('{"messages": [{"role": "assistant", "content": 3}]}', "Expected `str`, got `int`"),
        ('{"messages": [{"role": "assistant", "content": "x", "colour": "y"}]}', "unknown field"),
        ('{"messages": [{"role": "assistant", "content": "x", "weight": 0}]}', "every weight is 0"),
        (chat(("user", "x"), ("assistant", "y"), tools=[{"type": "function"}]), "`tools` are not supported yet"),
        ('{"input": {}, "preferred_output": [1]}', "preference rows"),
        ('{"colour": "red"}', "found colour"),
        ("[" * 100 + "]" * 100, "a JSON object is expected"),
        ('{"messages": ' + "[" * 50 + "]" * 50 + "}", "nested deeper than"),
        (chat(("user", "x" * datasets.MAX_LINE_BYTES), ("assistant", "y")), "longer than"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(line, says):
    report, made = normalise(GOOD + "\n" + line + "\n" + GOOD + "\n")
    assert report.error_count == 1
    assert report.errors[0].line == 2
    assert says in report.errors[0].message
    assert len(made) == 2


def test_a_row_of_another_shape_is_refused():
    report, _ = normalise(GOOD + '\n{"text": "x"}\n')
    assert "use one shape" in report.errors[0].message


def test_an_empty_completion_is_no_completion():
    report, _ = normalise('{"prompt": "x", "completion": "y"}\n{"prompt": "x", "completion": ""}\n')
    assert str(report.errors[0]) == "line 2: 'completion' is empty"


def test_errors_are_counted_beyond_what_is_kept():
    report, _ = normalise("nope\n" * 80)
    assert (report.error_count, len(report.errors)) == (80, datasets.MAX_ERRORS)


def test_a_line_without_end_is_not_held_in_memory():
    endless = (b"x" * 1_000_000 for _ in range(50))
    longest = max(len(line) for _, line in datasets.lines(endless))
    assert longest <= datasets.MAX_LINE_BYTES + 1
