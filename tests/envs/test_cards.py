"""The exact evaluator and the solver, against independent ways to the same answers."""

import ast
from fractions import Fraction
from functools import cache
from itertools import combinations_with_replacement, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from turbo.envs.cards import (
    evaluate,
    is_held_out,
    operations,
    rank_value,
    read_hand,
    solutions,
    solvable,
    tokenize,
)

HANDS = list(combinations_with_replacement(range(1, 11), 4))
TOKENS = [*(str(n) for n in range(1, 11)), "+", "-", "*", "/", "(", ")"]


def oracle(tokens: list[str]) -> Fraction | None:
    """Python's own parser, walked with fractions; only what the grammar allows."""
    try:
        return _walk(ast.parse(" ".join(tokens), mode="eval").body)
    except (SyntaxError, ZeroDivisionError, ValueError):
        return None


def _walk(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if not isinstance(node, ast.BinOp):
        raise ValueError("a sign, a call, or another thing the game does not have")
    left, right = _walk(node.left), _walk(node.right)
    match node.op:
        case ast.Add():
            return left + right
        case ast.Sub():
            return left - right
        case ast.Mult():
            return left * right
        case ast.Div():
            return left / right
    raise ValueError("** or //")


formulas = st.recursive(
    st.integers(1, 10).map(lambda n: [str(n)]),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner, st.booleans()).map(
        lambda p: ["(", *p[0], p[1], *p[2], ")"] if p[3] else [*p[0], p[1], *p[2]]
    ),
    max_leaves=8,
)


@pytest.mark.fuzz
@given(formulas)
def test_valid_formulas_have_the_oracles_value(tokens):
    assert evaluate(tokens) == oracle(tokens)


@pytest.mark.fuzz
@given(st.lists(st.sampled_from(TOKENS), max_size=12))
def test_any_tokens_have_the_oracles_value(tokens):
    try:
        expected = oracle(tokens)
    except TypeError:  # a call, such as 3(4)
        expected = None
    assert evaluate(tokens) == expected


NO_FORMULA = [
    [],
    ["1", "+"],
    ["10", "4"],
    ["(", "1"],
    ["(", ")"],
    ["-", "3"],
    ["1", "*", "*", "2"],
    ["1", "/", "(", "2", "-", "2", ")"],
    ["("] * 300 + ["1"] + [")"] * 300,
    ["("] * 90 + ["1"] + [")"] * 90,
    ["9" * 5000],
    ["²"],
]


@pytest.mark.parametrize("tokens", NO_FORMULA)
def test_what_is_no_formula_has_no_value(tokens):
    assert evaluate(tokens) is None


def test_fractions_are_exact_where_floats_fail():
    assert 8 / (3 - 8 / 3) != 24
    assert evaluate(tokenize("8/(3-8/3)")) == 24
    worked = ["8/3=8/3", "3-8/3=1/3", "8/1/3=24"]
    assert written(operations(tokenize("8/(3-8/3)"))) == worked


def test_tokenize_keeps_runs_of_digits_and_names_what_it_refuses():
    assert tokenize("(10-4) * 1") == ["(", "10", "-", "4", ")", "*", "1"]
    with pytest.raises(ValueError, match="2x"):
        tokenize("2x")
    with pytest.raises(ValueError):
        tokenize("1" * 5_000 + "x")  # in no time: no backtracking


def test_operations_are_in_post_order():
    worked = ["10-4=6", "5-1=4", "6*4=24"]
    assert written(operations(tokenize("(10-4)*(5-1)"))) == worked
    with pytest.raises(ValueError, match="valid"):
        operations(["10", "-"])


def written(steps: list[tuple]) -> list[str]:
    return [f"{a}{sign}{b}={result}" for a, sign, b, result in steps]


@cache
def reachable(values: tuple[int, ...]) -> frozenset:
    """Brute force: replace any two numbers by any result, until one is left."""
    if len(values) == 1:
        return frozenset([Fraction(values[0])])
    found = set()
    for i, j in product(range(len(values)), repeat=2):
        if i == j:
            continue
        rest = [v for k, v in enumerate(values) if k not in (i, j)]
        a, b = Fraction(values[i]), Fraction(values[j])
        results = {a + b, a - b, a * b} | ({a / b} if b else set())
        for result in results:
            found |= reachable(tuple(sorted([*rest, result])))
    return frozenset(found)


def test_the_solver_agrees_with_brute_force_on_all_715_hands():
    assert len(HANDS) == 715
    assert [solvable(h) for h in HANDS] == [Fraction(24) in reachable(h) for h in HANDS]


def test_566_hands_and_20876_of_28561_ordered_draws_can_be_won():
    assert sum(solvable(hand) for hand in HANDS) == 566
    values = [min(rank, 10) for rank in range(1, 14)]
    draws = product(values, repeat=4)
    assert sum(solvable(tuple(sorted(draw))) for draw in draws) == 20_876


def test_every_solution_is_distinct_sorted_exact_and_uses_the_hand():
    for hand in HANDS:
        found = solutions(hand)
        assert list(found) == sorted(set(found), key=lambda t: (len(t), "".join(t)))
        for tokens in found:
            assert evaluate(tokens) == 24
            assert sorted(int(t) for t in tokens if t.isdigit()) == list(hand)


def test_solutions_have_no_needless_bracket():
    """With other numbers in their place, leaving out any pair of brackets changes the value."""
    for hand in HANDS[::7]:
        for solution in solutions(hand):
            numbers = iter(["101", "307", "509", "719"])
            tokens = tuple(next(numbers) if token.isdigit() else token for token in solution)
            for start in (i for i, token in enumerate(tokens) if token == "("):
                end = _closing(tokens, start)
                bare = tokens[:start] + tokens[start + 1 : end] + tokens[end + 1 :]
                assert evaluate(bare) != evaluate(tokens)


def _closing(tokens: tuple[str, ...], start: int) -> int:
    depth = 0
    for i in range(start, len(tokens)):
        depth += (tokens[i] == "(") - (tokens[i] == ")")
        if depth == 0:
            return i
    raise AssertionError("unbalanced")


def test_other_targets_and_sizes():
    assert solutions((2, 10), 12) == (("10", "+", "2"), ("2", "+", "10"))
    assert solutions((5,), 5) == (("5",),)
    assert all(evaluate(tokens) == 0 for tokens in solutions((1, 1, 2, 2), 0))
    assert solvable((1, 1, 2, 2), 0)
    assert solutions((10, 5, 4, 1)) == solutions((1, 4, 5, 10))


def test_the_held_out_split_is_fixed_and_about_a_fifth():
    held = [hand for hand in HANDS if is_held_out(hand)]
    assert 0.15 < len(held) / 715 < 0.25
    assert is_held_out((10, 5, 4, 1)) == is_held_out((1, 4, 5, 10))
    assert held[:3] == [(1, 1, 1, 1), (1, 1, 1, 3), (1, 1, 1, 8)]


def test_ranks():
    assert [rank_value(r) for r in ("A", "10", "J", "Q", "K")] == [1, 10, 10, 10, 10]
    assert [rank_value(r, faces_ten=False) for r in ("J", "Q", "K")] == [11, 12, 13]
    assert read_hand([1, "10", 13], 3) == ("A", "10", "K")
    with pytest.raises(ValueError, match="'11'"):
        read_hand(["11", "A", "2", "3"], 4)
    with pytest.raises(ValueError, match="3 cards"):
        read_hand(["A", "2", "3"], 4)
