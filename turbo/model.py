"""A policy to load and run: any vision-language model of transformers, and a value head.

Vision tower, tokenizer, image processor and chat template are transformers' own. The text model
runs in one of two engines with one interface:

    turbo.fused      a small Qwen2.5-VL on a CPU: the built-in tiny models
    turbo.modules    transformers' own decoder, any family, on one GPU or a CPU

Prompts that share their prefix (picture and rules) share its keys and values: `[U, P]` prefixes are
computed once for `[R]` rows.

Left out: vision LoRA (picture features are constants of the frozen tower), several pictures in a
prompt.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from turbo import families
from turbo.attend import PrefixKV, causal_mask
from turbo.batch import BatchSizes, pad_to, round_up
from turbo.envs.base import ACTION_KEY
from turbo.fused import FusedText, FusedWeights
from turbo.graphs import CudaRecord
from turbo.lora import Lora
from turbo.modules import ModuleText, ModuleWeights

Weights = FusedWeights | ModuleWeights
LOCAL = dict(local_files_only=True, trust_remote_code=False)  # no network, no code of a folder
ENCODED = 20_000_000  # characters of which the token ids are kept
SMALL = 200e6  # bytes of a model's files up to which it runs on the CPU unless told otherwise


class VisionLanguageModel:
    """A loaded model with its tokenizer and image processor; frozen unless told otherwise."""

    def __init__(
        self,
        module: nn.Module,
        tokenizer,
        processor,
        dtype: torch.dtype,
        text: FusedText | ModuleText | None = None,
    ):
        self.module, self.tokenizer, self.processor = module, tokenizer, processor
        self.text = FusedText(module, dtype) if text is None else text
        self.batches = BatchSizes()
        config = module.config
        self.frame = families.frame_of(config, tokenizer)
        self.image, self.end = families.image_token_id(config), families.end_of_turn(tokenizer)
        self.pad = self.end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        vocabulary = self.text.vocabulary
        self.banned = families.banned_tokens(config, tokenizer, vocabulary, self.end)
        self.banned = self.banned.to(self.text.device)
        self.token_bytes = families.token_bytes(tokenizer, vocabulary)
        self._encoded: dict[str, list[int]] = {}
        self._characters = 0  # in that cache

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`; a bounded cache, since prompts and guesses recur."""
        ids = self._encoded.get(text)
        if ids is None:
            if self._characters > ENCODED:
                self._encoded.clear()
                self._characters = 0
            self._characters += len(text)
            ids = self._encoded[text] = self.tokenizer._tokenizer.encode(
                text, add_special_tokens=False
            ).ids
        return ids

    def decode(self, ids: list[int]) -> str:
        """Text of answer tokens, the end of the turn left out."""
        return b"".join([self.token_bytes[i] for i in ids if i != self.end]).decode(
            "utf-8", "replace"
        )

    def thought_tokens(self, ids: list[int], action_key: str = ACTION_KEY) -> int:
        """How many leading tokens of an answer are thought.

        They are those that end before the last `action_key`, counted in bytes of the
        sampled tokens themselves; nothing is encoded again.
        """
        pieces = [self.token_bytes[i] for i in ids]
        start = b"".join(pieces).rfind(action_key.encode())
        if start < 0:
            return len(ids)
        offset = 0
        for n, piece in enumerate(pieces):
            offset += len(piece)
            if offset > start:
                return n
        return len(ids)

    def pixels(self, pictures: list) -> dict[str, Tensor]:
        """What transformers' processor makes of uint8 pictures [H, W, 3] of one size."""
        options = families.WHOLE.get(self.module.config.model_type, {})
        if hasattr(self.processor, "merge_size"):
            side = self.processor.patch_size * self.processor.merge_size
            options = {"do_resize": any(n % side for n in pictures[0].shape[:2])}
        return dict(self.processor(images=pictures, return_tensors="pt", **options))

    def see(self, pictures: list) -> tuple[Tensor, Tensor]:
        """Vision features [n, tokens, D'] and one grid [1, 3]; the pictures have one size.

        D' is D, or more where the family adds to its first layers too; the grid is empty where the
        family has none.
        """
        count = len(pictures)
        if self.text.small:
            pictures = pictures + pictures[:1] * (round_up(count) - count)
        inputs = {name: x.to(self.device) for name, x in self.pixels(pictures).items()}
        grid = inputs["image_grid_thw"][:1].cpu() if "image_grid_thw" in inputs else torch.empty(0)
        features = families.picture_features(self.module, inputs, len(pictures))[:count]
        return features.float() if self.text.small else features, grid

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.text.device

    @property
    def positions(self) -> int | None:
        """Tokens of a prompt and its answer that the model has positions for; None: not told."""
        return getattr(self.module.config.get_text_config(), "max_position_embeddings", None)

    def prefix_length(self, fixed: str, tokens: int) -> int:
        """Tokens of a prompt up to the fixed text's end, with a picture of so many."""
        return len(self.encode(self.frame.prefix(fixed, tokens)))

    def prefix(self, w: Weights, features: Tensor, fixed: str, grid: Tensor) -> PrefixKV:
        """Keys and values of U prompts up to the fixed text's end; features [U, tokens, D']."""
        count, n, _ = features.shape
        text = self.text
        if text.small:
            features = pad_to(features, round_up(count))
        ids = self.encode(self.frame.prefix(fixed, n))
        picture = torch.tensor([i == self.image for i in ids], device=self.device)  # [P]
        x = text.embed(w, torch.tensor(ids, device=self.device))
        parts = features.to(self.device, x.dtype).split(text.dim, -1)
        at = ids.index(self.image)
        if picture[at : at + n].all():  # in one piece
            left, right = (y.expand(len(features), -1, -1) for y in (x[:at], x[at + n :]))
            x = torch.cat([left, parts[0], right], 1)  # [U, P, D]
        else:
            x = x.expand(len(features), -1, -1).clone()
            x[:, picture] = parts[0]
        seen = None
        if len(parts) > 1:
            seen = {
                "visual_pos_masks": picture.expand(len(features), -1),
                "deepstack_visual_embeds": [p.flatten(0, 1) for p in parts[1:]],
            }
        found, following = families.positions(self.module, ids, self.image, grid)
        keys: list[Tensor | None] = [None] * text.layers
        values = list(keys)

        def attend(i, k, v):
            if keys[i] is None:  # not when it is computed again for a gradient
                keys[i], values[i] = k[:count], v[:count]
            return k, v

        mask = causal_mask(len(ids), 0, text)
        text.forward(w, x, text.prefix_rope(found), mask, attend, seen)
        return PrefixKV(keys, values, following)

    def suffix(self, w: Weights, ids: Tensor, prefix: PrefixKV) -> Tensor:
        """Hidden states [R, L, D] of right-padded rows `ids` [R, L] that continue R prefixes."""
        text, length = self.text, ids.shape[1]
        x = text.embed(w, ids)
        rope = text.text_rope(torch.arange(length, device=self.device) + prefix.next_position)

        def attend(i, k, v):
            return torch.cat([prefix.keys[i], k], 2), torch.cat([prefix.values[i], v], 2)

        return text.forward(w, x, rope, causal_mask(length, prefix.length, text), attend)

    def weights(self, lora: Lora | None = None) -> Weights:
        """Weights of base + LoRA, to score and train with; differentiable in the factors."""
        return self.text.weights(lora)

    def merged(self, weights: Weights) -> Weights:
        """The same weights to decode with: merged where they are not."""
        return self.text.merged(weights)

    @property
    def matrices(self) -> dict[str, Tensor]:
        """The base's matrices by parameter name: all that LoRA adapts, and maybe more."""
        return self.text.matrices


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


def pick_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """`auto` is bfloat16 on a GPU and where the processor multiplies it natively (AMX), float32
    elsewhere."""
    if name == "auto":
        native = torch.device(device).type == "cuda" or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    try:
        return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]
    except KeyError:
        raise ValueError(f"dtype must be auto, float32 or bfloat16, got {name!r}") from None


@dataclass(frozen=True)
class Engine:
    """How a model is to be run; the fields are those of `turbo.config.TrainConfig`."""

    name: str = "auto"  # fused, modules
    device: str = "auto"  # cpu, cuda
    quantize: str = "none"  # nf4
    checkpointing: bool = True
    decode_graphs: bool = False  # on a GPU alone
    play: str = "auto"  # merged, unmerged


def pick_device(name: str, small: bool = False) -> torch.device:
    """`auto` is the GPU where there is one; a small model is faster on the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() and not small else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} was asked for and torch sees no GPU: use cpu")
    return torch.device(name)


def is_small(folder: Path) -> bool:
    """Whether a folder holds a model of the built-in ones' kind: some million parameters."""
    return 0 < sum(f.stat().st_size for f in folder.glob("*.safetensors")) < SMALL


def load(folder: Path, dtype: torch.dtype, engine: Engine = Engine()) -> VisionLanguageModel:
    """A model saved in Hugging Face format, frozen, from a local folder.

    `auto` runs a Qwen2.5-VL of less than 50 million parameters on a CPU by the fused engine.
    """
    from transformers import AutoConfig

    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {str(folder)!r} is not a folder with a Hugging Face model: use `tiny`, or make "
            "one with `python -m turbo.sft points24 --out FOLDER`"
        )
    config = AutoConfig.from_pretrained(folder, **LOCAL)
    small = is_small(folder)
    device = pick_device(engine.device, small)
    engine = replace(engine, device=str(device))
    fused = config.model_type == "qwen2_5_vl" and device.type == "cpu" and engine.quantize == "none"
    if engine.name == "fused" and not fused:
        raise ValueError("engine fused runs Qwen2.5-VL models on a CPU, unquantised: use modules")
    fused = fused and (small if engine.name == "auto" else engine.name == "fused")
    parts = loaded_parts(folder, torch.float32 if fused else dtype)
    return assemble(*parts, dtype, engine, fused)


def loaded_parts(folder: Path, dtype: torch.dtype) -> tuple:
    """Module, tokenizer and image processor of a folder; the module is transformers' own."""
    from transformers import AutoConfig

    families.without_bars()
    kind = _model_class(AutoConfig.from_pretrained(folder, **LOCAL), folder)
    module = kind.from_pretrained(folder, dtype=dtype, use_safetensors=True, **LOCAL)
    return module, *_processors(folder)


def _processors(folder: Path) -> tuple:
    """The tokenizer and the image processor of a folder."""
    from transformers import AutoImageProcessor, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, **LOCAL)
    template = folder / "chat_template.json"  # where older models have it
    if tokenizer.chat_template is None and template.is_file():
        tokenizer.chat_template = json.loads(template.read_text(encoding="utf-8"))["chat_template"]
    return tokenizer, AutoImageProcessor.from_pretrained(folder, backend="pil", **LOCAL)


def random_model(name: str, dtype: torch.dtype, engine: Engine) -> VisionLanguageModel:
    """A model of published shapes, or of a folder's configuration, with random weights."""
    parts = random_parts(name, dtype, pick_device(engine.device))
    return assemble(*parts, dtype, engine)


def random_parts(name: str, dtype: torch.dtype, device: torch.device) -> tuple:
    """Module, tokenizer and image processor of a model with random weights, to measure with.

    A name of `turbo.shapes` comes with the tokenizer and the image processor of the built-in
    models, a folder with its own. The module is transformers' own, and the same in every call.
    """
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

    from turbo import shapes, tiny

    folder = Path(name)
    if (folder / "config.json").is_file():
        config = AutoConfig.from_pretrained(folder, **LOCAL)
        tokenizer, processor = _processors(folder)
    else:
        config, words = shapes.published(name), tiny.builtin_path("numberline")
        tokenizer = AutoTokenizer.from_pretrained(words, **LOCAL)
        processor = tiny.image_processor(config.vision_config.patch_size)
        tiny.name_tokens(config, tokenizer)
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    return module, tokenizer, processor


def assemble(
    module: nn.Module,
    tokenizer,
    processor,
    dtype: torch.dtype,
    engine: Engine,
    fused: bool = False,
) -> VisionLanguageModel:
    """Freeze a model that is in memory, put it where it is to run, and give it its engine."""
    module.requires_grad_(False).eval()
    if fused:
        return VisionLanguageModel(module, tokenizer, processor, dtype)
    device = pick_device(engine.device)
    text = ModuleText(
        module,
        device=device,
        quantize=engine.quantize == "nf4",
        checkpointing=engine.checkpointing,
        record=CudaRecord if engine.decode_graphs and device.type == "cuda" else None,
        apart=None if engine.play == "auto" else engine.play == "unmerged",
    )
    return VisionLanguageModel(module, tokenizer, processor, dtype, text)


def _model_class(config, folder: Path):
    """transformers' class for a vision-language model of this kind."""
    from transformers import AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    if config.model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(
            f"model {str(folder)!r} is a {config.model_type}, which takes no pictures: use a "
            "vision-language model such as Qwen/Qwen2.5-VL-7B-Instruct"
        )
    return AutoModelForImageTextToText
