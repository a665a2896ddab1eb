"""What comes next in an answer of Points24 or EZPoints, for drafts that the model then verifies.

A guess may use the true cards: it saves time and never changes what is sampled. The thought is the
previous one where its plan still fits, else an expert's plan that begins as it is written, else
what follows from the operations written: their results, the numbers left, the formula they compose.
Left out: the format of an answer (formula.py) and its skeleton (base.continue_answer).
"""

import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache

from turbo.envs.base import Guess, continue_answer, fixed_value, word_after
from turbo.envs.cards import OPERATORS, join, rank_value, tokenize
from turbo.envs.formula import NEXT, SO, FormulaGame, next_token, plans, thought_text

EVERY = 1_000  # no hand has as many plans

_NUMBER = re.compile(r"(-?[0-9]{1,9})(?:/([0-9]{1,9}))?")
_OPERATION = re.compile(rf"({_NUMBER.pattern})([-+*/])({_NUMBER.pattern})")

Values = tuple[str, ...]
Tokens = tuple[str, ...]


def guess_answer(
    written: str, previous: str | None, game: FormulaGame, faces_ten: bool = True
) -> str:
    """See VisualEnv.guess_answer."""
    begun = tuple(game.tokens)
    ranks, again = game.ranks, None
    if previous is not None:
        ranks = _cards_of(previous, len(ranks)) or ranks
        again = _thought_again(previous, begun)
    more = ""

    def guess_thought(fields: list[str], rest: str) -> str | None:
        nonlocal more
        if again is not None and again.startswith(rest):
            return again
        values = _values_of(tuple(fields[:-1]), faces_ten)
        if values is None:
            return None
        if NEXT not in rest:
            for limit in (game.limit, EVERY):
                texts = _expert_thoughts(values, game.target, game.operators, begun, limit)
                at = bisect_left(texts, rest) if rest else 0
                if at < len(texts) and texts[at].startswith(rest):
                    return texts[at]
        text, whole = _work_on(rest, values, begun, game.target, game.operators)
        if whole:
            return text
        more = text[len(rest) :]
        return None

    def guess_action(fields: list[str], rest: str) -> str | None:
        action = word_after(fields[-1], NEXT)
        return rest or action if action is None or not action.startswith(rest) else action

    leads = ['{"cards": ["'] + ['", "'] * (len(ranks) - 1)
    parts: list[tuple[str, Guess]] = [
        (lead, fixed_value(rank)) for lead, rank in zip(leads, ranks, strict=True)
    ]
    parts.append(('"], "formula": "', fixed_value(game.formula)))
    parts.append(('", "thoughts": "', guess_thought))
    parts.append(('", "action": "', guess_action))
    return continue_answer(written, parts) + more


# --- what is known before a thought begins


@lru_cache(maxsize=4_096)
def _cards_of(answer: str, count: int) -> list[str] | None:
    """The cards as the previous answer read them: the model will read them so again."""
    head = '{"cards": ["'
    end = answer.find('"]')
    cards = answer[len(head) : end].split('", "') if answer.startswith(head) and end > 0 else []
    return cards if len(cards) == count and not any('"' in card for card in cards) else None


@lru_cache(maxsize=4_096)
def _thought_again(answer: str, begun: Tokens) -> str | None:
    """The previous thought with its next token moved on, if its aim continues the formula."""
    start = answer.find('"thoughts": "') + len('"thoughts": "')
    thought = answer[start : answer.find('"', start)]
    cut = thought.rfind(NEXT)
    so = thought.rfind(SO, 0, max(cut, 0))
    plan = _tokens(thought[so + len(SO) : cut]) if so >= 0 else None
    if plan is None or plan[: len(begun)] != begun:
        return None
    return thought[:cut] + NEXT + next_token(plan, len(begun))


@lru_cache(maxsize=4_096)
def _values_of(cards: tuple[str, ...], faces_ten: bool) -> Values | None:
    """The cards' values in ascending order, None where a name is no card's."""
    try:
        return tuple(str(value) for value in sorted(rank_value(card, faces_ten) for card in cards))
    except ValueError:
        return None


@lru_cache(maxsize=16_384)
def _expert_thoughts(
    values: Values, target: int, operators: str, begun: Tokens, limit: int
) -> tuple[str, ...]:
    """The thoughts that aim at an expert's plans, sorted by their text."""
    found = plans(tuple(map(int, values)), target, operators, begun, limit)
    return tuple(sorted(thought_text(plan, len(begun)) for plan in found))


# --- what follows from the operations written


@lru_cache(maxsize=4_096)
def _work_on(
    rest: str, values: Values, begun: Tokens, target: int, operators: str
) -> tuple[str, bool]:
    """`rest` of a thought continued as far as it is determined, and whether that is its end."""
    text, left, steps = "", list(values), []
    for _ in range(len(values) - 1):
        tail = rest[len(text) :]
        if tail.startswith(SO) or len(left) == 1:  # the formula is told early
            break
        line, step, left = _guess_line(tail, left, target, operators)
        text += line
        if step is None:
            return text + rest[len(text) :], False
        text += ", "
        steps.append(step)
    done, whole = _guess_formula(rest[len(text) :], tuple(steps), values, begun)
    text += done
    return (text, whole) if text.startswith(rest) else (rest, False)


def _guess_line(
    tail: str, left: list[str], target: int, operators: str
) -> tuple[str, str | None, list[str]]:
    """(the line "1 4 5 10: 10-4=6", its operation, the numbers left after it).

    `left` may be empty: not known. Without an operation the line is as far as it is known.
    """
    lead = " ".join(sorted(left, key=_size)) + ": " if left else ""
    if not lead or not (tail.startswith(lead) or lead.startswith(tail)):
        numbers, colon, _ = tail.partition(": ")
        left = numbers.split(" ")
        if not colon or len(left) < 2 or any(_number(number) is None for number in left):
            return "", None, []
        lead = numbers + colon
    head, equals, after = tail[len(lead) :].partition("=")
    operation = head if equals else _guess_operation(head, left, target, operators)
    if operation is None:
        return lead, None, []
    exact, others = _worked_out(operation, left)
    result, comma, _ = after.partition(",")
    if not comma and exact is not None and exact.startswith(result):
        result = exact
    step = f"{operation}={result}"
    if not result:
        return lead + step, None, []
    known = others is not None and _number(result) is not None
    left = [*others, result] if known else []
    return lead + step, step, left


def _guess_operation(head: str, left: list[str], target: int, operators: str) -> str | None:
    """The operation that begins with `head`, if the numbers left allow but one.

    Of the last two numbers it is one that reaches the target.
    """
    near = None
    for a, sign, b, others in _splits(head, left):
        if b in others:
            return head
        fits = {other for other in others if other.startswith(b)}
        if len(fits) == 1 and near is None:
            near = a + sign + fits.pop()
    if near is not None:
        return near
    if len(left) == 2 and not any(True for _ in _splits(head, left)):
        for a, b in (left, left[::-1]):
            for sign in OPERATORS:
                hits = sign in operators and _result(a, sign, b) == str(target)
                if hits and f"{a}{sign}{b}".startswith(head):
                    return f"{a}{sign}{b}"
    return head if _OPERATION.fullmatch(head) else None


def _splits(text: str, left: list[str]) -> Iterator[tuple[str, str, str, list[str]]]:
    """The ways to read "a sign b" whose a is among the numbers left: (a, sign, b, the others)."""
    for a in sorted(set(left), key=len, reverse=True):
        sign = text[len(a) : len(a) + 1]
        if sign and sign in "+-*/" and text.startswith(a):
            yield a, sign, text[len(a) + 1 :], _without(left, a)


def _worked_out(operation: str, left: list[str]) -> tuple[str | None, list[str] | None]:
    """(exact result, the numbers left beside it); None for what is not known."""
    for a, sign, b, others in _splits(operation, left):
        if b in others:
            return _result(a, sign, b), _without(others, b)
    read = _OPERATION.fullmatch(operation)
    return (_result(read[1], read[4], read[5]) if read else None), None


def _guess_formula(
    tail: str, steps: tuple[str, ...], values: Values, begun: Tokens
) -> tuple[str, bool]:
    """The end of a thought, "so (10-4)*(5-1), next 4", and whether it is whole."""
    formula, comma, _ = tail[len(SO) :].partition(",")
    if not comma:
        composed = _compositions(steps, values, begun)
        texts = map("".join, composed)
        formula = next((text for text in texts if text.startswith(formula)), None)
        if formula is None:
            return (tail if len(tail) > len(SO) else SO), False
    text = SO + formula + NEXT
    plan = _tokens(formula)
    if plan is None:
        return text + tail[len(text) :], False
    token, word = next_token(plan, len(begun)), tail[len(text) :]
    return text + (token if token.startswith(word) else word), True


@lru_cache(maxsize=4_096)
def _compositions(steps: tuple[str, ...], values: Values, begun: Tokens) -> tuple[Tokens, ...]:
    """The formulas whose operations, in order, are `steps`; first those that continue `begun`."""
    if len(steps) != len(values) - 1:
        return ()
    found = dict.fromkeys(_compose(steps, [(value, (value,), 3) for value in values]))
    return tuple(sorted(found, key=lambda plan: plan[: len(begun)] != begun))


def _compose(steps: Sequence[str], pool: list[tuple]) -> Iterator[Tokens]:
    """`pool` holds (value, tokens, priority). The numbers reached last are tried first."""
    if not steps:
        yield pool[0][1]
        return
    head, _, result = steps[0].partition("=")
    for a in dict.fromkeys(reversed(pool)):
        sign = head[len(a[0]) : len(a[0]) + 1]
        if not sign or sign not in "+-*/" or not head.startswith(a[0]):
            continue
        others = _without(pool, a)
        for b in dict.fromkeys(reversed(others)):
            if b[0] == head[len(a[0]) + 1 :]:
                joined = join(a[1:], sign, b[1:])
                yield from _compose(steps[1:], [*_without(others, b), (result, *joined)])


def _without(items: list, item: object) -> list:
    at = items.index(item)
    return items[:at] + items[at + 1 :]


# --- numbers as they are written


@lru_cache(maxsize=4_096)
def _number(text: str) -> Fraction | None:
    match = _NUMBER.fullmatch(text)
    if match is None or (match[2] and not int(match[2])):
        return None
    return Fraction(int(match[1]), int(match[2] or 1))


@lru_cache(maxsize=4_096)
def _size(text: str) -> Fraction:
    return _number(text) or Fraction(0)


@lru_cache(maxsize=4_096)
def _result(a: str, sign: str, b: str) -> str | None:
    x, y = _number(a), _number(b)
    if x is None or y is None or (sign == "/" and not y):
        return None
    return str(x + y if sign == "+" else x - y if sign == "-" else x * y if sign == "*" else x / y)


@lru_cache(maxsize=4_096)
def _tokens(text: str) -> Tokens | None:
    try:
        return tuple(tokenize(text))
    except ValueError:
        return None
