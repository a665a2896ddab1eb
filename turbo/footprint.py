"""How many bytes each part of a training run takes on a GPU, from the numbers of a model alone.

Weights, factors, gradients, moments and an entry of the cache are the sum of their tensors. What
passes through a layer follows from which tensors autograd keeps; the tests hold it against what
PyTorch's own operations keep, on tiny models and, without data, at the published shapes, where it
lies 0 to 12 % above. None of it has been measured on a GPU yet. With D hidden, I intermediate,
Q = H hd, K = Hkv hd, L layers, T tokens, r rank, W covered weights, F = sum of (in + out) over the
covered matrices, and products in bf16:

    weights      base 2 W, or 4 bits a weight and an fp32 maximum per 64: W/2 + 4 W/64; and 2 bytes
                 each for what LoRA does not cover. The scratch buffer: W alone, as in the base.
    factors      a matrix [out, in] has A [r, in] and B [out, r]: n = r F numbers of 4 bytes.
                 Gradients 4 n; two moments 8 n, or in 8 bits 2 (n + 4 n/256). A layer's products
                 copy the factors to bf16: 2 n/L; a policy that plays over a base in NF4 holds
                 copies of all, 2 n. A checkpoint in the history, on the host: 2 n.
    cache        a token leaves a key and a value in each layer: 2 * 2 L K.
    one layer    autograd keeps, per token (base weights are frozen: products with them keep none
                 of their inputs, the LoRA branch A x keeps x):
                     8 D      x of both norms in fp32; 4 D where the stream is fp32 and the first
                              is the layer's own input, which is kept anyhow
                     4 D      the normed x, input of q, k, v and of gate, up
                     10 Q     q, k, v at all H heads, what attention gives, its copy for o
                     4 H      log-sum-exp of each head
                     8 I      gate, silu(gate), up, their product
                     14 r     A x of seven matrices
                     4 (Q + K + H + Hkv) + 8 (two scales)    norms of q and k (Qwen3), fp32
                 and its backward holds 6 I + 2 D' more at once: gradients of the product and of
                 both its sides, of the layer's output and input; D' bytes of the stream.
    all layers   with checkpointing the stream x of each layer, L D' T, and one layer at work; else
                 L layers' working sets. Half of a micro-batch's tokens are prefixes of prompts,
                 which run first; every row has a copy of its prefix's keys and values.
    head         `kernels.policy_head_loss` on N scored tokens: C logits of a piece of R rows, of
                 both sides in fp32; of a part of them P, d loss / d logits in bf16; of the R rows
                 the gradient in fp32 and in bf16, and where one part is all, both sides' inputs
                 side by side; of all rows both sides' inputs and gradient in bf16:
                 8 C + 2 P + (4 + 2) R D (+ 4 R D) + 3 * 2 N D.

Left out, all small: the critic, vectors of one number a token, tables of the rotary embedding, the
attention mask. Left out and not small: attention that writes its scores, 2 H S bytes a token and
layer for S keys; SDPA and FlashAttention do not, `turbo.fused` on a CPU does.
"""

from turbo.batch import LOGITS, ROWS_OF_FEW, SHORT, BatchSizes
from turbo.history import PINNED_BLOCK
from turbo.kernels.nf4 import BLOCK
from turbo.kernels.policy_head import CUDA_CHUNK_ELEMENTS
from turbo.kernels.policy_head_loss import CUDA_PIECE_ELEMENTS, piece_rows
from turbo.kernels.tiles import CUDA_TILE_ELEMENTS, MIN_TILE_ROWS
from turbo.shapes import TextShape

BF16, FP32 = 2, 4
EIGHT_BIT_BLOCK = 256  # moments that share one fp32 maximum (bitsandbytes)
SEVEN = 7  # covered matrices of a layer
# While tokens are drawn (`decode._judge`): each entry of [scored, V] is a logit and its
# log-softmax; then each of [rows, V] is chosen of them, a softmax, its sum in fp64.
BYTES_PER_SCORED, BYTES_PER_DRAWN = 4 + 4, 4 + 4 + 8
# Per entry of a merged tile in `tiles.merged_tile`: four sums, then seven temporaries of the vote
# in fp32, and the base's tile; coding NF4 comes after and takes less.
BYTES_PER_TILE_ENTRY = 16 + 7 * 4 + 4
CUDA_CONTEXT = 750_000_000  # the driver's, kernels that are loaded, workspaces of cuBLAS
# What the allocator loses: on tensors that stay (sizes rounded up), on those that come and go.
STATIC_WASTE, DYNAMIC_WASTE = 0.01, 0.10


def matrix_bytes(weights: int, nf4: bool) -> int:
    """A dense matrix of so many weights in bf16, or in NF4: half a byte each, a maximum per 64."""
    return -(-weights // 2) + FP32 * -(-weights // BLOCK) if nf4 else BF16 * weights


def base_bytes(shape: TextShape, nf4: bool) -> int:
    """All weights of the model; NF4 codes the covered matrices alone."""
    return matrix_bytes(shape.covered_weights, nf4) + BF16 * shape.other_weights


def scratch_bytes(shape: TextShape, nf4: bool) -> int:
    """The one buffer that holds the merged policy or the merged teacher."""
    return matrix_bytes(shape.covered_weights, nf4)


def factor_numbers(shape: TextShape, rank: int) -> int:
    """Numbers in all LoRA factors, n = r F."""
    return rank * shape.covered_features


def factor_bytes(shape: TextShape, rank: int) -> int:
    """LoRA factors, and as much again their gradients, in fp32; no dense matrix has a gradient."""
    return FP32 * factor_numbers(shape, rank)


def moment_bytes(shape: TextShape, rank: int, eight_bit: bool) -> int:
    """Adam's two moments; those of factors under 4,096 numbers stay in fp32 and count as others."""
    n = factor_numbers(shape, rank)
    return 2 * (n + FP32 * -(-n // EIGHT_BIT_BLOCK)) if eight_bit else 2 * FP32 * n


def step_bytes(shape: TextShape, rank: int, eight_bit: bool) -> int:
    """Temporaries of the step: PyTorch's AdamW over lists holds sqrt(v) of all factors at once."""
    return 0 if eight_bit else FP32 * factor_numbers(shape, rank)


def cache_bytes(shape: TextShape, tokens: int) -> int:
    """Keys and values of so many tokens in all layers."""
    return 2 * BF16 * shape.layers * shape.kv_heads * shape.head_dim * tokens


def feature_bytes(shape: TextShape, tokens: int) -> int:
    """Picture features of so many prompt tokens, with those that deeper layers are given."""
    return BF16 * (1 + shape.deepstack) * shape.hidden * tokens


def copied_bytes(shape: TextShape, rows: int, places: int) -> int:
    """Keys and values of one layer, of rows that are read or are some of the slots: taken from the
    cache, and joined with new ones; of the second half while the first is there."""
    return 3 * cache_bytes(shape, rows * places) // shape.layers // 2


def draw_bytes(
    shape: TextShape, rows: int, places: int, longest: int, tokens: int, wide: bool
) -> int:
    """A pass that draws one token for each row, of at most `longest` guessed ones before it.

    The larger of the pass over few tokens a row, `tokens` at most in all, with the cache of slots
    that have so many places; and the logits: of as many tokens as `LOGITS` lets be scored at once,
    of which the rows' own are chosen.
    """
    rows = min(rows, ROWS_OF_FEW * BatchSizes.decode)
    few = read_bytes(shape, min(tokens, SHORT * rows), wide) + copied_bytes(shape, rows, places)
    scored = min(rows * longest, max(LOGITS // shape.vocabulary, longest))
    entries = max(BYTES_PER_SCORED * scored, BYTES_PER_DRAWN * min(rows, scored))
    return max(few, entries * shape.vocabulary)


def layer_bytes(shape: TextShape, tokens: int, rank: int, wide: bool) -> int:
    """What autograd keeps of one layer, beside the layer's input; `wide`: the stream is fp32."""
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    norms = (4 if wide else 8) * shape.hidden + 2 * FP32
    if shape.qk_norm:
        norms += FP32 * (q + k + shape.heads + shape.kv_heads)
    attention = BF16 * 5 * q + FP32 * shape.heads
    inputs = 2 * BF16 * shape.hidden
    mlp = 4 * BF16 * shape.intermediate
    return tokens * (norms + inputs + attention + mlp + SEVEN * BF16 * rank)


def layer_gradient_bytes(shape: TextShape, tokens: int, wide: bool) -> int:
    """What the backward of one layer holds at once beside what was kept."""
    stream = (FP32 if wide else BF16) * shape.hidden
    return tokens * (3 * BF16 * shape.intermediate + 2 * stream)


def train_bytes(
    shape: TextShape,
    prefixes: int,
    scored: int,
    repeated: int,
    rank: int,
    wide: bool,
    checkpointing: bool,
) -> int:
    """What a micro-batch holds where pictures share their prompts' prefixes (`turbo.backprop`).

    So many tokens of `prefixes` ran, are kept for their backward pass, and gave keys and values,
    which get gradients. So many `scored` tokens of rows run behind them forward and backward; each
    row has a copy of its prefix, `repeated` tokens in all, and one layer attends to it with a copy
    at all heads.
    """
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    layers, longest = 1 if checkpointing else shape.layers, max(prefixes, scored)
    at_work = longest if checkpointing else prefixes + scored  # without it both graphs are whole
    kept = stream_bytes(shape, prefixes + scored, wide) + cast_bytes(shape, rank, layers)
    kept += layers * (layer_bytes(shape, at_work, rank, wide) + 2 * BF16 * q * repeated)
    kept += 2 * BF16 * k * repeated + layer_gradient_bytes(shape, longest, wide)
    return kept + 2 * cache_bytes(shape, prefixes) + cache_bytes(shape, repeated)


def cast_bytes(shape: TextShape, rank: int, layers: int) -> int:
    """bf16 copies of fp32 factors, for the products of so many layers."""
    return BF16 * factor_numbers(shape, rank) * layers // shape.layers


def stream_bytes(shape: TextShape, tokens: int, wide: bool) -> int:
    """The input of every layer, which checkpointing keeps."""
    return (FP32 if wide else BF16) * shape.layers * shape.hidden * tokens


def read_bytes(shape: TextShape, tokens: int, wide: bool) -> int:
    """A pass without gradients over so many tokens: the picture first, then layer after layer.

    A layer of text holds the stream three times, the normed x and a scale, tables of the rotary
    embedding, and at most silu(gate), up, product (6 I) or q, k, v, turned, at all heads, and the
    result (12 Q + 6 K); every layer's keys and values stay. One of the vision tower holds, per
    patch, the stream twice and at most 6 I' or q, k, v and what turns them in fp32 (36 D').
    """
    q, k = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    stream = (FP32 if wide else BF16) * shape.hidden
    text = 3 * stream + BF16 * (shape.hidden + 2 * shape.head_dim) + FP32
    text += max(6 * shape.intermediate, 12 * q + 6 * k)
    patch = 4 * shape.vision_hidden + max(6 * shape.vision_intermediate, 36 * shape.vision_hidden)
    vision = shape.patches_per_token * patch
    return max(tokens * text + cache_bytes(shape, tokens), tokens * vision)


def head_bytes(shape: TextShape, tokens: int, backward: bool) -> int:
    """`policy_head` on so many scored tokens with a teacher, or `policy_head_loss` with gradient.

    Without a gradient a part of all rows' logits is held; with one, those of a piece of the rows.
    """
    rows = tokens
    if backward:
        rows = min(tokens, max(1, piece_rows(CUDA_PIECE_ELEMENTS, shape.vocabulary)))
    logits = rows * shape.vocabulary
    part = min(logits, CUDA_CHUNK_ELEMENTS)
    held = 2 * FP32 * (logits if backward else part) + 2 * BF16 * tokens * shape.hidden
    if part == logits:  # both sides' rows side by side, for one product
        held += 2 * BF16 * rows * shape.hidden
    if not backward:
        return held
    return held + BF16 * part + (FP32 + BF16) * rows * shape.hidden + BF16 * tokens * shape.hidden


def read_back_bytes(shape: TextShape, nf4: bool) -> int:
    """With NF4, the largest matrix as bf16: a product reads one back at a time."""
    return BF16 * shape.largest_weights if nf4 else 0


def merge_bytes(shape: TextShape, rank: int, history: int) -> int:
    """The factors of so many checkpoints of the largest matrix, and a tile of the merge."""
    columns = max(shape.hidden, shape.intermediate, shape.heads * shape.head_dim)
    tile = BYTES_PER_TILE_ENTRY * max(MIN_TILE_ROWS * columns, CUDA_TILE_ELEMENTS)
    return history * history_entry_bytes(rank, shape.largest_features) + tile


def history_entry_bytes(rank: int, features: int) -> int:
    """LoRA factors of one checkpoint for matrices of so many in + out features."""
    return BF16 * rank * features


def host_entry_bytes(shape: TextShape, rank: int) -> int:
    """A checkpoint's factors on the host, at most: in pinned blocks that each may lack a factor.

    The last block is rounded up to a power of two (`turbo.history.cpu_copies`).
    """
    largest = BF16 * rank * max(shape.hidden, shape.intermediate)
    held = max(PINNED_BLOCK - largest, PINNED_BLOCK // 2)
    full, rest = divmod(history_entry_bytes(rank, shape.covered_features), held)
    return full * PINNED_BLOCK + (1 << (rest - 1).bit_length() if rest else 0)
