"""The deck and the arithmetic: exact evaluator, and a solver that lists every formula for a hand.

    formula := term (('+' | '-') term)*      term := factor (('*' | '/') factor)*
    factor  := number | '(' formula ')'

Values are exact rationals, so 8/(3-8/3) is 24. Formulas are tuples of tokens, and "10", "4" are
never read as 104. Left out: signs (-3), powers, anything of Python's `eval`; drawing (picture.py).
"""

import hashlib
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from math import gcd

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
SUITS = ("spade", "heart", "club", "diamond")
OPERATORS = ("+", "-", "*", "/")
HELD_OUT_SHARE = 0.2
MAX_TOKENS = 200  # longer formulas are refused by the evaluator
MAX_DEPTH = 40  # and so are deeper ones

_TOKEN = re.compile(r"[0-9]+|[-+*/()]")
_FORMULA = re.compile(r"[-+*/()0-9\s]*")


def rank_value(rank: str, faces_ten: bool = True) -> int:
    """A is 1; J, Q, K are 10, or 11 to 13."""
    if rank not in RANKS:
        raise ValueError(f"rank {rank!r} is unknown: use one of {', '.join(RANKS)}")
    value = RANKS.index(rank) + 1
    return min(value, 10) if faces_ten else value


def read_hand(hand: Sequence, size: int | None) -> tuple[str, ...]:
    """Rank names or rank numbers 1..13 -> rank names."""
    names = []
    for card in hand:
        if isinstance(card, str) and card in RANKS:
            names.append(card)
        elif not isinstance(card, str) and 1 <= int(card) <= 13:
            names.append(RANKS[int(card) - 1])
        else:
            raise ValueError(f"card {card!r} is unknown: use {', '.join(RANKS)} or 1 to 13")
    if size is not None and len(names) != size:
        raise ValueError(f"hand {list(hand)!r} has {len(names)} cards: give {size}")
    return tuple(names)


def tokenize(text: str) -> list[str]:
    """Text -> tokens; a run of digits is one number. ValueError on any other character."""
    if not _FORMULA.fullmatch(text):
        raise ValueError(f"{text[:60]!r} is not a formula: use 0-9 + - * / ( ) only")
    return _TOKEN.findall(text)


def evaluate(tokens: Sequence[str]) -> Fraction | None:
    """The exact value; None on a syntax error, a division by zero or an absurd size."""
    worked = _work_out(tuple(tokens))
    return None if worked is None else worked[0]


def operations(tokens: Sequence[str]) -> list[tuple[Fraction, str, Fraction, Fraction]]:
    """The formula's operations as a person works them out: (left, sign, right, result) of each."""
    worked = _work_out(tuple(tokens))
    if worked is None:
        raise ValueError(f"{''.join(tokens)!r} has no value: give a complete, valid formula")
    return worked[1]


def intermediate_values(tokens: Sequence[str]) -> list[Fraction]:
    """The results of the operations, in the same order; none where there is no value."""
    worked = _work_out(tuple(tokens))
    return [] if worked is None else [step[3] for step in worked[1]]


@lru_cache(maxsize=65_536)
def _work_out(tokens: tuple[str, ...]) -> tuple[Fraction, list[tuple]] | None:
    """(value, operations done) or None. Operations come out in post-order."""
    if not 0 < len(tokens) <= MAX_TOKENS:
        return None
    steps: list[tuple] = []
    try:
        value, end = _formula(tokens, 0, 0, steps)
    except (ValueError, ZeroDivisionError):
        return None
    return (value, steps) if end == len(tokens) else None


def _formula(tokens: tuple[str, ...], at: int, depth: int, steps: list) -> tuple[Fraction, int]:
    value, at = _term(tokens, at, depth, steps)
    while at < len(tokens) and tokens[at] in ("+", "-"):
        right, end = _term(tokens, at + 1, depth, steps)
        value, at = _apply(value, tokens[at], right, steps), end
    return value, at


def _term(tokens: tuple[str, ...], at: int, depth: int, steps: list) -> tuple[Fraction, int]:
    value, at = _factor(tokens, at, depth, steps)
    while at < len(tokens) and tokens[at] in ("*", "/"):
        right, end = _factor(tokens, at + 1, depth, steps)
        value, at = _apply(value, tokens[at], right, steps), end
    return value, at


def _factor(tokens: tuple[str, ...], at: int, depth: int, steps: list) -> tuple[Fraction, int]:
    if at >= len(tokens) or depth > MAX_DEPTH:
        raise ValueError("a number is missing")
    token = tokens[at]
    if token == "(":
        value, at = _formula(tokens, at + 1, depth + 1, steps)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("a bracket is open")
        return value, at + 1
    if not (token.isascii() and token.isdigit() and len(token) <= 4):
        raise ValueError("not a number")
    return Fraction(int(token)), at + 1


def _apply(a: Fraction, op: str, b: Fraction, steps: list) -> Fraction:
    result = a + b if op == "+" else a - b if op == "-" else a * b if op == "*" else a / b
    steps.append((a, op, b, result))
    return result


# --- the solver: rationals are pairs (numerator, denominator > 0), expressions (tokens, priority)

Pair = tuple[int, int]
_ATOM = 3


@lru_cache(maxsize=65_536)
def solutions(values: tuple[int, ...], target: int = 24) -> tuple[tuple[str, ...], ...]:
    """Every distinct formula with no needless bracket that uses all values once and hits target.

    Sorted by (number of tokens, text). The order of `values` does not matter.
    """
    values = tuple(sorted(values))
    if len(values) == 1:
        return ((str(values[0]),),) if values[0] == target else ()
    found = set()
    for left_values, right_values in _splits(values):
        left, right = _expressions(left_values), _expressions(right_values)
        for a, left_forms in left.items():
            for b, right_forms in right.items():
                for op in _operators_to(a, b, target):
                    found.update(join(x, op, y)[0] for x in left_forms for y in right_forms)
    return tuple(sorted(found, key=lambda tokens: (len(tokens), "".join(tokens))))


def solvable(values: Sequence[int], target: int = 24) -> bool:
    """Whether some formula of all the values hits the target."""
    return bool(solutions(tuple(sorted(values)), target))


def _operators_to(a: Pair, b: Pair, target: int) -> list[str]:
    """The operators with a op b = target, without building any rational."""
    (an, ad), (bn, bd) = a, b
    whole = target * ad * bd
    hits = []
    if an * bd + bn * ad == whole:
        hits.append("+")
    if an * bd - bn * ad == whole:
        hits.append("-")
    if an * bn == whole:
        hits.append("*")
    if bn and an * bd == target * ad * bn:
        hits.append("/")
    return hits


@lru_cache(maxsize=4_096)
def _expressions(values: tuple[int, ...]) -> dict[Pair, tuple]:
    """Sorted values -> {value reached: all expressions that use every value and reach it}."""
    if len(values) == 1:
        return {(values[0], 1): (((str(values[0]),), _ATOM),)}
    table: dict[Pair, set] = {}
    for left_values, right_values in _splits(values):
        for a, left_forms in _expressions(left_values).items():
            for b, right_forms in _expressions(right_values).items():
                for op in OPERATORS:
                    if op == "/" and b[0] == 0:
                        continue
                    forms = table.setdefault(_result(a, op, b), set())
                    forms.update(join(x, op, y) for x in left_forms for y in right_forms)
    return {value: tuple(forms) for value, forms in table.items()}


def _splits(values: tuple[int, ...]) -> set[tuple[tuple[int, ...], tuple[int, ...]]]:
    """All ways to deal the values into a left and a right side, neither empty."""
    places = range(len(values))
    found = set()
    for size in range(1, len(values)):
        for chosen in combinations(places, size):
            left = tuple(values[i] for i in chosen)
            found.add((left, tuple(values[i] for i in places if i not in chosen)))
    return found


def _result(a: Pair, op: str, b: Pair) -> Pair:
    (an, ad), (bn, bd) = a, b
    if op == "+":
        n, d = an * bd + bn * ad, ad * bd
    elif op == "-":
        n, d = an * bd - bn * ad, ad * bd
    elif op == "*":
        n, d = an * bn, ad * bd
    else:
        n, d = an * bd, ad * bn
    common = gcd(n, d) if d > 0 else -gcd(n, d)
    return n // common, d // common


def join(left: tuple, op: str, right: tuple) -> tuple[tuple[str, ...], int]:
    """left op right with brackets only where reading from the left needs them."""
    (a, a_priority), (b, b_priority) = left, right
    priority = 1 if op in "+-" else 2
    if a_priority < priority:
        a = ("(", *a, ")")
    if b_priority < priority or (b_priority == priority and op in "-/"):
        b = ("(", *b, ")")
    return (*a, op, *b), priority


def is_held_out(values: Sequence[int]) -> bool:
    """A fixed split of the multisets of values: about a fifth is held out."""
    text = " ".join(str(value) for value in sorted(values))
    number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
    return number < HELD_OUT_SHARE * 2**64
