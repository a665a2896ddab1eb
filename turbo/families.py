"""What differs between families of vision-language models beside transformers' own classes.

A prompt is the family's own chat template with a picture and a text in the user's turn, cut in
three where the text begins and ends:

    before    system prompt, the turn's opening, the picture's place holder
    text      of the environment
    after     the turn's end, the opening of the answer

The image token becomes as many of them as the picture has features, in the family's wrapping.

Left out: the forward pass (`turbo.modules`), loading (`turbo.model`).
"""

import json
from dataclasses import dataclass

import torch
from torch import Tensor, nn

MARK = "@@text@@"

# What stands around the image tokens of one picture, where it is not in the chat template.
WRAPPING = {
    "smolvlm": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
    "idefics3": ("<fake_token_around_image><global-img>", "<fake_token_around_image>"),
}
# Options of image processors that would make several pictures of one.
WHOLE = {"smolvlm": {"do_image_splitting": False}, "idefics3": {"do_image_splitting": False}}


def without_bars() -> None:
    """Let transformers load and save without progress bars of its own, from now on."""
    from transformers.utils import logging

    logging.disable_progress_bar()


@dataclass(frozen=True)
class Frame:
    """The chat template around a picture and a text."""

    before: str
    after: str
    image_token: str
    opening: str = ""
    closing: str = ""

    def prefix(self, fixed: str, image_tokens: int) -> str:
        """The unchanging part of a prompt: picture and rules."""
        picture = self.opening + self.image_token * image_tokens + self.closing
        return self.before.replace(self.image_token, picture) + fixed

    def suffix(self, state: str) -> str:
        """The part that changes with every step, and the opening of the answer."""
        return state + self.after


def frame_of(config, tokenizer) -> Frame:
    """The frame of a model, from the chat template of its tokenizer."""
    kind = config.model_type
    image = tokenizer.convert_ids_to_tokens(image_token_id(config))
    content = [{"type": "image"}, {"type": "text", "text": MARK}]
    try:
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # no template, or one that does not know pictures
        reason = f"the tokenizer of this {kind} has no usable chat template: {error}"
        raise ValueError(reason) from error
    before, mark, after = whole.partition(MARK)
    if not mark or before.count(image) != 1:
        raise ValueError(
            f"the chat template of this {kind} does not write one {image!r} before the text: "
            f"{whole!r}"
        )
    if after.rstrip().endswith("<think>"):
        raise ValueError(
            f"the chat template of this {kind} opens every answer with <think>, and an answer is "
            "JSON here, from its first token on: use the Instruct variant of the model"
        )
    return Frame(before, after, image, *WRAPPING.get(kind, ("", "")))


def image_token_id(config) -> int:
    """The token that stands for a part of a picture."""
    for name in ("image_token_id", "image_token_index"):
        if getattr(config, name, None) is not None:
            return getattr(config, name)
    raise ValueError(f"a {config.model_type} names no image token: is it a vision-language model?")


def special_ids(tokenizer) -> set[int]:
    """Tokens that are no text."""
    added = {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    return added | set(tokenizer.all_special_ids)


def end_of_turn(tokenizer) -> int:
    """The token that ends an answer: the first special one behind an assistant's text, else eos."""
    turns = [
        {"role": role, "content": [{"type": "text", "text": text}]}
        for role, text in (("user", "?"), ("assistant", MARK))
    ]
    whole = tokenizer.apply_chat_template(turns, tokenize=False)
    special = special_ids(tokenizer)
    for i in tokenizer.encode(whole.partition(MARK)[2], add_special_tokens=False):
        if i in special:
            return i
    return tokenizer.eos_token_id


def banned_tokens(config, tokenizer, vocabulary: int, end: int) -> Tensor:
    """What is never sampled: specials but the end, tokens of pictures, rows without a token. [V]"""
    banned = torch.zeros(vocabulary, dtype=torch.bool)
    special = special_ids(tokenizer)
    names = [n for n in vars(config) if n.endswith(("_token_id", "_token_index"))]
    special |= {i for n in names if isinstance(i := getattr(config, n), int) and i >= 0}
    banned[[i for i in special if i < vocabulary]] = True
    banned[len(tokenizer) :] = True
    banned[end] = False
    return banned


def token_bytes(tokenizer, vocabulary: int) -> list[bytes]:
    """The bytes that every token stands for; specials and padding rows as their names.

    Byte-level BPE writes a byte as a printable character; SentencePiece writes a space as U+2581
    and single bytes as <0x0A>.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())
    level = "ByteLevel" in json.dumps(model["decoder"])
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    byte_of = {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
    added = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items()}
    tokens = tokenizer.convert_ids_to_tokens(list(range(min(vocabulary, len(tokenizer)))))
    out = []
    for i, token in enumerate(tokens):
        if i in added or token is None:
            out.append(added.get(i, "").encode())
        elif level:
            known = all(c in byte_of for c in token)
            out.append(bytes(byte_of[c] for c in token) if known else token.encode())
        elif len(token) == 6 and token.startswith("<0x"):
            out.append(bytes([int(token[3:5], 16)]))
        else:
            out.append(token.replace("\u2581", " ").encode())
    return out + [b""] * (vocabulary - len(out))


def positions(module: nn.Module, ids: list[int], image: int, grid: Tensor) -> tuple[Tensor, int]:
    """Positions of a prefix with one picture, and the next one.

    [3, 1, P] where the family counts in time, height and width, else [1, P].
    """
    row = torch.tensor([ids])
    index = getattr(module.model, "get_rope_index", None)
    if index is None:
        return torch.arange(len(ids))[None], len(ids)
    kinds = (row == image).int()
    found, _ = index(
        row, mm_token_type_ids=kinds, image_grid_thw=grid, attention_mask=torch.ones_like(row)
    )
    return found, int(found.max()) + 1


def picture_features(module: nn.Module, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Features [n, tokens, D * (1 + levels)] of `count` pictures of one size.

    Behind the embeddings stand those that the family adds to its first layers (DeepStack).
    """
    out = module.get_image_features(**inputs, return_dict=True)
    parts = [out.pooler_output, *(getattr(out, "deepstack_features", None) or [])]
    whole = [p if isinstance(p, Tensor) else torch.cat(list(p)) for p in parts]
    return torch.cat([p.reshape(count, -1, p.shape[-1]) for p in whole], -1)
