"""turbo/backprop.py: gradients in pieces are those of the whole, by transformers' own pass."""

import pytest
import tiny_models
import torch
import torch.nn.functional as F

from turbo import demos as demos_of
from turbo import sft
from turbo.backprop import backward_rows
from turbo.model import VisionLanguageModel, load
from turbo.parallel import Crew


@pytest.fixture(scope="module")
def trainable(random_folder):
    """A model of which everything is trained, as in the warm start."""
    model = load(random_folder, torch.float32)
    model.module.requires_grad_(True)
    return model


def own_cross_entropy(vlm: VisionLanguageModel, demos) -> torch.Tensor:
    """Summed cross-entropy of the answers, one row after the other."""
    total = 0.0
    parameters = dict(vlm.module.named_parameters())
    for demo in demos:
        for number, suffix, answer in zip(demo.shown, demo.suffixes, demo.answers, strict=True):
            pixels, grid = vlm.pixels([demo.pictures[number]]).values()
            prefix = vlm.encode(tiny_models.prefix_text(demo.fixed, int(grid.prod()) // 4))
            ids = [*prefix, *suffix, *answer]
            logits, _ = tiny_models.own_forward(vlm, parameters, ids, pixels, grid)
            predicted = logits[len(ids) - len(answer) - 1 : -1]
            total = total + F.cross_entropy(predicted, torch.tensor(answer), reduction="sum")
    return total


@pytest.mark.parametrize("game", ["ezpoints", "numberline"])  # one picture a deal; many
def test_all_parameters_get_the_gradient_of_transformers(trainable, game):
    vlm, env = trainable, tiny_models.new_env(game)
    demos = [demos_of.demonstrate(env, vlm, seed, states=n) for seed, n in ((0, 0), (1, 2), (2, 1))]
    assert len({len(d.answers) for d in demos}) > 1
    named = dict(vlm.module.named_parameters())
    loss = own_cross_entropy(vlm, demos)
    wanted = torch.autograd.grad(loss, list(named.values()))

    for p in named.values():
        p.grad = None
    weights = vlm.weights()
    local = weights.cut()
    vision, total, count = sft.backward_all(vlm, local, demos)
    weights.backward(local)
    for parameter, grad in zip(vlm.module.model.visual.parameters(), vision, strict=True):
        parameter.grad = grad
    assert total == pytest.approx(loss.item(), rel=1e-5)
    assert count == sum(len(a) for d in demos for a in d.answers)
    for (name, parameter), want in zip(named.items(), wanted, strict=True):
        scale = want.abs().max().item()
        assert parameter.grad is not None, name
        error = (parameter.grad - want).abs().max().item()
        assert error < 1e-4 * scale + 1e-5, f"{name}: {error} of {scale}"
    assert max(w.abs().max().item() for w in wanted) > 1


def test_the_size_of_the_pieces_does_not_matter(trainable, monkeypatch):
    vlm = trainable
    prompt = tiny_models.new_env("ezpoints")
    picture, _ = prompt.reset(seed=0)
    features, grid = vlm.see([picture, prompt.reset(seed=1)[0]])
    fixed = prompt.prompt("short").fixed
    texts = ["1", "12+3=15", "x" * 30, "so 4", "9"]
    suffixes = [vlm.encode(tiny_models.suffix_text(t)) for t in texts]
    answers = [vlm.encode(t + " 5*2") for t in reversed(texts)]

    def gradient():
        weights = vlm.weights()
        local = weights.cut()

        def loss(w, hidden, batch, rows):
            h = vlm.text.final_norm(w, hidden.flatten(0, 1)[batch.select[: len(batch.targets)]])
            seen.append(len(rows))
            return F.cross_entropy(F.linear(h, w.head), batch.targets, reduction="sum")

        with torch.no_grad():
            shown = features.clone()
        shared = (shown, fixed, grid, [0, 1, 0, 0, 1])
        backward_rows(vlm, local, *shared, suffixes, answers, loss)
        return [t.grad for t in local.tensors()]

    seen = []
    whole = gradient()
    assert seen == [5]
    own = backward_rows.__globals__["micro_batches"]
    monkeypatch.setitem(
        backward_rows.__globals__, "micro_batches", lambda lengths, size, tokens: own(lengths, 2)
    )
    seen.clear()
    pieces = gradient()
    assert seen == [2, 2, 1]
    for one, two in zip(whole, pieces, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


def test_cut_weights_are_leaves_that_share_the_numbers(vlm, trainable):
    frozen = vlm.weights().cut()
    assert not any(t.requires_grad for t in frozen.tensors())
    lora = tiny_models.noisy_lora(vlm)
    weights = vlm.weights(lora)
    local = weights.cut()
    for one, two in zip(weights.tensors(), local.tensors(), strict=True):
        assert two.is_leaf and two.requires_grad == one.requires_grad
        assert one.data_ptr() == two.data_ptr()
    layer = local.layers[0]
    assert layer.qkv.requires_grad
    assert local.head is local.embed  # tied: one tensor, one gradient
    assert len(local.tensors()) == 5 * vlm.text.layers + 2


def test_a_crew_of_one_trains_like_sft(trainable):
    """The warm start's own training lowers its loss."""
    from turbo.sft_config import SftConfig

    torch.manual_seed(0)
    settings = SftConfig(env="numberline", steps=6, deals=4, states=1, learning_rate=0.02)
    state = {k: v.clone() for k, v in trainable.module.state_dict().items()}
    first = sft.train_language(
        trainable,
        tiny_models.new_env(),
        Crew(),
        SftConfig(env="numberline", steps=1, deals=4, states=1),
        str,
    )
    last = sft.train_language(trainable, tiny_models.new_env(), Crew(), settings, str)
    trainable.module.load_state_dict(state)
    assert last < first
