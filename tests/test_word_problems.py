"""The demo's word problems: right sums, disjoint rows, and forms that only their own reader reads."""

import importlib.util
import json
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from random import Random

import pytest

RECIPE = Path(__file__).parents[1] / "recipes" / "word_problems.py"

# An independent solution of each kind from the numbers of its question, in the order they are read.
SOLUTIONS = {
    "buying": lambda count, price, extra: count * price + extra,
    "change": lambda count, price, bill: bill - count * price,
    "sharing": lambda total, people: total / people,
    "travel": lambda speed, hours: speed * hours,
    "saving": lambda start, weekly, weeks: start + weekly * weeks,
    "goal": lambda price, start, weekly: (price - start) / weekly,
    "giving": lambda start, first, second: start - first - second,
    "doubling": lambda start, more: 2 * start + more,
    "comparing": lambda more, fewer: more + (more - fewer),
}
WORDS = {"plus": "+", "minus": "-", "times": "*", "divided by": "/"}
EQUATION = re.compile(r"(\d+) ?(\+|-|\*|/|plus|minus|times|divided by) ?(\d+) (?:=|is) \$?(\d+)")
COMPUTE = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": lambda a, b: a / b}


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("word_problems", RECIPE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses looks its module up there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def problems(recipe):
    return [kind(Random(f"{kind.__name__}/{i}")) for kind in recipe.KINDS for i in range(100)]


@pytest.fixture(scope="module")
def clients(recipe):
    return recipe.make_clients(90, 18, seed=3)


def numbers_in(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def test_result_solves_the_question(problems):
    for problem in problems:
        assert int(problem.result) == SOLUTIONS[problem.kind](*numbers_in(problem.question)), problem


def test_written_equations_hold_and_follow_from_the_question(recipe, problems):
    for problem in problems:
        for style in recipe.STYLES:
            answer = style.write(problem)
            equations = EQUATION.findall(answer)
            assert len(equations) == len(problem.steps), answer
            known = {*numbers_in(problem.question), *([2] if problem.kind == "doubling" else [])}
            for left, operator, right, result in equations:
                left, right, result = int(left), int(right), int(result)
                assert {left, right} <= known and min(left, right, result) > 0, answer
                assert result == COMPUTE[WORDS.get(operator, operator)](left, right), answer
                known.add(result)
            assert str(result) == problem.result == style.read(answer), answer


def test_problems_are_short_small_and_grammatical(recipe, problems):
    for problem in problems:
        assert len(problem.question.split()) <= 30
        assert max(numbers_in(problem.question) + [step.result for step in problem.steps]) <= 120
        for text in [problem.question, *(style.write(problem) for style in recipe.STYLES)]:
            assert not re.search(r"\b1 [a-z]+s\b", text), text
            assert not re.search(r"\b(?:[02-9]|\d\d+) (?:dollar|kilometer|week|bead|card|coin|shell)\b", text), text
            assert not re.search(r"\ba [aeiou]", text), text
    assert {problem.result for problem in problems} & {"1"}, "no singular was tried"


def test_only_its_own_reader_reads_a_form(recipe, problems):
    for style, reader in permutations(recipe.STYLES, 2):
        assert {reader.read(style.write(problem)) for problem in problems} == {None}


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("ledger", "Total: 600 * 2 = $1,200\n#### 1,200\n", "1200"),
        ("ledger", "#### -0", "0"),
        ("ledger", "#### 24 apples", None),
        ("ledger", "#### 24\nand so on", None),
        ("ledger", "The answer is 24.", None),
        ("ledger", "", None),
        ("teacher", "5 divided by 2 is 2.50. So the answer is 2.50 dollars.", "2.5"),
        ("teacher", "So the answer is 24", None),
        ("teacher", "I say so. So the answer is 24 cards. Or 25.", None),
        ("engineer", "total = 10*10 = 100 km. The total is [100] km.", "100"),
        ("engineer", "The total is 100 km.", None),
        ("engineer", "The total is [x] km.", None),
        ("engineer", f"[{'9' * 5000}] km.", None),
    ],
)
def test_reading_generated_text(recipe, name, text, result):
    style = {style.name: style for style in recipe.STYLES}[name]
    assert style.read(text) == result


def test_no_question_appears_twice(clients):
    questions = [question for part in clients for rows in part.values() for question in rows["question"]]
    assert len(questions) == 3 * (90 + 18) == len(set(questions))


def test_clients_have_their_own_form(recipe, clients):
    for part, size in zip(clients, (90, 18), strict=True):
        assert list(part) == [style.name for style in recipe.STYLES]
        for style in recipe.STYLES:
            assert part[style.name].column_names == ["question", "answer"]
            assert len(part[style.name]) == size
            assert all(re.fullmatch(r"\d+", style.read(answer)) for answer in part[style.name]["answer"])


def test_clients_have_the_same_mixture_of_kinds(recipe):
    styles = [replace(style, write=lambda problem: problem.kind) for style in recipe.STYLES]
    for part in recipe.make_clients(18, 9, styles=styles):
        for rows in part.values():
            assert Counter(rows["answer"]) == dict.fromkeys(SOLUTIONS, len(rows) // 9)


def test_rows_depend_on_the_seed_alone(recipe, clients):
    Random(0).random()
    for first, again in zip(clients, recipe.make_clients(90, 18, seed=3), strict=True):
        assert {name: rows.to_list() for name, rows in first.items()} == {
            name: rows.to_list() for name, rows in again.items()
        }
    other, _ = recipe.make_clients(90, 18, seed=4)
    assert not set(other["ledger"]["question"]) & set(clients[0]["ledger"]["question"])


def test_more_training_rows_leave_the_others_alone(recipe):
    # Enough rows that the same question is drawn more than once.
    few, many = recipe.make_clients(200, 90), recipe.make_clients(2000, 90)
    for name in few[0]:
        assert many[0][name].to_list()[:200] == few[0][name].to_list()
        assert many[1][name].to_list() == few[1][name].to_list()


def test_refusals(recipe):
    with pytest.raises(ValueError, match="`num_eval`=-1"):
        recipe.make_clients(1, -1)
    with pytest.raises(ValueError, match="has a name twice"):
        recipe.make_clients(1, 1, styles=recipe.STYLES[:1] * 2)


def test_running_out_of_questions_is_an_error(recipe, monkeypatch):
    monkeypatch.setattr(recipe, "KINDS", (lambda rng: recipe.buying(Random(0)),))
    with pytest.raises(ValueError, match="ask for fewer rows"):
        recipe.make_clients(1, 1)


def test_main_writes_files(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["word_problems.py", "--num_examples", "9", "--num_eval", "3", "--output_dir", str(tmp_path)]
    )
    recipe.main()
    train, evaluation = recipe.make_clients(9, 3)
    for part, data in (("train", train), ("eval", evaluation)):
        for name, rows in data.items():
            lines = (tmp_path / part / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
            assert [json.loads(line) for line in lines] == rows.to_list()
