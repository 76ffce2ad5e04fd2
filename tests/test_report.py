from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optimum_comp.evaluation import Evaluation
from optimum_comp.report.plots import PAGE, SIZE_PLOT, SPEED_PLOT, pareto_front, write_report
from optimum_comp.report.table import evaluation_table, fastest


coordinate = st.integers(0, 6)


@given(st.lists(st.tuples(coordinate, coordinate), min_size=1, max_size=12))
def test_front_is_what_nothing_beats(points):
    front = pareto_front(points)
    for index, point in enumerate(points):
        beaten = any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points)
        assert (points[index] in [points[i] for i in front]) == (not beaten)
    for first, second in itertools.pairwise(front):
        assert points[first][0] < points[second][0] and points[first][1] > points[second][1]


def results() -> dict[str, Evaluation]:
    return {
        "dense": Evaluation("a", "onnxruntime", 100, 4_000_000, 20.0, 10, 8, "text", decode_tokens_per_second=10.0),
        "8 bit <&>": Evaluation(
            "b", "onnxruntime", 100, 1_000_000, 20.2, 10, 8, "text", decode_tokens_per_second=30.0
        ),
        "unmeasured": Evaluation("c", "onnxruntime", 100, 1_000_000),
    }


def test_report_is_one_page_with_plots_and_table(tmp_path):
    pytest.importorskip("matplotlib")
    page = write_report(results(), tmp_path / "report", "A & B")
    assert page == tmp_path / "report" / PAGE
    for name in (SIZE_PLOT, SPEED_PLOT):
        assert (page.parent / name).read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") == 2
    assert "<h1>A &amp; B</h1>" in text and "8 bit &lt;&amp;&gt;" in text and "20.20 (1.010x)" in text


def test_columns_that_nobody_measured_are_left_out():
    table = evaluation_table(results())
    assert "decode tok/s" in table
    assert "peak memory" not in table and "first token" not in table


def test_answers_stand_by_question():
    answers = [{"prompt": "Who?", "answer": "I."}, {"prompt": "Why?", "answer": "So."}]
    others = [{"prompt": "Who?", "answer": "You."}, {"prompt": "Why?", "answer": "No."}]
    table = evaluation_table(
        {
            "dense": Evaluation("a", "pytorch", 100, 400, answers=answers),
            "pruned": Evaluation("b", "pytorch", 80, 320, answers=others),
            "quiet": Evaluation("c", "pytorch", 80, 320),
        }
    )
    assert table.endswith("Asked: Who?\ndense: I.\npruned: You.\n\nAsked: Why?\ndense: So.\npruned: No.")


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=5, unique=True))
def test_who_answers_first_is_told_for_every_length_of_the_prompt(speeds):
    models = {
        f"m{number}": Evaluation("a", "onnxruntime", 1, 1, prefill_tokens_per_second=p, decode_tokens_per_second=d)
        for number, (p, d) in enumerate(speeds)
    }
    told = fastest(models).removeprefix("Soonest with an answer: ").removesuffix(".")
    winners = [(0.0, told.split("; ")[0])]
    for part in told.split("; ")[1:]:
        ratio, name = part.removeprefix("with a prompt more than ").split(" times as long as the answer, ")
        winners.append((float(ratio), name))
    for ratio in (0.001, 0.1, 0.5, 1.7, 3.3, 20.0, 1000.0):
        name = [name for start, name in winners if start < ratio][-1]
        seconds = {
            each: ratio / result.prefill_tokens_per_second + 1 / result.decode_tokens_per_second
            for each, result in models.items()
        }
        # Ratios are told with three digits.
        assert seconds[name] <= min(seconds.values()) * 1.01


def test_nobody_is_fastest_alone():
    assert fastest(results()) == ""
