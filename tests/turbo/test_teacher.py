"""turbo/teacher.py: it changes with every checkpoint, at full strength, and is restored exactly."""

import itertools

import pytest
import tiny_models
import torch
import torch.nn.functional as F
from family_models import folder

from turbo.model import Engine, load
from turbo.teacher import Teacher, without

WAYS = [dict(merge=m, weighting=w) for m in ("ties", "linear") for w in ("sma", "ema", "score")]


def way_id(way):
    return "-".join(str(v) for v in way.values())


@pytest.fixture(scope="module")
def asked(vlm):
    """What all teachers of this file are asked: prefix tokens of one picture, and a row."""
    env = tiny_models.new_env("ezpoints")
    picture, _ = env.reset(seed=0)
    features, grid = vlm.see([picture])
    return (
        features,
        env.prompt("short").fixed,
        grid,
        torch.tensor([vlm.encode("10 2: 10+2=12, so 10+2")]),
    )


@torch.no_grad()
def logits(vlm, asked, weights):
    features, fixed, grid, row = asked
    prefix = vlm.prefix(weights, features, fixed, grid)
    return F.linear(vlm.text.final_norm(weights, vlm.suffix(weights, row, prefix)), weights.head)


def new_teacher(vlm, **changes):
    return Teacher(vlm, tiny_models.noisy_lora(vlm), tiny_models.new_config(**changes))


@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_the_teacher_changes_with_every_checkpoint(vlm, asked, way):
    teacher, seen = new_teacher(vlm, **way), []
    assert teacher.weights is None
    for k in range(4):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.1 + 0.2 * k)
        seen.append(logits(vlm, asked, teacher.weights))
        assert (seen[-1] - logits(vlm, asked, vlm.weights())).abs().max() > 1e-2
    for k in range(3):
        assert (seen[k + 1] - seen[k]).abs().max() > 1e-3


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("way", WAYS, ids=way_id)
def test_identical_checkpoints_are_that_checkpoint(vlm, asked, way, count):
    """At density 1; a teacher of a quarter of the strength would fail."""
    lora = tiny_models.noisy_lora(vlm, 3)
    teacher = new_teacher(vlm, density=1.0, **way)
    for k in range(count):
        teacher.push(k, lora, 0.5)
    with torch.no_grad():
        policy = vlm.weights(lora)
    want = logits(vlm, asked, policy)
    assert (logits(vlm, asked, teacher.weights) - want).abs().max() < 1e-4
    for one, two in zip(teacher.weights.tensors(), policy.tensors(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-6)
    weaker = tiny_models.noisy_lora(vlm, 3)
    weaker.scale /= 4
    with torch.no_grad():
        assert (logits(vlm, asked, vlm.weights(weaker)) - want).abs().max() > 1e-2


def test_identical_checkpoints_at_density_08_are_the_trimmed_checkpoint(vlm, asked):
    lora = tiny_models.noisy_lora(vlm, 3)
    seen = []
    for count in (1, 5):
        teacher = new_teacher(vlm, density=0.8)
        for k in range(count):
            teacher.push(k, lora, 0.5)
        seen.append(logits(vlm, asked, teacher.weights))
    assert (seen[0] - seen[1]).abs().max() < 1e-4
    name = next(iter(lora.factors))
    a, b = lora.factors[name]
    moved = teacher.merged[name] - vlm.matrices[name + ".weight"]
    kept = moved.abs() > 1e-9
    assert kept.float().mean().item() == pytest.approx(0.8, abs=0.01)
    torch.testing.assert_close(moved[kept], (lora.scale * (b @ a))[kept], rtol=0, atol=1e-6)


@pytest.mark.parametrize("merge", ["ties", "linear"])
@pytest.mark.parametrize("weighting", ["sma", "ema"])
def test_running_sums_are_the_history(vlm, merge, weighting):
    sums = new_teacher(vlm, merge=merge, weighting=weighting, ema_alpha=0.3)
    history = new_teacher(vlm, merge=merge, weighting=weighting, ema_alpha=0.3, history_max=100)
    assert sums.streaming and not history.streaming
    for k in range(5):
        lora = tiny_models.noisy_lora(vlm, k)
        for teacher in (sums, history):
            teacher.push(k, lora, 0.5)
        for name, one in sums.merged.items():
            torch.testing.assert_close(one, history.merged[name], rtol=1e-4, atol=1e-5)
    assert len(history.history) == 5 and len(sums.history) == 0


@pytest.mark.parametrize(
    "way", [*WAYS, dict(merge="ties", weighting="ema", history_max=2)], ids=way_id
)
@pytest.mark.parametrize("merge_every", [1, 3])
def test_state_comes_back_bit_for_bit(vlm, way, merge_every):
    settings = dict(**way, merge_every=merge_every)
    teacher = new_teacher(vlm, **settings)
    for k in range(4):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.2 + k / 10)
    tensors, data = teacher.state_dict()
    other = new_teacher(vlm, **settings)
    other.load_state_dict({k: v.clone() for k, v in tensors.items()}, data)

    def same():
        for one, two in zip(teacher.weights.tensors(), other.weights.tensors(), strict=True):
            assert torch.equal(one, two)

    same()
    for k in range(4, 7):
        for t in (teacher, other):
            t.push(k, tiny_models.noisy_lora(vlm, k), 0.2 + k / 10)
        same()


@pytest.mark.parametrize("large", [True, False])
def test_a_state_of_before_entries_had_numbers(vlm, large):
    """Saved under their places, and what the history had dropped apart."""
    if large:
        vlm = load(folder("qwen3_vl"), torch.float32, Engine("modules"))
    settings = dict(weighting="score", history_max=2, merge_every=3)
    teacher = new_teacher(vlm, **settings)
    for k in range(5):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.2 + k / 10)
    tensors, data = teacher.state_dict()
    entries, dropped = data["history"]["entries"], data.get("dropped", [])
    assert [e["number"] for e in entries] == [3, 4]
    assert [e["number"] for e in dropped] == ([1, 2] if large else [])
    old, saved = {}, (("history", entries), ("dropped", dropped))
    places = {e["number"]: (part, i) for part, found in saved for i, e in enumerate(found)}
    for key, tensor in tensors.items():
        part, _, name = key.partition("/")
        number, _, rest = name.partition(".")
        at = places.get(int(number)) if part == "history" else None
        old[f"{at[0]}/{at[1]}.{rest}" if at else key] = tensor
    plain = [{k: v for k, v in e.items() if k != "number"} for e in (*entries, *dropped)]
    settings_of = {k: data["history"][k] for k in ("density", "history_max")}
    before = data | {"history": settings_of | {"entries": plain[:2]}}
    if large:
        before["dropped"] = {"density": 0.8, "history_max": 0, "entries": plain[2:]}
    other = new_teacher(vlm, **settings)
    other.load_state_dict(old, before)
    for t in (teacher, other):
        t.push(5, tiny_models.noisy_lora(vlm, 5), 0.9)
    wanted = {name: merged for name, merged, _ in teacher.dense()}
    assert all(torch.equal(merged, wanted[name]) for name, merged, _ in other.dense())
    _, again = other.state_dict()
    numbers = [e["number"] for e in (*again.get("dropped", []), *again["history"]["entries"])]
    assert len(set(numbers)) == len(numbers) >= 2 and numbers == sorted(numbers)


@pytest.mark.parametrize("settings", [{}, dict(history_max=2, merge_every=3)], ids=str)
def test_lost_entries_are_left_out_of_what_is_merged(settings):
    """The others are merged as if it had never been; where none is left, that is said."""
    vlm = load(folder("qwen3_vl"), torch.float32, Engine("modules"))
    way = dict(weighting="sma", **settings)
    teacher = new_teacher(vlm, **way)
    for k in range(5):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
    entries, _ = teacher.recipe
    numbers = [e.number for e in entries]
    assert numbers == ([1, 2] if settings else [0, 1, 2, 3, 4])
    tensors, data = teacher.state_dict()
    left = {k: v for k, v in tensors.items() if not k.startswith("history/1.")}
    other, wanted = new_teacher(vlm, **way), new_teacher(vlm, weighting="sma")
    other.load_state_dict(left, without(data, {1}))
    for k in numbers:
        if k != 1:
            wanted.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
    merged = {name: matrix for name, matrix, _ in wanted.dense()}
    for name, matrix, _ in other.dense():
        torch.testing.assert_close(matrix, merged[name], rtol=1e-5, atol=1e-6)
    other.push(5, tiny_models.noisy_lora(vlm, 5), 0.5)
    assert len({e.number for e in other.recipe[0]} - {1}) == len(other.recipe[0])
    with pytest.raises(ValueError, match="nothing is left of the history"):
        without(data, set(numbers))


def test_a_teacher_without_checkpoints_comes_back_too(vlm):
    tensors, data = new_teacher(vlm).state_dict()
    other = new_teacher(vlm)
    other.load_state_dict(tensors, data)
    assert other.weights is None and other.count == 0


def test_merge_every_keeps_the_teacher_in_between(vlm, asked):
    teacher, seen = new_teacher(vlm, merge_every=3), []
    for k in range(6):
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
        seen.append(logits(vlm, asked, teacher.weights))
    same = [torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    # the first checkpoint is there at once, then every third count
    assert same == [True, False, True, True, False]


def test_history_max_forgets(vlm, asked):
    short, last = new_teacher(vlm, history_max=2), new_teacher(vlm, history_max=2)
    for k in range(4):
        short.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
        if k >= 2:
            last.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
    assert torch.equal(logits(vlm, asked, short.weights), logits(vlm, asked, last.weights))


def test_scores_weigh(vlm):
    """A checkpoint that never won does not count."""
    teacher = new_teacher(vlm, weighting="score", merge="linear")
    won, lost = tiny_models.noisy_lora(vlm, 0), tiny_models.noisy_lora(vlm, 1)
    teacher.push(0, won, 0.6)
    teacher.push(1, lost, 0.0)
    for name, (a, b) in won.factors.items():
        want = vlm.matrices[name + ".weight"] + won.scale * (b @ a).detach()
        torch.testing.assert_close(teacher.merged[name], want, rtol=0, atol=1e-6)


def test_a_score_comes_when_the_checkpoint_has_played(vlm):
    """Until then it has the one of the checkpoint before."""
    teacher = new_teacher(vlm, weighting="score", merge="linear")
    teacher.rate(0.9)  # nobody has played yet
    teacher.push(0, tiny_models.noisy_lora(vlm, 0))
    assert [e.score for e in teacher.history.entries] == [0.0]
    teacher.rate(0.4)
    teacher.push(1, tiny_models.noisy_lora(vlm, 1))
    assert [e.score for e in teacher.history.entries] == [0.4, 0.4]
    teacher.rate(0.6)
    teacher.push(2, tiny_models.noisy_lora(vlm, 2), 0.8)
    assert [e.score for e in teacher.history.entries] == [0.4, 0.6, 0.8]


def test_the_initial_teacher_stays_the_warm_start(vlm, asked):
    teacher = new_teacher(vlm, teacher="initial")
    with torch.no_grad():
        want = logits(vlm, asked, vlm.weights())
    for k in range(3):
        assert torch.equal(logits(vlm, asked, teacher.weights), want)
        teacher.push(k, tiny_models.noisy_lora(vlm, k), 0.5)
    tensors, data = teacher.state_dict()
    assert tensors == {}
    other = new_teacher(vlm, teacher="initial")
    other.load_state_dict(tensors, data)
    assert torch.equal(logits(vlm, asked, other.weights), want)


def test_a_later_change_of_the_policy_does_not_reach_the_teacher(vlm):
    for changes in ({}, dict(history_max=3)):
        teacher, lora = new_teacher(vlm, **changes), tiny_models.noisy_lora(vlm, 0)
        teacher.push(0, lora, 0.5)
        before = [t.clone() for t in teacher.weights.tensors()]
        with torch.no_grad():
            for p in lora.parameters():
                p.add_(1.0)
        assert all(
            torch.equal(a, b) for a, b in zip(before, teacher.weights.tensors(), strict=True)
        )
        assert not any(t.requires_grad for t in teacher.weights.tensors())
