"""What the policy head is raced against, and what each computes: the table of `bench.policy_head`.

Three tasks, since most rivals know a part of ours only:

    all three    log-probability, entropy and reverse KL of every row
    logprob      the log-probability alone
    reverse KL   the mean over the rows of the exact divergence to the teacher

A loss has no other outputs, so it is compared by its value and its gradient. Ours is there twice: a
function whose outputs may enter any loss, and `policy_head_loss`, which is given the loss, as the
rivals that are losses have theirs, and is raced with gradients alone. The settings are each rival's
own defaults, but for what the task needs, and cut-cross-entropy drops no small gradients.

Left out: measuring (`bench.policy_head`).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.race import needs_cuda
from turbo.kernels.policy_head import policy_head
from turbo.kernels.policy_head_loss import policy_head_loss
from turbo.kernels.reference import PolicyHeadOutput

# hidden, W, targets, teacher; and the loss of the outputs, for what is given it
Head = Callable[..., tuple[Tensor, ...]]


@dataclass(frozen=True)
class Variant:
    """An implementation, and what it computes in terms of the reference."""

    call: Head
    truth: Callable[[PolicyHeadOutput], tuple[Tensor, ...]]
    given_loss: bool = False  # the call takes the loss and returns its value


def all_three(out: PolicyHeadOutput) -> tuple[Tensor, ...]:
    """Everything the policy loss needs."""
    return out.logprob, out.entropy, out.reverse_kl


def logprob(out: PolicyHeadOutput) -> tuple[Tensor, ...]:
    """The log-probabilities."""
    return (out.logprob,)


def mean_nll(out: PolicyHeadOutput) -> tuple[Tensor, ...]:
    """The cross-entropy loss."""
    return (-out.logprob.mean(),)


def mean_ratio(out: PolicyHeadOutput) -> tuple[Tensor, ...]:
    """GRPO's loss on the policy that sampled, with advantage 1: -1, and a gradient."""
    return (-(out.logprob - out.logprob.detach()).exp().mean(),)


def mean_reverse_kl(out: PolicyHeadOutput) -> tuple[Tensor, ...]:
    """The distillation loss."""
    return (out.reverse_kl.mean(),)


def ours(*want: str, chunk_elements: int | None = None) -> Head:
    """The kernel, asked for some of its outputs."""

    def call(hidden, weight, targets, teacher):
        if want == ("logprob",):
            teacher = None
        options = dict(teacher_hidden=teacher, want=want, chunk_elements=chunk_elements)
        out = policy_head(hidden, weight, targets, **options)
        return tuple(getattr(out, name) for name in want)

    return call


def ours_given_loss(*want: str, mean: bool = False, piece_elements: int | None = None) -> Head:
    """The kernel that forms the gradient beside the loss, which is a sum over rows."""

    def call(hidden, weight, targets, teacher, loss):
        if want == ("logprob",):
            teacher = None
        share = 1 / len(hidden) if mean else 1.0

        def of_piece(out: PolicyHeadOutput, rows: slice) -> Tensor:
            return loss([getattr(out, name) * share for name in want])

        options = dict(teacher_hidden=teacher, want=want, piece_elements=piece_elements)
        return policy_head_loss(hidden, weight, targets, of_piece, **options)

    return call


def ours_reverse_kl(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """The kernel's divergence, averaged as the losses do it."""
    return (ours("reverse_kl")(hidden, weight, targets, teacher)[0].mean(),)


def eager(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """What one writes first: dense [T, V] logits, and autograd."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher @ weight.T).float().log_softmax(-1)
    p = log_p.exp()
    logprob = log_p.gather(1, targets[:, None])[:, 0]
    return logprob, -(p * log_p).sum(-1), (p * (log_p - log_q)).sum(-1)


def compiled(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """The same through torch.compile, which keeps what it has compiled."""
    return torch.compile(eager)(hidden, weight, targets, teacher)


def eager_logprob(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """The cross-entropy of dense logits."""
    logits = (hidden @ weight.T).float()
    return (-torch.nn.functional.cross_entropy(logits, targets, reduction="none"),)


def eager_reverse_kl(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """The divergence of dense logits."""
    log_p = (hidden @ weight.T).float().log_softmax(-1)
    with torch.no_grad():
        log_q = (teacher @ weight.T).float().log_softmax(-1)
    return ((log_p.exp() * (log_p - log_q)).sum(-1).mean(),)


def liger_cross_entropy(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """Liger's fused linear cross-entropy."""
    needs_cuda(hidden)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return (LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets),)


def liger_grpo(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """Liger's chunked GRPO loss: all rows are one sequence, its advantage is 1, no reference."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="grpo")
    mask, advantage = torch.ones_like(targets)[None], torch.ones(1, device=hidden.device)
    return (loss(hidden[None], weight, targets[None], mask, advantage)[0],)


def cut_cross_entropy(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """Cut cross-entropy, with exact gradients."""
    needs_cuda(hidden)
    from cut_cross_entropy import linear_cross_entropy

    return (linear_cross_entropy(hidden, weight, targets, filter_eps=None),)


def liger_jsd(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """Liger's fused linear Jensen-Shannon divergence, which is the reverse KL at beta = 1."""
    needs_cuda(hidden)
    from liger_kernel.transformers import LigerFusedLinearJSD

    return (LigerFusedLinearJSD(jsd_beta=1.0)(hidden, weight, teacher, weight, targets),)


def liger_distillation(hidden, weight, targets, teacher) -> tuple[Tensor, ...]:
    """Liger's chunked distillation loss: no share for the labels, beta = 1."""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=1.0)
    return (loss(hidden, weight, teacher, weight, targets),)


ALL_THREE = ("logprob", "entropy", "reverse_kl")
TASKS: dict[str, dict[str, Variant]] = {
    "policy_head": {
        "ours": Variant(ours(*ALL_THREE), all_three),
        "ours, given the loss": Variant(ours_given_loss(*ALL_THREE), all_three, True),
        "eager": Variant(eager, all_three),
        "torch.compile": Variant(compiled, all_three),
    },
    "policy_head logprob": {
        "ours": Variant(ours("logprob"), logprob),
        "ours, given the loss": Variant(ours_given_loss("logprob"), logprob, True),
        "eager": Variant(eager_logprob, logprob),
        "liger fused linear cross-entropy": Variant(liger_cross_entropy, mean_nll),
        "liger GRPO": Variant(liger_grpo, mean_ratio),
        "cut-cross-entropy": Variant(cut_cross_entropy, mean_nll),
    },
    "policy_head reverse KL": {
        "ours": Variant(ours_reverse_kl, mean_reverse_kl),
        "ours, given the loss": Variant(
            ours_given_loss("reverse_kl", mean=True), mean_reverse_kl, True
        ),
        "eager": Variant(eager_reverse_kl, mean_reverse_kl),
        "liger fused linear JSD": Variant(liger_jsd, mean_reverse_kl),
        "liger distillation": Variant(liger_distillation, mean_reverse_kl),
    },
}
PRODUCTS = {"policy_head": (2, 3), "policy_head logprob": (1, 2), "policy_head reverse KL": (2, 3)}
