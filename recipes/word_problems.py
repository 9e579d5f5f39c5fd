"""
Grade-school word problems for the demo: the same arithmetic for all clients, each client with its own form of answer.

Rows have GSM8K's columns, `question` and `answer`, and are made here: nothing is downloaded or copied. The kinds of
problem and the arithmetic are common to all clients; how an answer is written is each client's own.

Look at a few rows of each client:

    python recipes/word_problems.py --show 2

Write `train/<client>.jsonl` and `eval/<client>.jsonl`:

    python recipes/word_problems.py --num_examples 600 --num_eval 60 --output_dir data/word_problems
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import DatasetDict

NAMES = (
    "Ada Ben Carla Dev Elif Finn Greta Hugo Iris Jonas Kira Luca Mira Noah Olga Pablo Rosa Sven Tara Umar Vera Wim Zoe"
).split()
# All of them take a plain "s", and those for sale follow "a", never "an".
GOODS = "book cap kite lamp mug pen plant puzzle robot toy".split()
KEEPSAKES = "bead button card coin marble shell stamp sticker".split()
RIDES = ("rides a bike", "steers a boat", "drives a tractor", "rides a scooter")
BILLS = (20, 50, 100)


@dataclass(frozen=True)
class Unit:
    """What a number counts: the noun in the singular, and a symbol without plural."""

    noun: str
    symbol: str = "pc"

    def count(self, number: int) -> str:
        return f"{number} {self.noun}{'' if number == 1 else 's'}"


DOLLAR, KILOMETER, WEEK = Unit("dollar", "USD"), Unit("kilometer", "km"), Unit("week", "wk")


@dataclass(frozen=True)
class Step:
    """One calculation, `left operator right`, with the name and the unit of what it gives."""

    name: str
    left: int
    operator: str  # one of + - * /
    right: int
    unit: Unit

    @property
    def result(self) -> int:
        if self.operator == "/":
            quotient, remainder = divmod(self.left, self.right)
            if remainder:
                raise ValueError(f"`right`={self.right} does not divide `left`={self.left} in step {self.name!r}.")
            return quotient
        return {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[self.operator](self.left, self.right)


@dataclass(frozen=True)
class Problem:
    """A question and the steps that solve it, before any client has written its answer."""

    kind: str
    question: str
    steps: tuple[Step, ...]

    @property
    def result(self) -> str:
        return str(self.steps[-1].result)

    @property
    def unit(self) -> Unit:
        return self.steps[-1].unit


def _problem(rng: Random, kind: str, wordings: tuple[str, str], *steps: Step) -> Problem:
    return Problem(kind=kind, question=rng.choice(wordings), steps=steps)


# The kinds of problem. Both wordings of a kind name the numbers in the same order.


def buying(rng: Random) -> Problem:
    who, (item, other) = rng.choice(NAMES), rng.sample(GOODS, 2)
    count, price, extra = rng.randint(2, 9), rng.randint(2, 9), rng.randint(2, 20)
    wordings = (
        f"{who} buys {count} {item}s for ${price} each and a {other} for ${extra}. How much does {who} pay?",
        f"{who} needs {count} {item}s at ${price} each and a {other} for ${extra}. What does everything cost?",
    )
    cost = Step("cost", count, "*", price, DOLLAR)
    return _problem(rng, "buying", wordings, cost, Step("total", cost.result, "+", extra, DOLLAR))


def change(rng: Random) -> Problem:
    who, item, count, price = rng.choice(NAMES), rng.choice(GOODS), rng.randint(2, 9), rng.randint(2, 9)
    cost = Step("cost", count, "*", price, DOLLAR)
    bill = rng.choice([bill for bill in BILLS if bill > cost.result])
    wordings = (
        f"{who} buys {count} {item}s for ${price} each and pays with a ${bill} bill. How much change comes back?",
        f"A shop sells {who} {count} {item}s at ${price} each. How much change does {who} get from ${bill}?",
    )
    return _problem(rng, "change", wordings, cost, Step("change", bill, "-", cost.result, DOLLAR))


def sharing(rng: Random) -> Problem:
    who, item, people, share = rng.choice(NAMES), rng.choice(KEEPSAKES), rng.randint(2, 9), rng.randint(2, 12)
    total = people * share
    wordings = (
        f"{who} shares {total} {item}s equally among {people} friends. How many {item}s does each friend get?",
        f"{who} puts {total} {item}s into {people} jars, the same number in each. How many {item}s are in one jar?",
    )
    return _problem(rng, "sharing", wordings, Step("share", total, "/", people, Unit(item)))


def travel(rng: Random) -> Problem:
    who, ride, speed, hours = rng.choice(NAMES), rng.choice(RIDES), rng.randint(3, 12), rng.randint(2, 9)
    wordings = (
        f"{who} {ride} at {speed} kilometers per hour for {hours} hours. How many kilometers is that?",
        f"{who} {ride} and covers {speed} kilometers every hour. How far does {who} get in {hours} hours?",
    )
    return _problem(rng, "travel", wordings, Step("distance", speed, "*", hours, KILOMETER))


def saving(rng: Random) -> Problem:
    who, start, weekly, weeks = rng.choice(NAMES), rng.randint(5, 40), rng.randint(2, 9), rng.randint(2, 9)
    wordings = (
        f"{who} has ${start} and saves ${weekly} a week. How much money does {who} have after {weeks} weeks?",
        f"The money box of {who} holds ${start}. Each week ${weekly} goes in. How much is in it after {weeks} weeks?",
    )
    added = Step("added", weekly, "*", weeks, DOLLAR)
    return _problem(rng, "saving", wordings, added, Step("total", start, "+", added.result, DOLLAR))


def goal(rng: Random) -> Problem:
    who, item, start = rng.choice(NAMES), rng.choice(GOODS), rng.randint(5, 30)
    weekly, weeks = rng.randint(2, 9), rng.randint(2, 9)
    price = start + weekly * weeks
    wordings = (
        f"To buy a {item} for ${price}, {who} has ${start} and saves ${weekly} a week. How many weeks is that?",
        f"A {item} costs ${price}. {who} owns ${start} and earns ${weekly} a week. How many weeks must {who} work?",
    )
    gap = Step("gap", price, "-", start, DOLLAR)
    return _problem(rng, "goal", wordings, gap, Step("time", gap.result, "/", weekly, WEEK))


def giving(rng: Random) -> Problem:
    (who, friend), item = rng.sample(NAMES, 2), rng.choice(KEEPSAKES)
    first, second, left = rng.randint(2, 15), rng.randint(2, 15), rng.randint(1, 30)
    start = first + second + left
    wordings = (
        f"{who} has {start} {item}s, gives {first} to {friend} and loses {second}. How many {item}s does {who} keep?",
        f"Of {start} {item}s, {who} sells {first} and {friend} takes {second}. How many {item}s remain?",
    )
    gone = Step("gone", first, "+", second, Unit(item))
    return _problem(rng, "giving", wordings, gone, Step("remainder", start, "-", gone.result, Unit(item)))


def doubling(rng: Random) -> Problem:
    (who, friend), item = rng.sample(NAMES, 2), rng.choice(KEEPSAKES)
    start, more = rng.randint(3, 30), rng.randint(2, 15)
    wordings = (
        f"{who} has {start} {item}s. {friend} had twice as many and finds {more} more. How many has {friend} now?",
        f"{who} doubles a pile of {start} {item}s, and {friend} adds {more}. How many {item}s are in the pile now?",
    )
    double = Step("double", start, "*", 2, Unit(item))
    return _problem(rng, "doubling", wordings, double, Step("total", double.result, "+", more, Unit(item)))


def comparing(rng: Random) -> Problem:
    (who, friend), item, more = rng.sample(NAMES, 2), rng.choice(KEEPSAKES), rng.randint(12, 40)
    fewer = rng.randint(2, more - 2)
    wordings = (
        f"{who} has {more} {item}s. {friend} has {fewer} fewer. How many {item}s do they have together?",
        f"{who} finds {more} {item}s, which is {fewer} more than {friend} finds. How many {item}s is that in all?",
    )
    part = Step("smaller part", more, "-", fewer, Unit(item))
    return _problem(rng, "comparing", wordings, part, Step("total", more, "+", part.result, Unit(item)))


KINDS = (buying, change, sharing, travel, saving, goal, giving, doubling, comparing)

# The clients' ways of writing. A reader accepts its own form only, so that exact match measures form and result.

NUMBER = r"(-?[0-9][0-9,]{0,15}(?:\.[0-9]{1,6})?)"
WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "divided by"}


@dataclass(frozen=True)
class AnswerStyle:
    """A client's form of answer: how it is written, and the pattern whose first group is the result in that form."""

    name: str
    write: Callable[[Problem], str]
    pattern: str

    def read(self, text: str) -> str | None:
        """The result stated in `text`, without thousands separators or trailing zeros, or `None` in another form."""
        match = re.search(self.pattern, text.strip())
        return match and format(Decimal(match.group(1).replace(",", "")).normalize() + 0, "f")


def write_ledger(problem: Problem) -> str:
    def amount(step: Step) -> str:
        return f"${step.result}" if step.unit is DOLLAR else step.unit.count(step.result)

    lines = [f"{s.name.capitalize()}: {s.left} {s.operator} {s.right} = {amount(s)}" for s in problem.steps]
    return "\n".join([*lines, f"#### {problem.result}"])


def write_teacher(problem: Problem) -> str:
    reasons = [f"{s.left} {WORDS[s.operator]} {s.right} is {s.result}" for s in problem.steps]
    return f"{', and '.join(reasons)}. So the answer is {problem.unit.count(problem.steps[-1].result)}."


def write_engineer(problem: Problem) -> str:
    lines = [f"{s.name} = {s.left}{s.operator}{s.right} = {s.result} {s.unit.symbol}" for s in problem.steps]
    return f"{'; '.join(lines)}. The {problem.steps[-1].name} is [{problem.result}] {problem.unit.symbol}."


STYLES: tuple[AnswerStyle, ...] = (
    AnswerStyle("ledger", write_ledger, rf"(?:\A|\n)#### {NUMBER}\Z"),
    AnswerStyle("teacher", write_teacher, rf"\. So the answer is {NUMBER} [a-z]+\.\Z"),
    AnswerStyle("engineer", write_engineer, rf"\[{NUMBER}\] [A-Za-z]+\.\Z"),
)


def make_clients(
    num_examples: int, num_eval: int, seed: int = 42, styles: Sequence[AnswerStyle] = STYLES
) -> tuple[DatasetDict, DatasetDict]:
    """
    Make the rows of one client per style.

    Kinds take turns, so that all clients have the same mixture. Eval rows are drawn first and clients take turns, so
    that asking for more training rows changes neither the eval rows nor the first training rows.

    Args:
        num_examples (`int`):
            Training rows per client.
        num_eval (`int`):
            Evaluation rows per client.
        seed (`int`, *optional*, defaults to `42`):
            Every row has its own generator, made from the seed, the style's name, the split and the row's index.
        styles (sequence of `AnswerStyle`, *optional*, defaults to `STYLES`):
            Forms of answer; their names become the client ids.

    Returns:
        The pair `(train, eval)` of [`~datasets.DatasetDict`] with columns `question` and `answer`. No question appears
        twice in either, or in both.
    """
    from datasets import Dataset, DatasetDict, Features, Value

    if min(num_examples, num_eval) < 0:
        raise ValueError(f"`num_examples`={num_examples} and `num_eval`={num_eval} must not be negative.")
    if len({style.name for style in styles}) < len(styles):
        raise ValueError(f"`styles` has a name twice: {[style.name for style in styles]}. Client ids must differ.")

    seen: set[str] = set()

    def split(part: str, size: int) -> DatasetDict:
        rows = {style.name: {"question": [], "answer": []} for style in styles}
        for index in range(size):
            for style in styles:
                problem = _new_problem(Random(f"{seed}/{style.name}/{part}/{index}"), index, seen)
                rows[style.name]["question"].append(problem.question)
                rows[style.name]["answer"].append(style.write(problem))
        features = Features({"question": Value("string"), "answer": Value("string")})
        return DatasetDict({name: Dataset.from_dict(columns, features=features) for name, columns in rows.items()})

    eval_rows = split("eval", num_eval)
    return split("train", num_examples), eval_rows


def _new_problem(rng: Random, index: int, seen: set[str]) -> Problem:
    for _ in range(1000):
        problem = KINDS[index % len(KINDS)](rng)
        if problem.question not in seen:
            seen.add(problem.question)
            return problem
    raise ValueError(f"No new question of the kind {problem.kind!r} was found at row {index}; ask for fewer rows.")


def main() -> None:
    args = make_parser().parse_args()
    train, evaluation = make_clients(args.num_examples, args.num_eval, seed=args.seed)

    if args.output_dir is None:
        for name, rows in train.items():
            for row in rows.select(range(min(args.show, len(rows)))):
                print(f"[{name}]\n{row['question']}\n--\n{row['answer']}\n")
        return

    for part, clients in (("train", train), ("eval", evaluation)):
        directory = args.output_dir / part
        directory.mkdir(parents=True, exist_ok=True)
        for name, rows in clients.items():
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make word problems for clients that write differently.")
    parser.add_argument("--num_examples", type=int, default=600, help="Training rows per client.")
    parser.add_argument("--num_eval", type=int, default=60, help="Evaluation rows per client.")
    parser.add_argument("--seed", type=int, default=42, help="Same seed, same rows.")
    parser.add_argument("--show", type=int, default=2, help="Rows to print per client when nothing is written.")
    parser.add_argument("--output_dir", type=Path, default=None, help="Folder for the .jsonl files; none by default.")
    return parser


if __name__ == "__main__":
    main()
