"""LoRA factors on the text model, and the weights they make with the base.

Left out: runnable weights (`turbo.fused`, `turbo.modules`); merging factors (`turbo.merging`).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Lora:
    """LoRA factors by module name: `delta = scale * B @ A`, A [r, in] and B [out, r], float32."""

    factors: dict[str, tuple[Tensor, Tensor]]
    scale: float
    rank: int

    def parameters(self) -> list[Tensor]:
        """All factors, in a fixed order."""
        return [t for pair in self.factors.values() for t in pair]

    def state_dict(self) -> dict[str, Tensor]:
        """The factors under the names of a peft adapter."""
        out = {}
        for name, (a, b) in self.factors.items():
            out[f"base_model.model.{name}.lora_A.weight"] = a.detach()
            out[f"base_model.model.{name}.lora_B.weight"] = b.detach()
        return out

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy factors in; names and shapes must be those of this model."""
        own = self.state_dict()
        if set(own) != set(state):
            odd = sorted(set(own) ^ set(state))[0]
            raise ValueError(
                f"the adapter is of another model: {odd!r} is only on one side; "
                "use the checkpoint with the model it was trained from"
            )
        with torch.no_grad():
            for name, value in own.items():
                other = state[name]
                if value.shape != other.shape or not other.is_floating_point():
                    raise ValueError(
                        f"adapter tensor {name!r} is {other.dtype} {tuple(other.shape)}, "
                        f"expected floating point {tuple(value.shape)}: another rank or model"
                    )
                value.copy_(state[name])


def new_lora(matrices: Mapping[str, Tensor], rank: int, alpha: float, seed: int) -> Lora:
    """Fresh factors, A uniform and B zero, on every linear layer of the text model.

    Embeddings and head have none. They are float32 and stand where the matrices do.
    """
    if rank < 1:
        raise ValueError(f"lora rank must be at least 1, got {rank}")
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for name, weight in matrices.items():
        module = name.removesuffix(".weight")
        if ".layers." not in name or not name.endswith(".weight") or len(weight.shape) != 2:
            continue
        out_features, in_features = weight.shape
        bound = 1 / math.sqrt(in_features)  # kaiming_uniform with a = sqrt(5), as peft
        a = (torch.rand(rank, in_features, generator=generator) * 2 - 1) * bound
        a, b = a.to(weight.device), torch.zeros(out_features, rank, device=weight.device)
        factors[module] = (a.requires_grad_(), b.requires_grad_())
    return Lora(factors, alpha / rank, rank)


def effective(matrices: Mapping[str, Tensor], lora: Lora | None) -> dict[str, Tensor]:
    """Weights of the policy: base + s * B @ A where there are factors, the base elsewhere."""
    out = dict(matrices)
    if lora is not None:
        for module, (a, b) in lora.factors.items():
            out[module + ".weight"] = torch.addmm(
                matrices[module + ".weight"], b, a, alpha=lora.scale
            )
    return out
