"""Any family's text model, run by transformers' own decoder with a place for every role.

Every linear layer of the decoder becomes an `AdaptedLinear`: the pristine base (dense, or NF4), the
LoRA factors, and a view of one scratch buffer, as large as all of them. It computes in one of three
roles, which the weights that are handed to `forward` choose:

    base       x W^T
    adapted    x W^T + s (x A^T) B^T       training and scoring; no dense gradient ever exists
    scratch    x W^T + x M^T               M: the merged teacher's task vector, dense or in NF4
               x M^T                       in float32, or with `--play merged`; M: the teacher, or
                                           the policy, merged with its base

A sum would not survive a base in NF4: its values lie on the levels already, and coding them again
rounds away most of what training has added. Nor does all of it survive in bfloat16: where changes
are smaller than half a unit of the weight in the last place, as in the first updates of a run at a
learning rate of 1e-5, a merged policy is the base again. So the policy plays with base and factors
apart, in the very operations in which it is trained, and its log-probabilities are those of the
first pass of PPO. The scratch holds the teacher's task vector alone; coded, it is 9 % off.

The scratch is always filled from the pristine base: merging in and out of bfloat16 in place drifts.
It has one content at a time, and weights that refer to an older one are refused.

Keys and values pass through the caller's `attend` (the decoder believes that it has a cache), so
prompt prefixes are shared and rows stand where they like, whatever the family.

Prompts and answers that are read whole attend causally by FlashAttention-2, where it is installed
and on a GPU; everything else by PyTorch's own attention with a mask. Where few tokens of a row are
decoded, query heads that share keys attend together: transformers would repeat the whole cache for
every query head first, several times what the weights of a pass take.

Left out: vision and prompts (`turbo.model`, `turbo.families`), the merge of teachers
(`turbo.merging`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from turbo.attend import grouped_attention
from turbo.coded import Matrix, linear, merge_ground, room_like
from turbo.graphs import Record
from turbo.kernels.nf4 import quantize_nf4
from turbo.kernels.ties import linear_merge_lora
from turbo.lora import Lora

BASE, ADAPTED, SCRATCH = "base", "adapted", "scratch"
ATTENTION = "turbo_sdpa"  # our name for it in transformers
FEW = 16  # tokens of a row up to which heads are grouped


@dataclass(frozen=True)
class ModuleWeights:
    """Which weights the decoder is to run with."""

    role: str
    head: Tensor  # [V, D]
    content: int = 0  # of the scratch, where they lie in it
    lora: Lora | None = None  # with role `adapted`; in playing, rounded and in the scratch's memory

    def cut(self) -> "ModuleWeights":
        """The same: gradients reach the factors directly, nothing dense is in between."""
        return self

    def backward(self, leaves: "ModuleWeights") -> None:
        """Nothing is left to do."""


class AdaptedLinear(nn.Module):
    """A linear layer of the decoder in one of its roles."""

    def __init__(self, linear: nn.Linear, state: "_State", quantize: bool):
        super().__init__()
        self.state = state
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.coded = linear.weight, None
        if quantize:
            self.coded = quantize_nf4(linear.weight.data)
            self.weight = None
        self.bias = linear.bias
        self.scratch: Matrix | None = None
        self.factors: tuple[Tensor, Tensor] | None = None

    @property
    def base(self) -> Matrix:
        """The pristine matrix [out, in]."""
        return self.weight if self.coded is None else self.coded

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]"""
        if self.state.role == SCRATCH and not self.state.apart:
            return linear(x, self.scratch, self.bias)
        rows = x.flatten(0, -2)
        y = linear(rows, self.base, self.bias)  # a matrix of its own, which is added to in place
        if self.state.role == SCRATCH:
            y += linear(rows, self.scratch, None)
        elif self.state.role == ADAPTED:
            a, b = (factor.to(x.dtype) for factor in self.factors)
            y.addmm_(F.linear(rows, a), b.T, alpha=self.state.scale)
        return y.view(*x.shape[:-1], self.out_features)


@dataclass
class _State:
    """What all layers of a decoder share."""

    apart: bool  # base and what is added to it: the scratch holds no sum
    role: str = BASE
    scale: float = 1.0


def attention(module, query, key, value, mask, dropout=0.0, scaling=None, **options):
    """What transformers' decoders call: [R, H, L, hd] and keys in, [R, L, H, hd] out."""
    few = query.shape[2] <= FEW and not torch.is_grad_enabled()
    if few and mask is not None and key.shape[1] < query.shape[1]:
        out = grouped_attention(query, key, value, mask, scaling)
        return out.transpose(1, 2).contiguous(), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    more = dict(dropout=dropout, scaling=scaling, **options)
    return sdpa_attention_forward(module, query, key, value, mask, **more)


class _Attend:
    """What the decoder takes for its cache: every layer's keys and values go to `attend`."""

    is_compileable = False

    def __init__(self, attend: Callable):
        self.attend = attend

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """New keys and values [R, Hkv, L, hd] in, all to be attended to out."""
        return self.attend(layer, keys, values)

    def get_seq_length(self, layer: int = 0) -> int:
        """Asked for by families that count positions themselves; they are always given here."""
        return 0

    get_query_offset = get_seq_length  # asked for where there is no mask, to make none

    def get_mask_sizes(self, length: int, layer: int) -> tuple[int, int]:
        """Likewise."""
        return length, 0


class ModuleText:
    """The decoder of a loaded model, with the interface of `turbo.fused.FusedText`."""

    keys = 1
    small = False  # prefixes run a few at a time, within the budget of tokens

    def __init__(
        self,
        model: nn.Module,  # frozen; its linear layers are replaced
        *,
        device: torch.device | str = "cpu",
        quantize: bool = False,
        checkpointing: bool = True,
        record: Callable[[], Record] | None = None,  # decode steps, see `turbo.graphs`
        apart: bool | None = None,  # base and what was learned; None: where a sum would lose some
    ):
        from transformers import AttentionInterface
        from transformers.utils import is_flash_attn_2_available

        c = model.config.get_text_config()
        self.decoder = model.get_decoder()
        self.head = model.get_output_embeddings()
        self.dim, self.vocabulary = c.hidden_size, self.head.weight.shape[0]
        self.layers = c.num_hidden_layers
        self.dtype, self.device = self.head.weight.dtype, torch.device(device)
        self.linears = {}
        _refuse_other_heads(model, c, self.head)
        # The argument that the layers' keys and values go through: `cache` in newer transformers
        names = signature(self.decoder.forward).parameters
        self.cache = "cache" if "cache" in names else "past_key_values"
        self.record = record
        self.content, self.owner = 0, None  # what the scratch holds, and for whom
        half = self.dtype in (torch.bfloat16, torch.float16)
        self.apart = quantize or (half if apart is None else apart)
        self._state = _State(self.apart)
        self.flash = self.device.type == "cuda" and half and is_flash_attn_2_available()
        self.in_place = self.device.type == "cuda"  # how the cache is read, see `turbo.decode`
        if self.device.type == "cuda":
            # cuDNN's attention makes a plan for every new shape, half a second, and nearly
            # every batch here has one.
            torch.backends.cuda.enable_cudnn_sdp(False)
        AttentionInterface.register(ATTENTION, attention)
        self.decoder.set_attn_implementation(ATTENTION)
        self._adapt(model, quantize)
        fuse_norms(model)
        model.to(self.device)
        self.checkpointing(checkpointing)

    def _adapt(self, model: nn.Module, quantize: bool) -> None:
        """Put an `AdaptedLinear` in the place of every linear layer."""
        prefix = next(n for n, m in model.named_modules() if m is self.decoder)
        found = {
            name: module
            for name, module in self.decoder.layers.named_modules()
            if isinstance(module, nn.Linear)
        }
        if not found:
            raise ValueError(
                f"a {model.config.model_type} has no linear layers in its decoder that LoRA could "
                "adapt: use another model"
            )
        for name in list(found):
            module = found.pop(name).to(self.device)  # the only reference: it goes when it is coded
            parent, _, last = name.rpartition(".")
            adapted = AdaptedLinear(module, self._state, quantize)
            setattr(self.decoder.layers.get_submodule(parent), last, adapted)
            self.linears[f"{prefix}.layers.{name}"] = adapted

    @property
    def matrices(self) -> dict[str, Matrix]:
        """The pristine matrices that LoRA adapts, by parameter name."""
        return {name + ".weight": m.base for name, m in self.linears.items()}

    def checkpointing(self, wanted: bool) -> None:
        """Keep only every layer's input for the backward pass, and compute the rest again."""
        for layer in self.decoder.layers:
            layer.gradient_checkpointing = layer.training = wanted
            layer._can_checkpoint_with_cache = True  # `attend` has no side effect worth the name
            layer._gradient_checkpointing_func = partial(_checkpoint, self._state)

    def weights(self, lora: Lora | None = None) -> ModuleWeights:
        """Base + LoRA without merging; differentiable in the factors."""
        role = BASE if lora is None else ADAPTED
        return ModuleWeights(role, self.head.weight, lora=lora)

    def merged(self, w: ModuleWeights) -> ModuleWeights:
        """Weights to decode with: base and factors apart, which are rounded here once and not at
        every pass; or the policy merged into the scratch."""
        if w.role != ADAPTED:
            return w
        lora = w.lora
        if self.apart:
            return self._narrow(lora)

        def merge(name: str, base: Matrix, out: Matrix) -> None:
            merge_policy(base, *lora.factors[name], lora.scale, out)

        return self.fill(merge, None)

    @torch.no_grad()
    def _narrow(self, lora: Lora) -> ModuleWeights:
        """The policy as it is now, with factors in the model's dtype.

        They are written over what the scratch holds, where it is dense and has the room: it takes
        memory enough, and is filled again when a teacher is asked for.
        """
        found, content = {}, 0
        for name, factors in lora.factors.items():
            room, (a, b) = self.linears[name].scratch, factors
            if isinstance(room, Tensor) and a.numel() + b.numel() <= room.numel():
                if not content:
                    self.owner, self.content = None, self.content + 1
                    content = self.content
                flat = room.view(-1)
                places = flat[: a.numel()], flat[a.numel() : a.numel() + b.numel()]
                found[name] = places[0].view(a.shape).copy_(a), places[1].view(b.shape).copy_(b)
            else:
                found[name] = a.detach().to(self.dtype), b.detach().to(self.dtype)
        narrow = Lora(found, lora.scale, lora.rank)
        return ModuleWeights(ADAPTED, self.head.weight, content, narrow)

    def fill(self, merge: Callable[[str, Matrix, Matrix], None], owner: object) -> ModuleWeights:
        """Write every matrix of the scratch by `merge(name, base, out)`; the weights that use it.

        Where base and task vector stay apart, what is merged upon is zero. `owner` is remembered,
        so that the same content need not be merged twice.
        """
        self.owner = None
        self.content += 1
        for name, module in self.linears.items():
            if module.scratch is None:
                module.scratch = room_like(module.base)
            merge(name, merge_ground(module.base, self.apart), module.scratch)
        self.owner = owner
        return ModuleWeights(SCRATCH, self.head.weight, self.content)

    def held(self, owner: object) -> ModuleWeights | None:
        """The weights of what the scratch holds, if it is the owner's."""
        if owner is None or self.owner != owner:
            return None
        return ModuleWeights(SCRATCH, self.head.weight, self.content)

    def prefix_rope(self, positions: Tensor) -> Tensor:
        """Positions [3, 1, P], or [1, P] where a family counts in one dimension."""
        return positions.to(self.device)

    def text_rope(self, positions: Tensor) -> Tensor:
        """Positions [R, L] or [L] of plain text."""
        return positions if positions.dim() == 2 else positions[None]

    def embed(self, w: ModuleWeights, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids."""
        return self.decoder.get_input_embeddings()(ids)

    def forward(
        self,
        w: ModuleWeights,
        x: Tensor,  # [R, L, D]
        rope: Tensor,  # positions [..., R or 1, L]
        mask: Tensor | None,  # additive, [L, S] or [R, 1, 1, L, S]; None: causal, by flash
        attend,  # (layer, k [R, Hkv, L, hd], v) -> all keys and values to attend to [R, Hkv, S, hd]
        seen: Mapping | None = None,  # further arguments of the decoder
    ) -> Tensor:
        """Hidden states [R, L, D] behind the final norm."""
        self.use(w)
        if self.flash:
            kind = "flash_attention_2" if mask is None else ATTENTION
            self.decoder.config._attn_implementation = kind
        if mask is not None:
            mask = mask[None, None] if mask.dim() == 2 else mask[:, 0]
            mask = mask.expand(x.shape[0], -1, -1, -1)
        out = self.decoder(
            inputs_embeds=x.to(self.dtype),
            position_ids=rope.expand(*rope.shape[:-2], x.shape[0], -1),
            attention_mask=mask,
            use_cache=False,  # none of its own
            **{self.cache: _Attend(attend)},
            **(seen or {}),
        )
        return out.last_hidden_state

    def final_norm(self, w: ModuleWeights, hidden: Tensor) -> Tensor:
        """Hidden states as they are: the decoder ends with its norm."""
        return hidden

    def use(self, w: ModuleWeights) -> None:
        """Have all layers compute in the role of `w`; RuntimeError where its content is gone."""
        if w.content and w.content != self.content:
            raise RuntimeError(
                "these weights were put into the scratch and something else is there by now: merge "
                "them again"
            )
        self._state.role = w.role
        if w.role == ADAPTED:
            self._state.scale = w.lora.scale
            for name, module in self.linears.items():
                module.factors = w.lora.factors[name]


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """Compute RMS norms by PyTorch's one kernel where transformers launches eight.

    Those alone that are x / sqrt(mean(x^2) + eps) * weight, as a trial of each shows.
    """
    for module in model.modules():
        weight = getattr(module, "weight", None)
        eps = getattr(module, "variance_epsilon", None)
        if not type(module).__name__.endswith("RMSNorm") or weight is None or eps is None:
            continue
        x = torch.linspace(-2, 3, len(weight), dtype=weight.dtype, device=weight.device)
        close = dict(rtol=4 * torch.finfo(weight.dtype).eps, atol=0)
        if torch.allclose(module(x), rms_norm(module, x), **close):
            module.forward = partial(rms_norm, module)


def rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """x [..., D] by the weight and the epsilon of one of transformers' RMS norms."""
    return F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def _refuse_other_heads(model: nn.Module, c, head: nn.Linear) -> None:
    """ValueError for families whose text model is more than a causal decoder and a linear head."""
    names = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    odd = [n for n in names if getattr(c, n, None) not in (None, 1, 1.0)]
    odd += ["a bias of the head"] if head.bias is not None else []
    if model.config.model_type in ("gemma3", "paligemma"):
        odd.append("attention in both directions within a picture")
    if odd:
        raise ValueError(
            f"a {model.config.model_type} has {', '.join(odd)}, which is not computed here: use "
            "another model, such as Qwen/Qwen2.5-VL-7B-Instruct"
        )


def _checkpoint(state: _State, function: Callable, *args) -> Tensor:
    """`function` checkpointed; computed again in the role in which it was computed first."""
    role = state.role
    if not torch.is_grad_enabled() or role != ADAPTED:
        return function(*args)

    def again(*inputs):
        state.role = role
        return function(*inputs)

    return checkpoint(again, *args, use_reentrant=False)


@torch.no_grad()
def merge_policy(base: Tensor, a: Tensor, b: Tensor, scale: float, out: Tensor) -> Tensor:
    """out <- base + scale * B @ A, computed in float32, rounded once; returns `out`."""
    pair = [a.detach()], [b.detach()], [scale], [1.0]
    return linear_merge_lora(base.detach(), *pair, out=out, check_finite=False)
