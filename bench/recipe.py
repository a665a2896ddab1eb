"""The published way to do one update, written anew on transformers' and peft's own classes.

    decode       ONE environment; each answer by `model.generate`, batch 1, picture included,
                 with the adapter beside the weights
    score        the answer is read again for its log-probability and the critic's value, and once
                 more by the teacher for the KL estimate, which is subtracted from the reward
    train        PPO epochs with minibatches of one step and gradient accumulation
    checkpoint   save_pretrained of the adapter
    merge        a second copy of the model loads that adapter; peft's add_weighted_adapter (TIES,
                 A and B apart) makes the teacher's of all that were saved

Each reading pads the answer to its greatest length, and takes the log-softmax of the whole row over
the whole vocabulary in float32. What costs no time has the paper's values (`PRESETS["paper"]`);
what does has the values of the run it is compared with: temperature, length of answers, rank,
epochs. So are the answers: specials are banned, nothing is truncated or penalised, so that both
programs compute the same log-probabilities (tested).

It is given what helps it: torch.no_grad wherever no gradient is asked for, the cache in `generate`,
pixels prepared once a step, one core or all of them and one dtype or the other, as is faster
(`fastest`). Mistakes of the published code are not copied (a teacher that never changes, top-k at
sampling alone, a KL without the picture) but for those that cost time, which are the subject: one
environment, batch 1, readings with padding, a second reading of what was just sampled.

Left out: two GPUs, DeepSpeed, gradient checkpointing, which a model of this size does not need.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from bench.flops import Sizes, causal_pairs, text_flops, vision_flops
from turbo.config import TrainConfig
from turbo.gae import gae
from turbo.hub import model_folder
from turbo.kl import kl_estimate
from turbo.model import ValueHead, VisionLanguageModel, loaded_parts, random_parts
from turbo.ppo import ppo_loss, step_logprob, value_loss
from turbo.presets import PRESETS
from turbo.run import env_maker, prompt_style
from turbo.shapes import COVERED

ACCUMULATE = 128  # minibatches of one step to an optimiser step
KL_COEF = 1.0
MERGED = "merged"  # the teacher's adapter; those it is made of are called by their update
PHASES = ("rollout", "score", "train", "checkpoint", "merge")
PAPER = PRESETS["paper"]
TRIALS, TRIAL_TOKENS = 4, 8  # updates of one such answer on which `fastest` times each setting


@dataclass
class Turn:
    """One environment step."""

    inputs: dict[str, Tensor]  # of the model: prompt, padded answer and picture, batch 1
    prompt: int  # tokens of the prompt, P
    tokens: list[int]  # the answer, T tokens
    thought: int  # the first `thought` tokens are thought
    text: str
    logprob: float = 0.0  # thought_coef * thought + action, when it was sampled
    value: float = 0.0
    kl: float = 0.0
    reward: float = 0.0
    following: float = 0.0  # value of what came after, where the step did not terminate
    terminated: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Plain:
    """What a VisionLanguageModel asks of an engine where only its prompts are wanted."""

    dim: int  # D
    vocabulary: int  # V
    device: str = "cpu"  # of the mask of banned tokens


def open_plain(c: TrainConfig, dtype: torch.dtype, device: str) -> VisionLanguageModel:
    """A run's model as transformers makes it: no engine of turbo's has touched its layers."""
    where = torch.device(device)
    if c.random_weights:
        parts = random_parts(c.model, dtype, where)
    else:
        parts = loaded_parts(model_folder(c), dtype)
    module, tokenizer, processor = parts
    module.requires_grad_(False).eval().to(where)
    head = module.get_output_embeddings().weight
    plain = Plain(head.shape[1], head.shape[0])
    return VisionLanguageModel(module, tokenizer, processor, dtype, plain)


@dataclass(frozen=True)
class Reading:
    """What a model makes of an answer."""

    logprob: Tensor  # [T] of the answer's tokens, float32
    hidden: Tensor | None  # [1, D] at the last prompt token


@dataclass
class Figures:
    """What an update did, and the seconds of its phases."""

    steps: int
    tokens: int  # of the answers
    flops: float  # model arithmetic, see `bench.flops`
    losses: dict[str, float]  # means over the minibatches
    seconds: dict[str, float] = field(default_factory=dict)


class Recipe:
    """Policy, critic, teacher, optimizer and the one environment; ImportError without peft."""

    def __init__(
        self,
        config: TrainConfig,
        path: Path,  # folder of the adapters that it saves
        dtype: torch.dtype,
        threads: int = 1,
        device: str = "cpu",
    ):
        self.config, self.path, self.threads, self.device = config, path, threads, device
        torch.manual_seed(config.seed)
        self.vlm = open_plain(config, dtype, device)
        self.sizes = Sizes.of(self.vlm.module)
        self.dtype = dtype
        self.policy = self._adapted(self.vlm.module)
        self.copy = open_plain(config, dtype, device).module
        self.teacher: nn.Module | None = None  # the copy with adapters, once there is one
        self.value_head = ValueHead(self.vlm.text.dim).to(device)
        trained = [p for p in self.policy.parameters() if p.requires_grad]
        self.trained = [*trained, *self.value_head.parameters()]
        rates = dict(lr=PAPER["learning_rate"], eps=PAPER["adam_eps"])
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0.0, **rates)
        self.banned = self.vlm.banned.nonzero()[:, 0].tolist()
        self.bias = torch.zeros(len(self.vlm.banned)).masked_fill_(self.vlm.banned, -torch.inf)
        self.bias = self.bias.to(device)
        self.env = env_maker(config)()
        self.picture, _ = self.env.reset(seed=config.seed)
        self.updates, self.flops, self.names = 0, 0.0, []
        self.patches, self.ended = 0, False  # of a picture; whether the episode is over

    def _adapted(self, module: nn.Module) -> nn.Module:
        """The module with fresh factors, in the place of turbo's own ones."""
        try:
            from peft import LoraConfig, get_peft_model
        except ImportError as error:
            raise ImportError("the recipe needs peft: pip install 'gtr-turbo[bench]'") from error
        lora = LoraConfig(
            r=self.config.lora_rank,
            lora_alpha=self.config.lora_alpha,
            target_modules=rf".*language_model\..*\.({'|'.join(COVERED)})",
        )
        return get_peft_model(module, lora).eval()

    def update(self, steps: int) -> Figures:
        """One whole update of `steps` environment steps."""
        others, self.flops = torch.get_num_threads(), 0.0
        torch.set_num_threads(self.threads)
        try:
            clock = _Clock(self.device)
            turns = self.play(steps, clock)
            losses = self.train(turns)
            clock.lap("train")
            self.updates += 1
            folder = self.save()
            clock.lap("checkpoint")
            self.merge(folder)
            clock.lap("merge")
        finally:
            torch.set_num_threads(others)
        tokens = sum(len(t.tokens) for t in turns)
        return Figures(len(turns), tokens, self.flops, losses, clock.seconds)

    def play(self, steps: int, clock: "_Clock") -> list[Turn]:
        """Play `steps` steps; an episode that is under way goes on in the next update."""
        turns: list[Turn] = []
        for _ in range(steps):
            turn = self.answer()
            clock.lap("rollout")
            self.score(turn)
            clock.lap("score")
            self.act(turn)
            clock.lap("rollout")
            turns.append(turn)
            if turn.truncated or (len(turns) == steps and not turn.terminated):
                turn.following = self.value()
                turn.truncated = True  # for what is learned, the end of a rollout is one too
                clock.lap("score")
            if turn.terminated or self.ended:
                self.picture, _ = self.env.reset()
        return turns

    @torch.no_grad()
    def answer(self) -> Turn:
        """Ask the policy what to do."""
        c, inputs = self.config, self.prompt()
        prompt = inputs["input_ids"].shape[1]
        out = self.policy.generate(
            **inputs,
            do_sample=True,
            temperature=c.temperature,
            top_k=0,
            top_p=1.0,
            max_new_tokens=c.max_new_tokens,
            suppress_tokens=self.banned,
            use_cache=True,
        )
        tokens = out[0, prompt:].tolist()
        self._count(prompt + len(tokens) - 1, len(tokens))
        return self.turn(inputs, tokens)

    def prompt(self) -> dict[str, Tensor]:
        """What the model is asked about the environment as it is."""
        asked = self.env.prompt(prompt_style(self.config))
        pixels, grid = self.vlm.pixels([self.picture]).values()
        self.patches = len(pixels)
        pictured = self.vlm.frame.prefix(asked.fixed, int(grid.prod()) // 4)
        ids = self.vlm.encode(pictured) + self.vlm.encode(self.vlm.frame.suffix(asked.state))
        return self.inputs(ids, len(ids), pixels.to(self.device, self.dtype), grid)

    def inputs(self, ids: list[int], length: int, pixels: Tensor, grid: Tensor) -> dict:
        """A model's arguments for one row, of which `length` tokens are meant."""
        row = torch.tensor([ids], device=self.device)
        return dict(
            input_ids=row,
            attention_mask=(torch.arange(len(ids), device=self.device) < length).long()[None],
            mm_token_type_ids=(row == self.vlm.image).int(),
            pixel_values=pixels,
            image_grid_thw=grid.to(self.device),
        )

    def turn(self, inputs: dict[str, Tensor], tokens: list[int]) -> Turn:
        """A step with the answer padded to the greatest length, as it is kept and read."""
        ids = inputs["input_ids"][0].tolist()
        padding = [self.vlm.pad] * (self.config.max_new_tokens - len(tokens))
        picture = inputs["pixel_values"], inputs["image_grid_thw"]
        row = self.inputs(ids + tokens + padding, len(ids) + len(tokens), *picture)
        thought = self.vlm.thought_tokens(tokens)
        return Turn(row, len(ids), tokens, thought, self.vlm.decode(tokens))

    def read(self, model: nn.Module, turn: Turn, hidden: bool = True) -> Reading:
        """Log-probabilities of an answer, from the whole row's over the whole vocabulary."""
        out = model(**turn.inputs, output_hidden_states=hidden, use_cache=False)
        scores = out.logits.float() / self.config.temperature + self.bias  # [1, P + max, V]
        logprobs = torch.log_softmax(scores, -1)[0, turn.prompt - 1 :]
        answer = torch.tensor(turn.tokens, device=self.device)
        logprob = logprobs[: len(answer)].gather(1, answer[:, None])[:, 0]
        return Reading(logprob, out.hidden_states[-1][:, turn.prompt - 1] if hidden else None)

    @torch.no_grad()
    def score(self, turn: Turn) -> None:
        """Log-probability, value, and the KL estimate of the thought to the teacher."""
        own = self.read(self.policy, turn)
        turn.logprob = self.of_step(turn, own.logprob).item()
        turn.value = self.value_head(own.hidden).item()
        self._count_reading(turn)
        if self.teacher is not None:
            theirs = self.read(self.teacher, turn, hidden=False)
            kl = kl_estimate(own.logprob, theirs.logprob, "clip")[: turn.thought]
            turn.kl = kl.mean().item() if len(kl) else 0.0
            self._count_reading(turn)

    def of_step(self, turn: Turn, logprob: Tensor) -> Tensor:
        """[1] weighted sum of the tokens' log-probabilities [T]."""
        place = torch.arange(len(logprob), device=self.device)
        thought, row = place < turn.thought, torch.zeros_like(place)
        return step_logprob(logprob, thought, row, 1, self.config.thought_coef)

    def act(self, turn: Turn) -> None:
        """Play an answer; one that is illegal, or was cut off, is no action."""
        env, c = self.env, self.config
        action = env.read_answer(turn.text).action if turn.tokens[-1] == self.vlm.end else None
        if action is None:
            self.picture, reward, *ends, _ = env.step_illegal()
            turn.reward = reward + c.format_invalid
        else:
            self.picture, reward, *ends, _ = env.step(env.actions.index(action))
            turn.reward = reward + c.format_valid
        turn.terminated, turn.truncated = ends
        self.ended = any(ends)

    @torch.no_grad()
    def value(self) -> float:
        """Value of the environment as it is."""
        inputs = self.prompt()
        out = self.policy(**inputs, output_hidden_states=True, use_cache=False)
        self._count(inputs["input_ids"].shape[1], 0)
        return self.value_head(out.hidden_states[-1][:, -1]).item()

    def train(self, turns: Sequence[Turn]) -> dict[str, float]:
        """PPO epochs; mean losses of the minibatches and norm of the gradient."""
        c = self.config
        values, ends = torch.tensor([t.value for t in turns]), [t.truncated for t in turns]
        following = torch.tensor([t.following for t in turns])
        inside = ~torch.tensor([t.terminated or t.truncated for t in turns])
        following[inside] = values.roll(-1)[inside]
        targets = gae(
            torch.tensor([t.reward - KL_COEF * t.kl for t in turns]),
            values,
            following,
            torch.tensor([t.terminated for t in turns]),
            torch.tensor(ends),
            c.gamma,
            c.gae_lambda,
        )
        spread = targets.advantages.std(correction=0) + 1e-8  # of one step 0, not NaN
        advantages = ((targets.advantages - targets.advantages.mean()) / spread).to(self.device)
        returns = targets.returns.to(self.device)
        sums = torch.zeros(2)
        norms = []
        for _ in range(c.epochs):
            order = torch.randperm(len(turns)).tolist()
            for first in range(0, len(order), ACCUMULATE):
                rows = order[first : first + ACCUMULATE]
                for i in rows:
                    sums += self.accumulate(turns[i], advantages[i], returns[i], 1 / len(rows))
                norms.append(nn.utils.clip_grad_norm_(self.trained, PAPER["grad_clip"]).item())
                self.optimizer.step()
                self.optimizer.zero_grad()
        policy, value = (sums / (c.epochs * len(turns))).tolist()
        kl = sum(t.kl for t in turns) / len(turns)
        norm = sum(norms) / len(norms)
        return dict(policy_loss=policy, value_loss=value, teacher_kl=kl, grad_norm=norm)

    def accumulate(self, turn: Turn, advantage: Tensor, target: Tensor, share: float) -> Tensor:
        """Add the gradient of one step's loss; [2] loss of policy and critic."""
        c = self.config
        own = self.read(self.policy, turn)
        old = torch.tensor([turn.logprob], device=self.device)
        policy = ppo_loss(self.of_step(turn, own.logprob), old, advantage[None], PAPER["clip"]).loss
        value = value_loss(self.value_head(own.hidden), target[None])
        ((policy + c.value_coef * value) * share).backward()
        self._count_reading(turn, trained=True)
        return torch.stack([policy, value]).detach().cpu()

    def save(self) -> Path:
        """Write the adapter; its folder."""
        folder = self.path / str(self.updates)
        self.policy.save_pretrained(folder)
        return folder

    def merge(self, folder: Path) -> None:
        """Take a saved adapter in, and make the teacher's anew of all that were taken."""
        from peft import PeftModel

        name = str(self.updates)
        if self.teacher is None:
            self.teacher = PeftModel.from_pretrained(self.copy, folder, adapter_name=name).eval()
        else:
            self.teacher.load_adapter(folder, adapter_name=name)
        self.names.append(name)
        self.teacher.set_adapter(name)
        if MERGED in self.teacher.peft_config:  # else the new merge would be left undone, silently
            self.teacher.delete_adapter(MERGED)
        self.teacher.add_weighted_adapter(
            self.names,
            [1.0] * len(self.names),  # peft divides by the number of those that agree
            MERGED,
            combination_type="ties",
            density=self.config.density,
        )
        self.teacher.set_adapter(MERGED)
        self.teacher.eval().requires_grad_(False)

    def _count(self, tokens: int, predicted: int, trained: bool = False) -> None:
        self.flops += vision_flops(self.sizes, self.patches)
        pairs = causal_pairs(0, tokens)
        self.flops += text_flops(self.sizes, tokens, pairs, predicted, trained)

    def _count_reading(self, turn: Turn, trained: bool = False) -> None:
        self._count(turn.prompt + len(turn.tokens) - 1, len(turn.tokens), trained)


class _Clock:
    """Seconds of each phase, in all."""

    def __init__(self, device: str):
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = time.perf_counter()

    def lap(self, phase: str) -> None:
        """What passed since the last lap belongs to `phase`."""
        if self.device == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] += now - self.last
        self.last = now


def fastest(
    config: TrainConfig, dtypes: Sequence[torch.dtype], cores: int, path: Path, device: str = "cpu"
) -> tuple[torch.dtype, int]:
    """The dtype and the number of threads with which the recipe is fastest here.

    Where other programs use the cores, threads that wait for one another are slower by far.
    """
    config = replace(config, max_new_tokens=TRIAL_TOKENS)
    recipes = {d: Recipe(config, path / str(d), d, device=device) for d in dict.fromkeys(dtypes)}
    settings = [(dtype, threads) for dtype in recipes for threads in sorted({1, cores})]
    took = dict.fromkeys(settings, float("inf"))
    for recipe in recipes.values():
        recipe.update(1)  # warms up, and makes a teacher
    for _ in range(TRIALS):
        for dtype, threads in settings:
            recipe = recipes[dtype]
            recipe.threads = threads
            start = time.perf_counter()
            recipe.update(1)
            seconds = time.perf_counter() - start
            took[dtype, threads] = min(took[dtype, threads], seconds)
    return min(took, key=took.__getitem__)
