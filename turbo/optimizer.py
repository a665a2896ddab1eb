"""The optimizer: AdamW for policy and critic, and what a checkpoint keeps of it.

Left out: when it steps (`turbo.train`), gradients (`turbo.update`).
"""

import torch
from torch import Tensor

from turbo.checkpoint import section
from turbo.config import TrainConfig
from turbo.update import Learner

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


def new_optimizer(learner: Learner, c: TrainConfig) -> torch.optim.Optimizer:
    """AdamW without weight decay; with 8-bit moments on request (Dettmers et al. 2022).

    A group each for policy and critic: `scale` times the policy's learning rate is its own, `norm`
    is the figure of its gradient.
    """
    kind = torch.optim.AdamW
    if c.optimizer == "adamw8bit":
        try:
            from bitsandbytes.optim import AdamW8bit as kind
        except ImportError as error:
            raise ValueError(
                "--optimizer adamw8bit needs bitsandbytes: pip install 'gtr-turbo[nf4]'"
            ) from error
    groups = [dict(params=learner.lora.parameters(), scale=1.0, norm="grad_norm")]
    if learner.value_head is not None:
        scale = (c.critic_learning_rate or c.learning_rate) / c.learning_rate
        critic = list(learner.value_head.parameters())
        groups.append(dict(params=critic, scale=scale, norm="critic_grad_norm"))
    return kind(groups, lr=c.learning_rate, eps=c.adam_eps, weight_decay=0.0)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of an optimizer's moments and step counts on the CPU, as named tensors.

    On the CPU, for a card that training fills has no room for a second set of moments; copies, for
    bitsandbytes' share what safetensors wants apart.
    """
    out = {}
    for i, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            out[f"optimizer/{i}/{name}"] = torch.as_tensor(value).to("cpu", copy=True)
    return out


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Restore what `optimizer_tensors` gave: the moments of every parameter, or of none."""
    parameters = _parameters(optimizer)
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in section(tensors, "optimizer/").items():
        i, _, name = key.partition("/")
        state.setdefault(int(i), {})[name] = value
    if state and sorted(state) != list(range(len(parameters))):
        raise ValueError(f"moments of {len(state)} parameters, expected {len(parameters)}")
    coded = type(optimizer).__name__ == "AdamW8bit"
    for i, values in state.items():
        want = _coded_moments(parameters[i]) if coded else _moments(parameters[i])
        found = {name: (value.shape, value.dtype) for name, value in values.items()}
        found.pop("step", None)
        if found != want or values.get("step", torch.ones(1)).numel() != 1:
            raise ValueError(f"the moments of parameter {i} are not {want}")
    if coded:  # its own way takes no plain tensors
        for i, values in state.items():
            moments = {k: v.to(parameters[i].device) for k, v in values.items()}
            optimizer.state[parameters[i]] = moments | {"step": int(values["step"])}
        return
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _moments(p: Tensor) -> dict[str, tuple]:
    """Shapes and dtypes of AdamW's moments."""
    return dict.fromkeys(MOMENTS, (p.shape, torch.float32))


def _coded_moments(p: Tensor) -> dict[str, tuple]:
    """Those of bitsandbytes' 8-bit AdamW; small parameters are not coded."""
    if p.numel() < 4096:
        return dict.fromkeys(("state1", "state2"), (p.shape, torch.float32))
    out = dict.fromkeys(("state1", "state2"), (p.shape, torch.uint8))
    out |= dict.fromkeys(("qmap1", "qmap2"), (torch.Size([256]), torch.float32))
    blocks = torch.Size([-(-p.numel() // 256)])
    return out | dict.fromkeys(("absmax1", "absmax2"), (blocks, torch.float32))
