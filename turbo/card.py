"""The model card of an exported result: what it is, how it came about, how well it does, its use.

    README.md      a header of YAML that the Hugging Face Hub reads, then text for people

Every figure is one that the run recorded itself, with its interval; nothing is played here.

Left out: the weights and the other files of an export (`turbo.export`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from string import Template

from turbo.config import TrainConfig
from turbo.families import Frame
from turbo.formats import is_far_from_all, loss_of_rounding
from turbo.hub import BUILT_IN

PLACE = "https://github.com/gtr-turbo/gtr-turbo"
PROJECT = f"[gtr-turbo]({PLACE})"
PAPER = "[GTR-Turbo](https://arxiv.org/abs/2512.13043)"
COLUMNS = ("success_rate", "success_low", "success_high", "episode_return", "reasoning_score")
HEAD = "| | success | 95 % interval | mean return | right thoughts |\n|---|---|---|---|---|"

WHAT = {
    "adapter": "LoRA factors of the policy, for peft; they need the base",
    "policy": "the policy: the base with its LoRA factors merged in, complete",
    "teacher": "the teacher: the merge of the policy's own past checkpoints, complete",
}


@dataclass(frozen=True)
class Facts:
    """What a card tells; all of it is known when the weights are."""

    what: str  # adapter, policy, teacher
    base: str  # name or path of the model that was trained
    base_on_hub: bool  # whether that is a name on the Hugging Face Hub
    base_sha256: str
    config: TrainConfig
    update: int
    env_steps: int
    dtype: str
    kept: float  # share of what training changed that is left in this dtype
    trained_with: Mapping[str, str]  # versions
    exported_with: Mapping[str, str]
    records: Sequence[Mapping]  # of metrics.jsonl
    question: str  # the text beside the example's picture
    frame: Frame  # how the chat template takes a picture
    places: int  # image tokens of a picture; 0 where they depend on the grid of its patches


def card(f: Facts) -> str:
    """The text of README.md."""
    c = f.config
    rows = [
        ("This is", f"{WHAT[f.what]}; {f.dtype}{rounding(f)}"),
        ("Base", f"{base(f)}, fingerprint of its weights {code(f.base_sha256)}"),
        ("Environment", environment(c)),
        ("Training", training(f)),
        ("Guidance", guidance(c)),
        ("Trained with", versions(f.trained_with)),
        ("Exported with", versions(f.exported_with)),
    ]
    table = "\n".join(f"| {name} | {text} |" for name, text in rows)
    return (
        f"{header(f)}\n# {c.env}, {f.what} after {updates(f)}\n\n"
        f"A vision-language agent that plays {c.env}: it sees a picture, writes a thought and an "
        f"action as JSON, and was trained with reinforcement learning by {PROJECT}, after the "
        f"paper {PAPER}.\n\n| | |\n|---|---|\n{table}\n\n## How well it does\n\n{results(f)}\n\n"
        f"## How to use it\n\n{usage(f)}\n\n## Limits\n\n"
        f"It was trained on the pictures and prompts of {c.env} alone, one picture a prompt; "
        "nothing is known about its answers to anything else.\n\n## Licence\n\n"
        f"The licence of the base, {base(f)}, applies; this card grants nothing beside it.\n"
    )


def header(f: Facts) -> str:
    """What the Hub reads. It refuses a card whose base is none of its models, such as a path."""
    lines = ["---"]
    if f.base_on_hub:
        relation = "adapter" if f.what == "adapter" else "finetune"
        lines += [f"base_model: {f.base}", f"base_model_relation: {relation}"]
    lines += [f"library_name: {'peft' if f.what == 'adapter' else 'transformers'}"]
    lines += ["pipeline_tag: image-text-to-text", "tags:"]
    lines += [f"- {tag}" for tag in ("gtr-turbo", "reinforcement-learning", f.config.env)]
    return "\n".join([*lines, "---", ""])


def updates(f: Facts) -> str:
    """How long it was trained, in words."""
    return f"{f.update} update{'s' * (f.update != 1)}"


def base(f: Facts) -> str:
    """The base, and where it is if that is not plain."""
    built_in = f.base.startswith("turbo/models/")
    return code(f.base) + " in the repository of gtr-turbo" * built_in


def environment(c: TrainConfig) -> str:
    """What was played."""
    hands = f", a fixed pool of {c.hands} hands" if c.hands else ""
    return f"{code(c.env)}{hands}, seed {c.seed}"


def rounding(f: Facts) -> str:
    """What the dtype costs, where it costs something."""
    return f", {loss_of_rounding(f.kept)}" if is_far_from_all(f.kept) else ""


def training(f: Facts) -> str:
    """Objective and amount."""
    c = f.config
    kind = "PPO" if c.objective == "ppo" else "rejection sampling"
    advantage = f"{c.advantage} advantages" if c.objective == "ppo" else "own successes"
    base = ", on a base in 4 bits (NF4)" if c.quantize == "nf4" else ""
    return (
        f"{kind} with {advantage}, LoRA of rank {c.lora_rank} (alpha {c.lora_alpha:g}){base}, "
        f"learning rate {c.learning_rate:g}; {updates(f)}, {f.env_steps:,} environment steps, "
        f"sampled at temperature {c.temperature:g}"
    )


def guidance(c: TrainConfig) -> str:
    """Which teacher guided the policy, how, and how it was merged."""
    if c.guidance == "none":
        return "none"
    where = "thoughts" if c.guidance_range == "thought" else "answers"
    if c.guidance == "gtr":
        model = code(c.teacher_model)
        return f"the {where} of an external model, {model}, imitated (`gtr`, weight {c.sft_coef:g})"
    how = {
        "kl": f"KL of the {where} to the teacher in the {c.kl_placement} (`kl`, coefficient "
        f"{c.kl_coef}, estimator {c.kl_estimator})",
        "sft": f"{where} that the teacher writes imitated (`sft`, weight {c.sft_coef:g})",
    }[c.guidance]
    if c.teacher == "initial":
        return f"{how}; teacher: the warm start, for ever"
    shares = {"sma": "equal weights", "ema": f"EMA {c.ema_alpha:g}", "score": "weights by success"}
    merge = f"TIES at density {c.density:g}" if c.merge == "ties" else "linear"
    last = f"the last {c.history_max}" if c.history_max else "all"
    return f"{how}; teacher: {merge} of {last} checkpoints, {shares[c.weighting]}"


def versions(known: Mapping) -> str:
    """Packages and commit, in one line."""
    names = ("gtr-turbo", "torch", "transformers")
    said = [f"{name} {known[name]}" for name in names if known.get(name)]
    commit = [f"commit {str(known['commit'])[:12]}"] if known.get("commit") else []
    return plain(", ".join(said + commit)) or "unknown"


def results(f: Facts) -> str:
    """The evaluations that the run wrote down before training and at this very checkpoint."""
    c, after = f.config, f"after {updates(f)}"
    shown = {
        "base": ("base, before training", evaluation(f.records, 0, "eval_")),
        "policy": (f"policy, {after}", evaluation(f.records, f.update, "eval_")),
        "teacher": (f"merged teacher, {after}", evaluation(f.records, f.update, "eval_teacher_")),
    }
    rows = [row(name, figures) for name, figures in shown.values() if figures]
    parts = []
    if not shown["teacher" if f.what == "teacher" else "policy"][1]:
        parts += [f"The run did not evaluate {after}: what is exported here has no figures yet."]
    if rows:
        parts += ["\n".join([HEAD, *rows])]
        parts += [
            f"Fresh deals of {c.env}, {c.eval_episodes} episodes a row at temperature "
            f"{c.eval_temperature:g}, with Wilson's interval of the success rate. A thought is "
            "right when an exact solver says so, not when another model likes it."
        ]
    return "\n\n".join(parts)


def evaluation(records: Sequence[Mapping], update: int, prefix: str) -> dict[str, float]:
    """The last evaluation that is recorded for an update; empty where there is none."""
    found: dict[str, float] = {}
    for record in records:
        if record.get("update") == update and _is_number(record.get(prefix + COLUMNS[0])):
            found = {key: record.get(prefix + key) for key in COLUMNS}
    return found


def row(name: str, figures: Mapping[str, float]) -> str:
    """A line of the table; a dash where a figure does not apply."""

    def show(key: str, form: str) -> str:
        return format(figures[key], form) if _is_number(figures[key]) else "–"

    low, high = show("success_low", ".1%"), show("success_high", ".1%")
    cells = (name, show("success_rate", ".1%"), f"{low} to {high}")
    cells += (show("episode_return", ".2f"), show("reasoning_score", ".1%"))
    return f"| {' | '.join(cells)} |"


def is_on_built_in(f: Facts) -> bool:
    """Whether it needs one of the models that come with this project."""
    return f.what == "adapter" and f.base.startswith(BUILT_IN)


def usage(f: Facts) -> str:
    """What to install, one example that runs as it stands, and what to beware of."""
    install = "pip install torch transformers pillow" + " peft" * (f.what == "adapter")
    if is_on_built_in(f):
        install += f"\npip install git+{PLACE}  # the base is one of its built-in models"
    hub = '`huggingface_hub.snapshot_download("owner/name")` fetches it from the Hub'
    text = (
        f"```bash\n{install}\n```\n\nRun this in the folder of this file ({hub}); `example.png` "
        f"is a picture as the environment draws it.\n\n```python\n{example(f)}```\n\n"
        "`generation_config.json` holds the temperature of the evaluations, the end of an answer "
        "and the tokens that were never sampled in training."
    )
    if not f.places:
        text += (
            " Without `mm_token_type_ids` the picture silently gets the positions of text, which "
            "are not those of training."
        )
    return text + (
        " `AutoProcessor` does these steps in one; for families that also take videos, such as "
        "Qwen's, transformers 5 loads it only with torchvision. The parts used here do without."
    )


def example(f: Facts) -> str:
    """A program that loads the export and lets it answer once."""
    wanted = ["AutoImageProcessor", "AutoModelForImageTextToText", "AutoTokenizer"]
    wanted += ["GenerationConfig"] * (f.what == "adapter")
    program = OPENING + (ADAPTED if f.what == "adapter" else COMPLETE) + QUESTION
    program += (FIXED if f.places else GRID) + ANSWER
    frame = f.frame
    picture = f"{frame.image_token!r} * places"
    if frame.opening or frame.closing:
        picture = f"{frame.opening!r} + {picture} + {frame.closing!r}"
    base = repr(f.base)
    if is_on_built_in(f):
        program = "from importlib.resources import files\n\n" + program
        base = f"str(files('turbo') / {f.base.removeprefix('turbo/')!r})"
    return Template(program).substitute(
        peft="from peft import PeftModel\n" * (f.what == "adapter"),
        classes=", ".join(wanted),
        base=base,
        question=repr(f.question),
        holder=repr(frame.image_token),
        picture=picture,
        image=repr(frame.image_token),
        places=f.places,
    )


OPENING = """\
import torch
${peft}from PIL import Image
from transformers import $classes

"""
COMPLETE = """\
model = AutoModelForImageTextToText.from_pretrained(".")
generation = model.generation_config
"""
ADAPTED = """\
base = AutoModelForImageTextToText.from_pretrained($base)
model = PeftModel.from_pretrained(base, ".")
generation = GenerationConfig.from_pretrained(".")
"""
QUESTION = """
picture = Image.open("example.png")
question = $question
content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
messages = [{"role": "user", "content": content}]

tokenizer = AutoTokenizer.from_pretrained(".")
image_processor = AutoImageProcessor.from_pretrained(".", backend="pil")
text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
seen = image_processor(images=[picture], return_tensors="pt")
"""
GRID = """\
places = int(seen["image_grid_thw"].prod()) // image_processor.merge_size**2
inputs = tokenizer(text.replace($holder, $picture), add_special_tokens=False, return_tensors="pt")
is_image = inputs["input_ids"] == tokenizer.convert_tokens_to_ids($image)
inputs["mm_token_type_ids"] = is_image.int()
"""
FIXED = """\
places = $places  # of one picture, whatever its size
text = text.replace($holder, $picture)
inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
"""
ANSWER = """\
with torch.inference_mode():
    answer = model.generate(**inputs, **seen, generation_config=generation)[0]
print(tokenizer.decode(answer[inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def code(text: str) -> str:
    """Text of a setting as code within a table."""
    return f"`{plain(text).replace('`', '')}`"


def plain(text: str) -> str:
    """One line that does not end a table's cell."""
    return " ".join(str(text).replace("|", "/").split())


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
