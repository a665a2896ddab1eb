"""Play a game in the terminal, or watch a policy play it: `python -m turbo.play points24`.

    python -m turbo.play points24                        you play
    python -m turbo.play points24 --model tiny           the built-in warm start plays
    python -m turbo.play --checkpoint RUN                the policy of a run; --teacher: its teacher

You and the policies are dealt the deals of an evaluation with the same seed, and a policy samples
as there: what is watched are the episodes of `turbo.eval --seed SEED --workers 1 --envs 1`.

Left out: figures with intervals (`turbo.eval`), runs to look back on (`turbo.view`).
"""

import difflib
import secrets
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Annotated, Protocol

import numpy as np
import torch
import tyro
from rich.console import Console

from turbo.checkpoint import run_of
from turbo.config import TrainConfig
from turbo.decode import Decoder, Request
from turbo.envs.base import Answer, Verdict, VisualEnv, action_key
from turbo.envs.make import check_env, is_name
from turbo.eval import EvalConfig, open_source
from turbo.eval import check as check_source
from turbo.flags import conclude, read_flags
from turbo.measure import fresh_deals, mean
from turbo.model import VisionLanguageModel, Weights
from turbo.prefixes import Prefixes
from turbo.presets import defaults
from turbo.rollout import mix, read_answer
from turbo.run import env_maker, find_alfworld, held_out, prompt_style
from turbo.terminal import Screen

HELP = (
    "Here you name the action alone, without JSON. Enter lists the legal ones, ? asks the expert "
    "for a thought, q quits. Anything else costs what an unreadable answer costs a policy."
)
THOUGHT, ACTION, ASIDE = "italic cyan", "bold", "dim"


@dataclass
class PlayConfig:
    """Play a game in the terminal, or watch a policy play it (--model, --checkpoint)."""

    env: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[ENV]")] = ""
    """which environment is played: a name as in training, or module:Class (empty: that of
    --checkpoint, else points24)"""
    checkpoint: Annotated[str, tyro.conf.arg(metavar="RUN")] = ""
    """watch the policy of this run directory, as its newest checkpoint has it, or RUN/checkpoints/N
    (empty: you play)"""
    teacher: bool = False
    """with --checkpoint: watch the run's merged teacher instead of its policy"""
    model: str = ""
    """watch this model: `tiny` for the built-in warm start of the environment, a model folder, or
    an id of the Hub (empty: you play)"""
    episodes: int = 1
    """episodes to be played, one after the other"""
    seed: int | None = None
    """seed of the deals, and of sampling; without it another one each time, which is told"""
    temperature: float = 0.2
    """sampling temperature of a policy"""
    max_new_tokens: int = 0
    """longest answer of a policy in tokens (0: as in training)"""
    games: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """ALFWorld: folder of games (empty: the run's; else $ALFWORLD_DATA, or small ones made once)"""
    delay: float = 0.02
    """seconds from one token of a policy to the next in a terminal (0: as fast as they come)"""
    png: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """save every picture as DIR/0001.png and so on; for where a terminal shows no colours"""


class Player(Protocol):
    """Who plays: begins an episode, then answers in each of its states."""

    def begin(self, env: VisualEnv) -> None: ...

    def answer(self, env: VisualEnv, picture: np.ndarray) -> Answer | None:
        """What to do in this state; None ends the game."""


class Person:
    """Who sits at the keyboard, or what is piped into it."""

    def __init__(self, screen: Screen, seed: int):
        self.screen, self.rng = screen, np.random.default_rng(seed)
        self.rules = ""

    def begin(self, env: VisualEnv) -> None:
        """Say what the game is, once."""
        rules = env.prompt("full").fixed.rstrip()
        if rules != self.rules:
            self.screen.say(rules, ASIDE)
            self.screen.say(HELP)
        self.rules = rules

    def answer(self, env: VisualEnv, picture: np.ndarray) -> Answer | None:
        """Ask until there is an action, legal or not. Names of actions go before q and ?."""
        self.screen.say(env.prompt("full").state)
        while True:
            actions = list(env.actions)
            line = self._read()
            if line in actions:
                return Answer(line, line, {}, None)
            if line is None or line == "q":
                return None
            if line == "":
                self._list(actions)
            elif line == "?":
                self.screen.say(expert_thought(env, self.rng), THOUGHT)
            else:
                near = difflib.get_close_matches(line, actions, n=1)
                hint = f", did you mean {near[0]!r}?" if near else ""
                return Answer(line, None, {}, f"{line!r} is no action here{hint}")

    def _read(self) -> str | None:
        try:
            if sys.stdin is None:  # closed by the caller
                raise EOFError
            line = input("> ").strip()
        except EOFError:
            self.screen.say()
            return None
        if not sys.stdin.isatty():  # so that the record shows what was said
            self.screen.say(line)
        return line

    def _list(self, actions: list[str]) -> None:
        line = "  ".join(actions)
        fits = len(line) <= self.screen.console.width and not any(" " in a for a in actions)
        self.screen.say(line if fits else "\n".join(actions))


def expert_thought(env: VisualEnv, rng: np.random.Generator) -> str:
    """What an expert thinks in this state, and does."""
    text = env.expert_answer(rng)
    if text is None:
        return "the expert has nothing to say here"
    answer = env.read_answer(text)
    return f"{answer.fields.get('thoughts', text)} -> {answer.action}"


class Policy:
    """A model that plays one environment, sampling as a rollout does; its answers are streamed."""

    def __init__(
        self,
        vlm: VisionLanguageModel,
        weights: Weights,
        screen: Screen,
        c: PlayConfig,
        run: TrainConfig,
    ):
        self.vlm, self.weights, self.screen, self.config = vlm, vlm.merged(weights), screen, c
        self.style, self.max_new_tokens = prompt_style(run), run.max_new_tokens
        # the random numbers of an evaluation's first worker
        self.generator = torch.Generator().manual_seed(mix(c.seed, 2**31, 0, 1))

    def begin(self, env: VisualEnv) -> None:
        """Forget the pictures and the answers of the episode before."""
        c, fixed = self.config, env.prompt(self.style).fixed
        self.prefixes = Prefixes(self.vlm, self.weights, fixed)
        longest = self.max_new_tokens
        self.decoder = Decoder(self.vlm, self.weights, 1, c.temperature, longest, self.generator)
        self.shown, self.previous = None, None

    @torch.no_grad()
    def answer(self, env: VisualEnv, picture: np.ndarray) -> Answer:
        """Sample an answer, show it as it comes, and what the exact solver thinks of it."""
        vlm, previous = self.vlm, self.previous
        if self.shown is None or not np.array_equal(picture, self.shown):
            self.prefixes.add(*vlm.see([picture]))
            self.decoder.show(0, *self.prefixes.get(len(self.prefixes.features) - 1))
            self.shown = picture
        state = env.prompt(self.style).state
        self.screen.say(state)
        suffix = vlm.encode(vlm.frame.suffix(state))
        self.decoder.ask(0, Request(suffix, lambda written: env.guess_answer(written, previous)))
        row, told = self.decoder.rows[0], 0
        while self.decoder.rows:
            self.decoder.advance()  # guessed tokens that were right come together
            self._stream(row.tokens, told, action_key(env))
            told = len(row.tokens)
        self.screen.say()
        answer = read_answer(vlm, env, row.tokens)
        self.previous = answer.text
        self.screen.say(describe(env.judge(answer)), ASIDE)
        return answer

    def _stream(self, tokens: list[int], told: int, key: str) -> None:
        """Show the tokens from number `told` on, those of the thought in a style of their own.

        A character of several bytes is held back until its last one is there.
        """
        texts = [self.vlm.decode(tokens[:n]).rstrip("\ufffd") for n in range(told, len(tokens) + 1)]
        action = texts[-1].rfind(key)
        action = len(texts[-1]) if action < 0 else action
        for before, after in pairwise(texts):
            for start, end, style in ((0, action, THOUGHT), (action, len(after), ACTION)):
                if piece := after[max(start, len(before)) : end]:
                    self.screen.stream(piece, style)


def describe(verdict: Verdict) -> str:
    """A verdict in words; what it does not say is left out."""
    parts = [
        ("reads the picture", verdict.perception),
        ("aims at what is right", verdict.aim),
        ("does what it aims at", verdict.follows),
    ]
    known = [f"{name}: {'yes' if value else 'no'}" for name, value in parts if value is not None]
    return f"[{', '.join(known)}]" if known else "[no verdict]"


@dataclass(frozen=True)
class Played:
    """What came of an episode."""

    success: bool
    solvable: bool
    episode_return: float
    steps: int

    def __str__(self) -> str:
        end = "won" if self.success else "lost" if self.solvable else "lost, as it had to be"
        return f"{end}: return {self.episode_return:g} in {self.steps} step{'s' * (self.steps > 1)}"


def play_episode(env: VisualEnv, player: Player, screen: Screen, deal: dict) -> Played | None:
    """One episode of a deal, the arguments of `reset`; None where the player has left."""
    picture, info = env.reset(**deal)
    player.begin(env)
    solvable, total, steps, over = info.get("solvable", True), 0.0, 0, False
    while not over:
        screen.show(picture)
        answer = player.answer(env, picture)
        if answer is None:
            return None
        if answer.action is None:
            picture, reward, terminated, truncated, info = env.step_illegal()
        else:
            action = env.actions.index(answer.action)
            picture, reward, terminated, truncated, info = env.step(action)
        screen.say(f"{answer.action or answer.error}: reward {reward:g}")
        total, steps, over = total + reward, steps + 1, terminated or truncated
    screen.show(picture)
    return Played(bool(info["success"]), bool(solvable), total, steps)


def summary(env: VisualEnv, played: list[Played]) -> str:
    """Success and return of the episodes that came to their end, beside the best there is."""
    best = env.optimum()
    lines = []
    if played:
        won, total = sum(p.success for p in played), mean([p.episode_return for p in played])
        lines = [f"{won} of {len(played)} won, mean return {total:g}"]
    possible = "" if best.episode_return is None else f", mean return {best.episode_return:.4g}"
    lines += [f"best possible: {best.success_rate:.1%} won{possible} ({best.source})"]
    return "\n".join(lines)


def check(c: PlayConfig) -> None:
    """Refuse what cannot be played; without a run, an environment that is not named is points24."""
    if c.env and not is_name(c.env) and (run_of(c.env) or c.env == "tiny"):
        way = "--model tiny" if c.env == "tiny" else f"--checkpoint {c.env}"
        raise ValueError(f"{c.env} is no environment: to watch it play, use {way}")
    if not c.checkpoint:
        c.env = c.env or "points24"
    if c.env:
        check_env(c.env)
    if c.games and c.env not in ("", "alfworld"):
        raise ValueError("--games is for alfworld alone: leave it out")
    if c.max_new_tokens < 0:
        raise ValueError(f"--max-new-tokens must be zero or more, got {c.max_new_tokens}")
    if c.episodes < 1:
        raise ValueError(f"--episodes must be at least 1, got {c.episodes}")
    if c.seed is not None and c.seed < 0:
        raise ValueError(f"--seed must be zero or more, got {c.seed}")
    if not 0 <= c.delay <= 10:
        raise ValueError(f"--delay must be 0 to 10 seconds, got {c.delay}")
    if c.model and c.checkpoint:
        raise ValueError(f"--model {c.model} and --checkpoint {c.checkpoint}: give one of the two")
    if c.teacher and not c.checkpoint:
        raise ValueError("--teacher needs --checkpoint RUN, whose merged teacher it is")
    if c.checkpoint and not run_of(c.checkpoint):
        raise ValueError(f"--checkpoint {c.checkpoint} is no run directory of turbo.train")


def open_game(c: PlayConfig, screen: Screen) -> tuple[VisualEnv, Player]:
    """The environment as the player sees it, and the player."""
    if c.model or c.checkpoint:
        names = ("env", "teacher", "episodes", "seed", "temperature", "max_new_tokens", "games")
        asked = EvalConfig(c.checkpoint or c.model, **{name: getattr(c, name) for name in names})
        run = check_source(asked)
        torch.set_num_threads(1)  # as in a crew: at small products threads wait for one another
        vlm, weights, _ = open_source(asked, run)
        find_alfworld(run, held_out(run.env))
        env = env_maker(replace(run, hands=0), held_out(run.env))()
        return env, Policy(vlm, weights, screen, c, run)
    # the small pictures have the larger letters: they can be read in a terminal
    observation = "small" if screen.shows_pictures and not c.png else "full"
    run = replace(defaults(c.env, "tiny"), observation=observation, games=c.games)
    find_alfworld(run, "all")
    return env_maker(run)(), Person(screen, c.seed)


def main(argv: list[str] | None = None) -> int:
    """Play; returns the exit status."""
    try:
        c = read_flags(PlayConfig, sys.argv[1:] if argv is None else argv, "turbo.play")
        check(c)
        told = c.seed is None
        if told:
            c.seed = secrets.randbelow(1_000_000)
        screen = Screen(Console(), c.png, c.delay)
        env, player = open_game(c, screen)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if told:
        screen.say(f"the same deals again: --seed {c.seed}", ASIDE)
    played = []
    for number, deal in enumerate(fresh_deals(c.episodes, c.seed), 1):
        if c.episodes > 1:
            screen.say(f"\nepisode {number} of {c.episodes}", ACTION)
        outcome = play_episode(env, player, screen, deal)
        if outcome is None:
            break
        screen.say(str(outcome), ACTION)
        played.append(outcome)
    screen.say(summary(env, played))
    return 0


if __name__ == "__main__":
    sys.exit(conclude(main))
