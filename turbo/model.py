"""The policy: a Qwen2.5-VL from transformers, value head, and one forward pass for all uses.

The text model is computed here by a short functional forward pass over explicit weights instead of
by the module tree: `effective` (`turbo.lora`) gives base + s*B@A, `text_weights` fuses and casts
them, `TextModel.forward` runs them. The same function with the same weights serves decoding,
scoring and training, so the distribution that is scored is the one that was sampled. It equals
transformers' own forward pass (tested). Prompts that share their prefix (picture and rules) share
its keys and values: `[U, P]` prefixes are computed once for `[R]` rows.

Left out: vision LoRA (picture features are constants of the frozen tower), quantised bases, other
model families.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from turbo import prompts
from turbo.batch import BatchSizes, pad_to, round_up
from turbo.kernels.pointwise import rms_norm, swiglu
from turbo.lora import Lora, effective

TEXT_PREFIX = "model.language_model."
KEYS = (
    32  # keys are attended to in multiples of this: what is left over costs softmax up to 4 times
)


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
class TextWeights:
    """The whole text model, ready to run."""

    embed: Tensor  # [V, D]
    layers: list[LayerWeights]
    norm: Tensor  # [D]
    head: Tensor  # [V, D]


class TextModel:
    """The forward pass of Qwen2.5-VL's text model, as a function of weights."""

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        c = model.config.text_config
        self.heads, self.kv_heads = c.num_attention_heads, c.num_key_value_heads
        self.head_dim = c.hidden_size // c.num_attention_heads
        self.layers, self.eps, self.dim = c.num_hidden_layers, c.rms_norm_eps, c.hidden_size
        self.tied = c.tie_word_embeddings
        self.vocabulary = c.vocab_size
        self.dtype = dtype
        self._rotary = model.model.language_model.rotary_emb
        self._rope_index = model.model.get_rope_index
        self._image_token = model.config.image_token_id
        self._table: tuple[Tensor, Tensor] | None = None

    def text_weights(self, m: Mapping[str, Tensor]) -> TextWeights:
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
        return TextWeights(embed, layers, m[TEXT_PREFIX + "norm.weight"], head)

    def _turned(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Rows of q (scaled), k, v, and of q and k with each head's halves (a, b) turned: (-b, a).

        The rotary embedding x cos + turn(x) sin then needs no shuffling of x: the product yields
        both terms.
        """
        qk = torch.cat([q * self.head_dim**-0.5, k])
        a, b = qk.unflatten(0, (-1, 2, self.head_dim // 2)).unbind(1)
        return torch.cat([qk, v, torch.stack([-b, a], 1).flatten(0, 2)])

    def prefix_rope(self, prefix_ids: list[int], grid: Tensor) -> tuple[Tensor, Tensor, int]:
        """Rotary tables [P, (H+Hkv)*hd] of a prefix with one picture, and the next position.

        `grid` [1, 3] is the one of the picture.
        """
        ids = torch.tensor([prefix_ids])
        kinds = (ids == self._image_token).int()
        positions, _ = self._rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=torch.ones_like(ids)
        )  # [3, 1, P]
        cos, sin = self._rope(positions)
        return cos[0], sin[0], int(positions.max()) + 1

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

    def forward(
        self,
        w: TextWeights,
        x: Tensor,  # [R, L, D] float32 embeddings; overwritten where no gradient is asked for
        rope: tuple[Tensor, Tensor],
        mask: Tensor,  # additive, broadcastable to [R, Hkv, G, L, S], S at least the number of keys
        attend,  # (layer, k [R, Hkv, L, hd], v) -> all keys and values to attend to [R, Hkv, S, hd]
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

    def final_norm(self, w: TextWeights, hidden: Tensor) -> Tensor:
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


def causal_mask(length: int, past: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [length, S >= past + length]: query i sees the past and the keys up to itself.

    S is a multiple of `KEYS`.
    """
    blocked = torch.ones(length, round_up(past + length, KEYS), dtype=torch.bool).triu(past + 1)
    return torch.zeros(blocked.shape, dtype=dtype).masked_fill_(blocked, -1e30)


@dataclass
class PrefixKV:
    """Keys and values of U prompt prefixes, per layer [U, Hkv, P, hd], and the next position."""

    keys: list[Tensor]
    values: list[Tensor]
    next_position: int

    @property
    def length(self) -> int:
        """Tokens in the prefix, P."""
        return self.keys[0].shape[2]

    def extend(self, other: "PrefixKV") -> "PrefixKV":
        """These prefixes and then the `other` ones, of the same length."""
        keys = [torch.cat(pair) for pair in zip(self.keys, other.keys, strict=True)]
        values = [torch.cat(pair) for pair in zip(self.values, other.values, strict=True)]
        return PrefixKV(keys, values, self.next_position)

    def select(self, rows: Tensor) -> "PrefixKV":
        """The prefixes `rows` [R], repeated as asked."""
        return PrefixKV(
            [k.index_select(0, rows) for k in self.keys],
            [v.index_select(0, rows) for v in self.values],
            self.next_position,
        )


class VisionLanguageModel:
    """A loaded model with its tokenizer and image processor; frozen unless told otherwise."""

    def __init__(self, model: nn.Module, tokenizer, processor, dtype: torch.dtype, source: str):
        self.module, self.tokenizer, self.processor, self.source = (
            model,
            tokenizer,
            processor,
            source,
        )
        self.text, self.batches = TextModel(model, dtype), BatchSizes()
        self.matrices: dict[str, Tensor] = {
            n: p for n, p in model.named_parameters() if n.startswith((TEXT_PREFIX, "lm_head"))
        }
        ids = {t: tokenizer.convert_tokens_to_ids(t) for t in prompts.SPECIAL_TOKENS}
        self.pad, self.end, self.image = (
            ids[t] for t in (prompts.PAD, prompts.IM_END, prompts.IMAGE_PAD)
        )
        # Sampling never yields a special token but the end of the turn, nor a padding row of the
        # embedding.
        self.banned = torch.zeros(self.text.vocabulary, dtype=torch.bool)
        self.banned[list(ids.values())] = True
        self.banned[len(tokenizer) :] = True
        self.banned[self.end] = False
        self.token_bytes = _token_bytes(tokenizer, self.text.vocabulary)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; a bounded cache, since prompts and guesses recur."""
        ids = self._encoded.get(text)
        if ids is None:
            if len(self._encoded) > 200_000:
                self._encoded.clear()
            ids = self._encoded[text] = self.tokenizer._tokenizer.encode(
                text, add_special_tokens=False
            ).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of answer tokens, the end of the turn left out."""
        return b"".join([self.token_bytes[i] for i in ids if i != self.end]).decode(
            "utf-8", "replace"
        )

    def thought_tokens(self, ids: list[int]) -> int:
        """How many leading tokens of an answer are thought.

        They are those that end before the last `"action":` key, counted in bytes of the
        sampled tokens themselves; nothing is encoded again.
        """
        pieces = [self.token_bytes[i] for i in ids]
        start = b"".join(pieces).rfind(prompts.ACTION_KEY.encode())
        if start < 0:
            return len(ids)
        offset = 0
        for n, piece in enumerate(pieces):
            offset += len(piece)
            if offset > start:
                return n
        return len(ids)

    def pixels(self, pictures: list) -> tuple[Tensor, Tensor]:
        """Patches and grids [n, 3] of uint8 pictures [H, W, 3], by transformers' processor."""
        side = self.processor.patch_size * self.processor.merge_size
        exact = all(n % side == 0 for n in pictures[0].shape[:2])
        out = self.processor(images=pictures, return_tensors="pt", do_resize=not exact)
        return out["pixel_values"], out["image_grid_thw"]

    def see(self, pictures: list) -> tuple[Tensor, Tensor]:
        """Vision features [n, tokens, D] (float32), one grid [1, 3]; the pictures have one size."""
        count = len(pictures)
        pictures = pictures + pictures[:1] * (round_up(count) - count)
        patches, grids = self.pixels(pictures)
        features = self.module.model.visual(
            patches.to(self.vision_dtype), grid_thw=grids
        ).pooler_output
        return features.view(len(pictures), -1, self.text.dim)[:count].float(), grids[:1]

    @property
    def vision_dtype(self) -> torch.dtype:
        """The dtype of the vision tower."""
        return next(self.module.model.visual.parameters()).dtype

    def prefix(self, w: TextWeights, features: Tensor, fixed: str, grid: Tensor) -> PrefixKV:
        """Keys and values of U prompts up to the fixed text's end; features [U, tokens, D]."""
        count, n, _ = features.shape
        features = pad_to(features, round_up(count))
        ids = self.encode(prompts.prefix_text(fixed, n))
        at = ids.index(self.image)
        x = (
            F.embedding(torch.tensor(ids), w.embed).float().expand(len(features), -1, -1)
        )  # [U, P, D]
        x = torch.cat([x[:, :at], features, x[:, at + n :]], 1)
        cos, sin, following = self.text.prefix_rope(ids, grid)
        keys, values = [], []

        def attend(_, k, v):
            keys.append(k[:count])
            values.append(v[:count])
            return k, v

        self.text.forward(w, x, (cos, sin), causal_mask(len(ids), 0, self.text.dtype), attend)
        return PrefixKV(keys, values, following)

    def suffix(self, w: TextWeights, ids: Tensor, prefix: PrefixKV) -> Tensor:
        """Hidden states [R, L, D] of right-padded rows `ids` [R, L] that continue R prefixes."""
        length = ids.shape[1]
        x = F.embedding(ids, w.embed).float()
        rope = self.text.text_rope(torch.arange(length) + prefix.next_position)

        def attend(i, k, v):
            return torch.cat([prefix.keys[i], k], 2), torch.cat([prefix.values[i], v], 2)

        mask = causal_mask(length, prefix.length, self.text.dtype)
        return self.text.forward(w, x, rope, mask, attend)

    def weights(self, lora: Lora | None = None) -> TextWeights:
        """Runnable weights of base + LoRA; differentiable in the factors."""
        return self.text.text_weights(effective(self.matrices, lora))


def _token_bytes(tokenizer, vocabulary: int) -> list[bytes]:
    """The bytes of every token of a byte-level BPE; specials and padding rows as their names."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    special = set(tokenizer.all_special_ids)
    out = []
    for i in range(vocabulary):
        token = tokenizer.convert_ids_to_tokens(i) if i < len(tokenizer) else ""
        out.append(token.encode() if i in special else bytes(byte_of[c] for c in token))
    return out


class ValueHead(nn.Module):
    """State value from the hidden state at the last prompt token.

    Norm, linear, tanh, linear; it starts at zero.
    """

    def __init__(self, dim: int, width: int = 128):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, width), nn.Tanh(), nn.Linear(width, 1)
        )
        nn.init.zeros_(self.net[-1].weight)
        nn.init.zeros_(self.net[-1].bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [R, D] -> values [R]."""
        return self.net(hidden.float())[:, 0]


def pick_dtype(name: str) -> torch.dtype:
    """`auto` is bfloat16 where the processor multiplies it natively (AMX), float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if torch.cpu._is_amx_tile_supported() else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {name!r}") from None


def load(folder: Path, dtype: torch.dtype) -> VisionLanguageModel:
    """A model saved in Hugging Face format, frozen, from a local folder."""
    from transformers import (
        AutoConfig,
        PreTrainedTokenizerFast,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessorPil,
    )
    from transformers.utils import logging

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {str(folder)!r} is not a folder with a Hugging Face model: use `tiny`, or make "
            "one with `python -m turbo.sft points24 --out FOLDER`"
        )
    kind = AutoConfig.from_pretrained(folder, local_files_only=True).model_type
    if kind != "qwen2_5_vl":
        raise ValueError(f"model {str(folder)!r} is a {kind}; this version runs qwen2_5_vl models")
    local = dict(local_files_only=True)
    logging.disable_progress_bar()
    module = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, **local
    )
    module.requires_grad_(False).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **local)
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder, **local)
    return VisionLanguageModel(module, tokenizer, processor, dtype, str(folder))
