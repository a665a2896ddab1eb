"""examples/policy_head_loop.py: its loss and gradients are those of whole logits, and it learns."""

import pytest
import torch

from examples import policy_head_loop as loop


def eager_loss(model, ids, advantage):
    """The same loss from [R, T, V] logits."""

    def log_softmax():
        return model(input_ids=ids).logits[:, loop.PROMPT - 1 : -1].log_softmax(-1).flatten(0, 1)

    with torch.no_grad(), model.disable_adapter():
        log_q = log_softmax()
    log_p = log_softmax()
    p = log_p.exp()
    logprob = log_p.gather(1, ids[:, loop.PROMPT :].flatten()[:, None])[:, 0]
    entropy, kl = -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)
    return 0.1 * kl.mean() - (advantage * logprob).mean() - 0.01 * entropy.mean()


def test_loss_and_gradients_are_those_of_whole_logits():
    model = loop.new_model()
    factors = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in factors:  # B begins at zero: policy and base would be one
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    ids = torch.randint(loop.VOCABULARY, (3, loop.PROMPT + loop.TOKENS), generator=generator)
    advantage = torch.randn(3 * loop.TOKENS, generator=generator)
    ours, eager = (f(model, ids, advantage) for f in (loop.loss_of, eager_loss))
    assert ours.item() == pytest.approx(eager.item(), rel=1e-5)
    own, wanted = (torch.autograd.grad(loss, factors) for loss in (ours, eager))
    for got, want in zip(own, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    assert max(g.abs().max().item() for g in wanted) > 1e-3


def test_it_learns():
    torch.manual_seed(0)
    shares = loop.train(24)
    assert sum(shares[:4]) / 4 < 0.6 and sum(shares[-4:]) / 4 > 0.65
