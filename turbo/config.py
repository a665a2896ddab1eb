"""All settings of a training run: one flat dataclass, and what makes a setting impossible.

The defaults are those of the built-in tiny model, measured in docs/LOG.md. The comment under a
field is its help text; the dataclasses that `TrainConfig` is made of are the sections of --help.

Left out: games and presets (`turbo.presets`), reading the command line (`turbo.arguments`), and
what a run was saved with (`turbo.saved`).
"""

import math
import re
from dataclasses import dataclass, fields
from typing import Annotated, Literal

import tyro

from turbo.envs.make import check_env
from turbo.flags import flag


@dataclass
class RunSettings:
    """The game, the run directory, the length of a run."""

    env: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ENV]")] = "points24"
    """which environment to play: points24, ezpoints, numberline, blackjack or alfworld; one of your
    own as module:Class; or the name of an installed entry point of the group gtr_turbo.envs"""
    out: str = ""
    """run directory of a new run; empty makes runs/<env>-<date>-<time>"""
    resume: str = ""
    """run directory to continue, with its settings. Free are --updates (which stretches the cosine
    of the learning rate), --minutes, --keep, --save-every, --max-faults, the logs, and what depends
    on the card: --micro-tokens, --gpu, --decode-graphs"""
    overwrite: bool = False
    """replace the run directory if it exists"""
    seed: int = 0
    """seed of everything: deals, sampling, initial factors, minibatch order"""
    updates: int = 42
    """policy updates; each one is a rollout, its PPO epochs, and a new checkpoint in the history"""
    minutes: float = 0.0
    """stop after so many minutes of training even if updates are left; evaluations and saving come
    on top (0: no limit)"""


@dataclass
class ModelSettings:
    """The model, and how it runs."""

    model: str = "tiny"
    """`tiny` for the built-in warm start of the environment; a folder with a vision-language model
    in Hugging Face format; or its id on the Hub, such as Qwen/Qwen2.5-VL-7B-Instruct"""
    random_weights: bool = False
    """for measuring: the shapes of --model with random weights, and nothing is downloaded; --model
    is qwen2.5-vl-3b or -7b, qwen3-vl-2b, -4b or -8b, or a folder with a config.json"""
    quantize: Literal["none", "nf4"] = "none"
    """nf4: the base and the merged teacher in 4 bits, so that 7B fits a 24 GB card"""
    lora_rank: int = 16
    """rank of the LoRA factors on every linear layer of the text model"""
    lora_alpha: float = 32.0
    """LoRA scale is alpha / rank"""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of the matrix products; auto is bfloat16 where it is native (GPU, AMX), else float32"""
    observation: Literal["auto", "small", "full"] = "auto"
    """small: short prompts and few pixels; full: the rules in words and large pictures; auto: small
    for models of less than 200 MB, full for all others"""
    engine: Literal["auto", "fused", "modules"] = "auto"
    """how the text model runs; fused: our own forward pass, for small Qwen2.5-VL models on a CPU;
    modules: that of transformers, for all others"""
    play: Literal["auto", "merged", "unmerged"] = "auto"
    """large models: the policy plays, and the teacher reads, with the base and what was learned
    apart; or merged into one matrix, which is faster, and in 16 bits loses the smallest changes;
    auto: apart in 16 bits and over a base in 4, else merged"""
    gradient_checkpointing: bool = True
    """modules: keep only the layers' inputs for the backward pass and compute the rest again"""
    decode_graphs: bool = False
    """GPU: record decode steps as CUDA graphs and replay them (not yet measured on a GPU)"""


@dataclass
class MachineSettings:
    """What a run takes of the machine."""

    workers: int = 0
    """processes that play and train (0: one a core, at most 4)"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where the model runs; auto is the GPU where there is one"""
    gpu: float = 0.0
    """plan for a card of so many GB, and use no more of it (0: what the card has)"""
    micro_tokens: int = 0
    """modules: tokens that run at once, prompts and answers; halved where memory runs out (0: 2048,
    and up to 8192 where the memory plan leaves a twentieth of the card free)"""


@dataclass
class GameSettings:
    """Settings of single games, and rewards for the form of an answer."""

    early_truncation: bool = True
    """card games, and others with this option: end the episode at its first reward of -1"""
    format_valid: float = 0.0
    """reward of a well-formed answer, in the same stream as the environment's: above 0, longer
    episodes earn more"""
    format_invalid: float = 0.0
    """reward of an unreadable or illegal answer, beside the environment's penalty"""
    hands: int = 0
    """Points24: train on a fixed pool of so many multisets (0: the environment's distribution)"""
    games: str = ""
    """ALFWorld: folder of games (empty: $ALFWORLD_DATA, else small ones that are made once)"""
    tasks: str = ""
    """ALFWorld: task types to play, separated by commas (empty: all six)"""
    history_length: int = 40
    """ALFWorld: number of commands that the prompt shows, the newest ones; 40 is all of them"""
    backend: Literal["text", "thor"] = "text"
    """ALFWorld: the text engine with drawn frames, or AI2-THOR with its own"""


@dataclass
class RolloutSettings:
    """How episodes are played: environments, answers, sampling."""

    envs: int = 256
    """environments that play at once, over all workers"""
    steps_per_update: int = 4096
    """least environment steps of an update; episodes are always played to their end"""
    group_size: int = 8
    """environments that play the same deal (with --advantage group: the baseline's size)"""
    temperature: float = 0.5
    """sampling temperature of training; the scored distribution is the same one"""
    max_new_tokens: int = 96
    """longest answer in tokens"""


@dataclass
class ObjectiveSettings:
    """What the policy is trained on: advantages, and PPO's loss."""

    objective: Literal["ppo", "rejection"] = "ppo"
    """ppo; or rejection sampling: cross-entropy of the policy's own successes (a baseline)"""
    advantage: Literal["group", "gae"] = "group"
    """group: return minus the mean of the deal's other environments; gae: the paper's critic"""
    baseline: Literal["state", "loo", "mean"] = "state"
    """group baseline: the others' mean from the same state on; of whole episodes; own included"""
    gamma: float = 0.9
    """discount of gae for each environment step, 0 to 1"""
    gae_lambda: float = 0.95
    """lambda of gae, 0 to 1"""
    thought_coef: float = 0.5
    """weight of a thought token in the log-probability of a step; that of an action token is 1"""
    clip: float = 0.2
    """PPO clip range of the step's ratio: 0.2 lets it count from 0.8 to 1.2"""
    value_coef: float = 0.5
    """weight of the critic's loss (gae)"""
    epochs: int = 2
    """passes over each rollout"""
    minibatch: int = 256
    """environment steps per optimiser step"""
    target_kl: float = 0.0
    """end an update's epochs at so many nats of approximate KL to the rollout policy, of answers
    whose thoughts are weighted by --thought-coef (0: never)"""
    rescore: bool = False
    """take the log-probabilities of what was sampled from a pass like that which trains, not from
    decoding: in 16 bits the two may disagree (sampling_kl tells). It costs a forward pass"""
    skip_certain: float = 0.02
    """group: skip steps whose answer is surer than so many nats (-log p): next to no gradient (a
    critic learns of all steps)"""


@dataclass
class OptimizerSettings:
    """How it is trained: AdamW, with a cosine from one rate to the other."""

    learning_rate: float = 7e-4
    """peak learning rate of AdamW"""
    final_learning_rate: float = 3e-4
    """learning rate at the end of the cosine; where --learning-rate alone is given, as large a
    share of it as by default"""
    critic_learning_rate: float = 0.0
    """gae: peak learning rate of the critic, whose cosine ends at the same share of it (0: the
    policy's)"""
    grad_clip: float = 0.5
    """bound on the gradient's norm, and on that of the critic's"""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw8bit: its moments in 8 bits, by bitsandbytes"""
    adam_eps: float = 1e-8
    """epsilon of AdamW"""


@dataclass
class GuidanceSettings:
    """What the teacher does for the policy's thoughts."""

    guidance: Literal["kl", "sft", "gtr", "none"] = "kl"
    """kl: KL of the thoughts to the teacher; sft: imitate thoughts that it writes; gtr: imitate
    those of an external model (--teacher-url); none: plain PPO (RL4VLM)"""
    teacher: Literal["merged", "initial"] = "merged"
    """merged: of the policy's past checkpoints; initial: the warm start, for ever"""
    guidance_range: Literal["thought", "all"] = "thought"
    """which tokens are guided"""
    kl_placement: Literal["loss", "reward", "advantage"] = "loss"
    """where the KL enters: as a loss with a true gradient, in the reward, or, less its mean, in the
    advantage"""
    kl_estimator: Literal["full", "forward", "clip", "abs", "k1", "k3"] = "full"
    """full and forward: exact over the vocabulary; the others from the sampled token, for the
    reward and the advantage; in the loss k3 alone, whose gradient is that of forward"""
    kl_coef: str = "5"
    """strength of the guidance, or `auto`: begins at 1, and is steered to be --kl-share of what it
    stands beside"""
    kl_share: float = 0.1
    """with --kl-coef auto: the KL as a share of the spread of returns (--kl-placement reward) or of
    advantages, which is 1 (its deviation with advantage, its mean with loss)"""
    sft_coef: float = 1.0
    """sft and gtr: weight of the cross-entropy, a mean over thought tokens"""
    sft_rows: int = 256
    """sft and gtr: steps of an update for which the teacher writes a thought (0: all of them)"""
    sft_batch: int = 64
    """sft and gtr: examples of the dataset in each minibatch"""
    sft_max: int = 0
    """sft and gtr: the newest so many examples are kept (0: all)"""
    teacher_temperature: float = 0.2
    """temperature at which the teacher writes"""
    teacher_sample: int = 64
    """steps of an update that the merged teacher answers too, to measure its thoughts (0: none)"""


@dataclass
class MergeSettings:
    """How past checkpoints become the teacher."""

    merge: Literal["ties", "linear"] = "ties"
    """how checkpoints are merged into the teacher"""
    weighting: Literal["sma", "ema", "score"] = "ema"
    """weights of the checkpoints: equal, decaying with age, or by success rate"""
    ema_alpha: float = 0.5
    """share of the newest checkpoint with --weighting ema"""
    score_episodes: int = 0
    """with --weighting score: fresh episodes that each checkpoint plays, the same for all (0: its
    own rollout counts; the newest, which has not played yet, takes the score of the one before)"""
    density: float = 0.8
    """share of the largest task-vector entries that TIES keeps"""
    guide_first: bool = True
    """the warm start enters the history too, so that the first update is guided as well"""
    checkpoint_each: Literal["update", "epoch"] = "update"
    """a checkpoint enters the history after each update, or after each of its epochs"""
    merge_every: int = 1
    """rebuild the teacher every so many checkpoints"""
    history_max: int = 0
    """checkpoints that are merged at most (0: all)"""


@dataclass
class EndpointSettings:
    """With --guidance gtr: the external model."""

    teacher_url: str = ""
    """gtr: OpenAI-compatible endpoint that takes pictures, such as http://127.0.0.1:8000/v1"""
    teacher_model: str = ""
    """gtr: the model that the endpoint is to use"""
    teacher_key_env: str = "OPENAI_API_KEY"
    """gtr: environment variable that holds the endpoint's key"""
    teacher_concurrency: int = 16
    """gtr: requests at once, over all workers"""
    teacher_timeout: float = 60.0
    """gtr: seconds until a request is given up and tried again"""
    teacher_price_in: float = 0.0
    """gtr: dollars per million prompt tokens"""
    teacher_price_out: float = 0.0
    """gtr: dollars per million answer tokens"""


@dataclass
class EvaluationSettings:
    """Fresh episodes, played before and after training."""

    eval_episodes: int = 500
    """episodes of the evaluations before and after training (0: none)"""
    eval_start: bool = True
    """evaluate before training too"""
    eval_temperature: float = 0.2
    """sampling temperature of evaluation (the paper's)"""
    eval_every: int = 0
    """evaluate every so many updates as well, and keep the checkpoint of the best evaluation (0:
    only at both ends)"""


@dataclass
class OutputSettings:
    """Checkpoints, and where figures go."""

    save_every: int = 10
    """checkpoint every so many updates, and at the end"""
    keep: int = 2
    """newest checkpoints that are kept in the run directory"""
    max_faults: int = 5
    """stop after so many minibatches in a row without a finite gradient; single ones are skipped"""
    quiet: bool = False
    """print nothing but errors"""
    json: bool = False
    """print the lines of metrics.jsonl and nothing else; problems go to standard error"""
    tensorboard: bool = False
    """also write TensorBoard files into the run directory"""
    wandb: str = ""
    """also log to this project of Weights & Biases, in the run directory; with WANDB_MODE=online in
    the environment it is sent (empty: no log)"""
    trackio: str = ""
    """also log to this project of trackio, on this machine (empty: no log)"""


@dataclass
class TrainConfig(  # fields of the last base come first
    OutputSettings,
    EvaluationSettings,
    EndpointSettings,
    MergeSettings,
    GuidanceSettings,
    OptimizerSettings,
    ObjectiveSettings,
    RolloutSettings,
    GameSettings,
    MachineSettings,
    ModelSettings,
    RunSettings,
):
    """Train a policy with PPO, guided by a teacher merged from its own past checkpoints."""

    @property
    def teaches(self) -> bool:
        """Whether the policy's own checkpoints are merged into a teacher."""
        return self.guidance in ("kl", "sft")

    @property
    def checkpoints_an_update(self) -> int:
        """How many checkpoints of an update enter the teacher's history."""
        return self.epochs if self.checkpoint_each == "epoch" else 1

    @property
    def kept_checkpoints(self) -> int:
        """Checkpoints that a run's teacher is merged from at the end; 0 where nothing is merged."""
        if not self.teaches or self.teacher != "merged":
            return 0
        entered = self.updates * self.checkpoints_an_update + 1
        return min(self.history_max or entered, entered)

    @property
    def imitates(self) -> bool:
        """Whether thoughts that another model wrote are imitated."""
        return self.guidance in ("sft", "gtr")


def check(c: TrainConfig) -> None:
    """Refuse settings that cannot work, naming the flag, its value and the remedy."""

    def need(ok: bool, name: str, rule: str) -> None:
        if not ok:
            raise ValueError(f"{flag(name)} must be {rule}, got {getattr(c, name)!r}")

    check_env(c.env)
    for f in fields(c):
        value = getattr(c, f.name)
        if isinstance(value, float):
            need(math.isfinite(value), f.name, "a finite number")
            if f.name != "format_invalid":
                need(value >= 0, f.name, "zero or more")
        elif isinstance(value, int) and not isinstance(value, bool):
            need(value >= 0, f.name, "zero or more")
    for name in (
        "updates",
        "envs",
        "steps_per_update",
        "group_size",
        "max_new_tokens",
        "epochs",
        "minibatch",
        "lora_rank",
        "merge_every",
        "save_every",
        "keep",
        "max_faults",
    ):
        need(getattr(c, name) >= 1, name, "at least 1")
    for name in ("temperature", "eval_temperature", "learning_rate", "grad_clip", "lora_alpha"):
        need(getattr(c, name) > 0, name, "more than 0")
    for name in ("density", "ema_alpha", "gamma", "gae_lambda", "clip"):
        need(getattr(c, name) <= 1, name, "at most 1")
    need(c.ema_alpha > 0, "ema_alpha", "more than 0")
    if c.advantage == "group":
        need(c.group_size >= 2, "group_size", "at least 2 with --advantage group (or use gae)")
    need(c.hands == 0 or c.env == "points24", "hands", "0 except with points24")
    need(c.hands <= 715, "hands", "at most 715, the number of multisets (0: all hands)")
    if c.env != "alfworld":
        for name in ("games", "tasks"):
            need(getattr(c, name) == "", name, "left out except with alfworld")
        need(c.backend == "text", "backend", "text except with alfworld")
    for name in ("teacher_temperature", "teacher_timeout"):
        need(getattr(c, name) > 0, name, "more than 0")
    if c.imitates:
        need(c.sft_batch >= 1, "sft_batch", f"at least 1 with --guidance {c.guidance}")
    if c.guidance == "gtr":
        need(bool(c.teacher_url), "teacher_url", "the address of an endpoint with --guidance gtr")
        need(bool(c.teacher_model), "teacher_model", "a model's name with --guidance gtr")
        need(c.teacher_concurrency >= 1, "teacher_concurrency", "at least 1")
    for name in ("wandb", "trackio"):
        good = re.fullmatch(r"[\w.-]*", getattr(c, name))
        need(bool(good), name, "a project's name: letters, digits, _ . -")
    need(not (c.quantize == "nf4" and c.play == "merged"), "play", "auto with --quantize nf4")
    need(not (c.quiet and c.json), "json", "left out with --quiet, or --quiet left out")
    if c.kl_coef != "auto":
        try:
            coefficient = float(c.kl_coef)
        except ValueError:
            coefficient = math.nan
        need(coefficient >= 0 and math.isfinite(coefficient), "kl_coef", "auto or a number >= 0")
