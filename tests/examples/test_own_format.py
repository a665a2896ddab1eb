"""examples/own_format.py: another form of answer is read, judged, and cut where the action is."""

import numpy as np
import pytest
import tiny_models

from examples.own_format import TaggedNumberLine
from turbo import tiny
from turbo.envs.make import check_env, tiny_kwargs

NAME = "examples.own_format:TaggedNumberLine"


def test_answers_of_the_expert_are_right_and_cut_at_their_action():
    vlm = tiny_models.random_model()
    check_env(NAME, needs_expert=True)
    env = TaggedNumberLine(**tiny_kwargs(NAME))
    for seed in range(8):
        env.reset(seed=seed)
        text = env.expert_answer(np.random.default_rng(0))
        answer = env.read_answer(f" {text}\n")
        assert answer.error is None and answer.text.strip() == text
        assert env.judge(answer).right and answer.fields["thoughts"] in text
        ids = vlm.encode(text)
        cut = vlm.thought_tokens(ids, env.action_key)
        assert text.startswith(vlm.decode(ids[:cut])) and "<do>" not in vlm.decode(ids[:cut])
        assert vlm.decode(ids[cut:]).count("<do>") == 1
        assert vlm.thought_tokens(ids) == len(ids)  # the key of JSON is not there


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"thoughts": "", "action": "+"}', "not <see>...</see>"),
        ("<see>2 to 5</see><think>so</think><do>walk</do>", "action 'walk' is not in the list"),
        ("<see>2 to 5</see><think>so</think><do>+</do> and so on", "not <see>...</see>"),
        ("", "not <see>...</see>"),
    ],
)
def test_other_answers_are_illegal(text, error):
    env = TaggedNumberLine()
    env.reset(seed=0)
    answer = env.read_answer(text)
    assert answer.action is None and error in answer.error and answer.text == text


def test_a_rollout_counts_thought_up_to_the_key_of_its_environment():
    """A model that can write little else than <do> does so now and then, by chance."""
    vlm = tiny_models.random_model()
    babble = tiny_models.with_banned(vlm, vlm.encode("<do>"))
    rollout = tiny_models.play(
        babble,
        steps=60,
        make_env=lambda: TaggedNumberLine(**tiny_kwargs(NAME)),
        temperature=5.0,
    )
    cut = 0
    for step in rollout.steps:
        assert step.thought == babble.thought_tokens(step.tokens, "<do>")
        cut += step.thought < len(step.tokens)
    assert cut > 3


def test_its_tokenizer_knows_words_and_never_whole_answers():
    """Four kinds of answers would become four tokens if nothing kept words apart."""
    env = TaggedNumberLine(**tiny_kwargs(NAME))
    tokenizer = tiny.tokenizer_of(NAME, env)
    env.reset(seed=5)
    text = env.expert_answer(np.random.default_rng(0))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    pieces = [tokenizer.decode([i]) for i in ids]
    assert max(map(len, pieces)) <= 6 and 15 < len(pieces) < 40
    assert " than" in pieces and "think" in pieces
