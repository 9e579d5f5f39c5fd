"""Regular expressions from elsewhere, matched in a time that they cannot choose.

Python's own matching may take forever for a few characters. Here the set of all places where a match can end is
carried through the pattern, so the time grows with the lengths of pattern and text and not with the ways to match.
"""

import sys
from collections.abc import Sequence

if sys.version_info >= (3, 11):
    from re import _constants as codes
    from re import _parser as parser
else:
    import sre_constants as codes
    import sre_parse as parser

_LONGEST = 500
_MOST_NESTED = 2

_CATEGORIES = {
    codes.CATEGORY_DIGIT: str.isdecimal,
    codes.CATEGORY_WORD: lambda char: char.isalnum() or char == "_",
    codes.CATEGORY_SPACE: str.isspace,
    codes.CATEGORY_NOT_DIGIT: lambda char: not char.isdecimal(),
    codes.CATEGORY_NOT_WORD: lambda char: not (char.isalnum() or char == "_"),
    codes.CATEGORY_NOT_SPACE: lambda char: not char.isspace(),
}
_REPEATS = (codes.MAX_REPEAT, codes.MIN_REPEAT)


class Pattern:
    """
    A regular expression without lookaround, back references and flags.

    Args:
        text (`str`):
            The expression.

    Raises:
        `ValueError`: it is none, or of a kind that is not matched here.
    """

    def __init__(self, text: str):
        if len(text) > _LONGEST:
            raise ValueError(f"The pattern is longer than {_LONGEST} characters: {text[:50]!r}...")
        try:
            self._nodes = parser.parse(text)
        except (parser.error, OverflowError, RecursionError) as error:
            raise ValueError(f"{text!r} is no regular expression: {error}.") from error
        if self._nodes.state.flags & ~parser.SRE_FLAG_UNICODE:
            raise ValueError(f"The pattern {text!r} sets flags. Leave them out.")
        self._text = text
        self._check(self._nodes, nested=0)

    def _check(self, nodes, nested: int) -> None:
        for code, argument in nodes:
            if code in _REPEATS:
                if nested == _MOST_NESTED:
                    raise ValueError(f"The pattern {self._text!r} nests repetitions too deep. Write module names out.")
                self._check(argument[2], nested + 1)
            elif code is codes.SUBPATTERN:
                self._check(argument[3], nested)
            elif code is codes.BRANCH:
                for branch in argument[1]:
                    self._check(branch, nested)
            elif code not in (codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT):
                raise ValueError(
                    f"The pattern {self._text!r} looks around or back, or the like, for which there is no bound on "
                    "the time to match it. Write module names out."
                )

    def matches_end(self, name: str) -> bool:
        """Whether `(.*\\.)?(pattern)$` matches the name of a module, as PEFT looks up ranks and alphas."""
        starts = {0, *(place + 1 for place, char in enumerate(name) if char == ".")}
        return len(name) in self._ends(self._nodes, name, starts)

    def _ends(self, nodes: Sequence, name: str, places: set[int]) -> set[int]:
        for code, argument in nodes:
            if code in _REPEATS:
                places = self._repeated(argument, name, places)
            elif code is codes.SUBPATTERN:
                places = self._ends(argument[3], name, places)
            elif code is codes.BRANCH:
                places = set().union(*(self._ends(branch, name, places) for branch in argument[1]))
            elif code is codes.AT:
                places = {place for place in places if _is_at(argument, place, name)}
            else:
                places = {place + 1 for place in places if place < len(name) and _fits(code, argument, name[place])}
        return places

    def _repeated(self, argument, name: str, places: set[int]) -> set[int]:
        fewest, most, nodes = argument
        # More repetitions than characters match nothing between them, and change nothing.
        for _ in range(min(fewest, len(name) + 1)):
            places = self._ends(nodes, name, places)
        reached, added = set(places), set(places)
        for _ in range(min(most - fewest, len(name) + 1)):
            added = self._ends(nodes, name, added) - reached
            if not added:
                break
            reached |= added
        return reached


def _is_at(code, place: int, name: str) -> bool:
    if code in (codes.AT_BEGINNING, codes.AT_BEGINNING_STRING):
        return place == 0
    if code in (codes.AT_END, codes.AT_END_STRING):
        return place == len(name)
    before, after = (0 <= at < len(name) and _CATEGORIES[codes.CATEGORY_WORD](name[at]) for at in (place - 1, place))
    return (before != after) == (code is codes.AT_BOUNDARY)


def _fits(code, argument, char: str) -> bool:
    if code is codes.ANY:
        return char != "\n"
    if code is codes.LITERAL:
        return ord(char) == argument
    if code is codes.NOT_LITERAL:
        return ord(char) != argument
    negated = bool(argument) and argument[0][0] is codes.NEGATE
    return negated != any(_is_in(kind, value, char) for kind, value in argument[negated:])


def _is_in(kind, value, char: str) -> bool:
    if kind is codes.LITERAL:
        return ord(char) == value
    if kind is codes.RANGE:
        return value[0] <= ord(char) <= value[1]
    return _CATEGORIES[value](char)
