"""A small Qwen2.5-VL's text model on a CPU: its forward pass as a function of weights.

Instead of the module tree, a short functional forward pass runs over explicit weights: `effective`
(`turbo.lora`) gives base + s*B@A, `FusedText.weights` fuses and casts them, `FusedText.forward`
runs them. One set of weights serves decoding, scoring and training, so the distribution that is
scored is the one that was sampled, to the last bit. It equals transformers' own pass (tested) in a
fraction of its time, and costs a dense copy of the weights, and a dense gradient in training: for
models of some million parameters. `turbo.modules` runs all others.

Left out: vision; larger models.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo.kernels.pointwise import rms_norm, swiglu
from turbo.lora import Lora, effective

TEXT_PREFIX = "model.language_model."
# Keys are attended to in multiples of this: what is left over costs softmax up to 4 times.
KEYS = 32


@dataclass(frozen=True)
class LayerWeights:
    """One decoder layer in the compute dtype: projections fused, each with the norm before it."""

    # queries (scaled by hd**-0.5), keys, values, turned queries, turned keys
    qkv: Tensor  # [(2*H + 3*Hkv)*hd, D]
    qkv_bias: Tensor  # [(2*H + 3*Hkv)*hd]
    out: Tensor  # [D, H*hd]
    gate_up: Tensor  # [2*I, D]
    down: Tensor  # [D, I]


@dataclass(frozen=True)
class FusedWeights:
    """The whole text model, ready to run."""

    embed: Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    head: Tensor  # [V, D]

    def tensors(self) -> list[Tensor]:
        """All tensors, each once, in a fixed order."""
        tensors = [t for layer in self.layers for t in vars(layer).values()]
        return [*tensors, self.embed, self.norm, *([] if self.head is self.embed else [self.head])]

    def cut(self) -> "FusedWeights":
        """The same weights as leaves of a new graph; those without a gradient keep none."""

        def leaf(t: Tensor) -> Tensor:
            return t.detach().requires_grad_(t.requires_grad)

        layers = [replace(x, **{k: leaf(v) for k, v in vars(x).items()}) for x in self.layers]
        embed = leaf(self.embed)
        head = embed if self.head is self.embed else leaf(self.head)
        return FusedWeights(embed, layers, leaf(self.norm), head)

    def backward(self, leaves: "FusedWeights") -> None:
        """Push the gradients of cut weights back to what these were made of."""
        pairs = zip(self.tensors(), leaves.tensors(), strict=True)
        used = [(t, leaf.grad) for t, leaf in pairs if t.requires_grad and leaf.grad is not None]
        torch.autograd.backward([t for t, _ in used], [grad for _, grad in used])


class FusedText:
    """The forward pass of Qwen2.5-VL's text model, as a function of weights."""

    keys = KEYS
    flash = False
    record = None  # decode steps are not recorded
    in_place = False  # decoding gathers the cache of the rows that run
    small = True  # dense copies of the weights, and all prefixes at once, can be afforded

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        c = model.config.text_config
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.layers, self.eps, self.dim = c.num_hidden_layers, c.rms_norm_eps, c.hidden_size
        self.tied = c.tie_word_embeddings
        self.vocabulary = c.vocab_size
        self.dtype, self.device = dtype, torch.device("cpu")
        self.matrices: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if n.startswith((TEXT_PREFIX, "lm_head"))
        }
        self._rotary = model.model.language_model.rotary_emb
        self._table: tuple[Tensor, Tensor] | None = None

    def weights(self, lora: Lora | None = None) -> FusedWeights:
        """Runnable weights of base + LoRA; differentiable in the factors."""
        return self.text_weights(effective(self.matrices, lora))

    def merged(self, w: FusedWeights) -> FusedWeights:
        """Weights to decode with: these are merged already."""
        return w

    def with_matrices(self, merged: Mapping[str, Tensor]) -> FusedWeights:
        """Runnable weights of the base with other matrices in place of some, by module name."""
        matrices = {n: m.detach() for n, m in self.matrices.items()}
        return self.text_weights(matrices | {name + ".weight": m for name, m in merged.items()})

    def text_weights(self, m: Mapping[str, Tensor]) -> FusedWeights:
        """Fuse and cast the projections of matrices named as in the checkpoint; differentiable."""

        def cast(x: Tensor) -> Tensor:
            return x.to(self.dtype)

        layers = []
        for i in range(self.layers):
            p = f"{TEXT_PREFIX}layers.{i}."
            a = p + "self_attn."
            qkv = self._turned(*(m[a + f"{x}_proj.weight"] for x in "qkv"))
            bias = self._turned(*(m[a + f"{x}_proj.bias"] for x in "qkv"))
            gate_up = torch.cat([m[p + "mlp.gate_proj.weight"], m[p + "mlp.up_proj.weight"]])
            layers.append(
                LayerWeights(
                    qkv=cast(qkv * m[p + "input_layernorm.weight"]),
                    qkv_bias=cast(bias),
                    out=cast(m[a + "o_proj.weight"]),
                    gate_up=cast(gate_up * m[p + "post_attention_layernorm.weight"]),
                    down=cast(m[p + "mlp.down_proj.weight"]),
                )
            )
        embed = cast(m[TEXT_PREFIX + "embed_tokens.weight"])
        head = embed if self.tied else cast(m["lm_head.weight"])
        return FusedWeights(embed, layers, m[TEXT_PREFIX + "norm.weight"], head)

    def _turned(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q (scaled), k, v, and of q and k with each head's halves (a, b) turned: (-b, a).

        The rotary embedding x cos + turn(x) sin then needs no shuffling of x: the product yields
        both terms.
        """
        qk = torch.cat([q * self.head_dim**-0.5, k])
        a, b = qk.unflatten(0, (-1, 2, self.head_dim // 2)).unbind(1)
        return torch.cat([qk, v, torch.stack([-b, a], 1).flatten(0, 2)])

    def prefix_rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [P, (H+Hkv)*hd] at the positions [3, 1, P] of a prefix."""
        cos, sin = self._rope(positions)
        return cos[0], sin[0]

    def text_rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables [..., L, (H+Hkv)*hd] of plain text at `positions` [..., L]."""
        if self._table is None or int(positions.max()) >= len(self._table[0]):
            line = torch.arange(max(512, 2 * int(positions.max()))).expand(3, 1, -1)
            self._table = tuple(t[0] for t in self._rope(line))
        flat = positions.reshape(-1)
        return tuple(t.index_select(0, flat).view(*positions.shape, -1) for t in self._table)

    def _rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [1, L, (H+Hkv)*hd], alike for every head, at 3-d positions [3, 1, L]."""
        cos, sin = self._rotary(torch.zeros(1), positions)  # [1, L, hd]
        n = self.heads + self.kv_heads
        return cos.to(self.dtype).repeat(1, 1, n), sin.to(self.dtype).repeat(1, 1, n)

    def embed(self, w: FusedWeights, ids: Tensor) -> Tensor:
        """Embeddings [..., D] of token ids, float32."""
        return F.embedding(ids, w.embed).float()

    def forward(
        self,
        w: FusedWeights,
        x: Tensor,  # [R, L, D] float32 embeddings; overwritten where no gradient is asked for
        rope: tuple[Tensor, Tensor],
        mask: Tensor,  # additive, broadcastable to [R, Hkv, G, L, S], S at least the number of keys
        attend,  # (layer, k [R, Hkv, L, hd], v) -> all keys and values to attend to [R, Hkv, S, hd]
        seen: None = None,  # nothing is added to the layers of this family
    ) -> Tensor:
        """Hidden states [R, L, D] before the final norm."""
        r, length, _ = x.shape
        n_q, n_k = self.heads * self.head_dim, self.kv_heads * self.head_dim
        cos, sin = rope
        add = torch.add if torch.is_grad_enabled() else Tensor.add_
        for i, layer in enumerate(w.layers):
            h = rms_norm(x, None, self.eps, self.dtype)
            y = F.linear(h, layer.qkv, layer.qkv_bias)
            qk = torch.addcmul(y[..., : n_q + n_k] * cos, y[..., n_q + 2 * n_k :], sin)
            q = qk[..., :n_q].view(r, length, self.heads, self.head_dim)
            k = qk[..., n_q:].view(r, length, self.kv_heads, self.head_dim).transpose(1, 2)
            v = y[..., n_q + n_k : n_q + 2 * n_k].view(r, length, self.kv_heads, -1).transpose(1, 2)
            k, v = attend(i, k, v)
            x = add(x, F.linear(_attention(q, k, v, mask), layer.out))
            h = rms_norm(x, None, self.eps, self.dtype)
            x = add(x, F.linear(swiglu(F.linear(h, layer.gate_up)), layer.down))
        return x

    def final_norm(self, w: FusedWeights, hidden: Tensor) -> Tensor:
        """Normed hidden states in the compute dtype, the input of the head."""
        return rms_norm(hidden, w.norm, self.eps, self.dtype)


def _attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Grouped-query attention by two batched products.

    On a CPU in bfloat16 it is several times faster to train than SDPA.
    q [R, L, H, hd] (scaled), k and v [R, Hkv, <= S, hd], mask [..., S] additive -> [R, L, H*hd]
    """
    r, length, heads, hd = q.shape
    kv, s = k.shape[1], mask.shape[-1]
    if k.shape[2] < s:  # the mask is rounded up: fill with keys that nothing attends to
        k, v = (F.pad(x, (0, 0, 0, s - k.shape[2])) for x in (k, v))
    g = heads // kv
    q = q.view(r, length, kv, g, hd).permute(0, 2, 3, 1, 4).reshape(r * kv, g * length, hd)
    k = k.reshape(r * kv, s, hd).transpose(1, 2)
    if mask.dim() == 2:  # one mask for all rows: added inside the product
        scores = torch.baddbmm(mask.repeat(g, 1), q, k)
    else:
        scores = (torch.bmm(q, k).view(r, kv, g, length, s) + mask).view(r * kv, g * length, s)
    p = torch.softmax(scores, -1)
    o = torch.bmm(p, v.reshape(r * kv, s, hd)).view(r, kv, g, length, hd)
    return o.permute(0, 3, 1, 2, 4).reshape(r, length, heads * hd)
