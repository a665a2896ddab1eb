"""The settings of each game, and of `--preset paper`: the paper's code (arXiv 2512.13043).

Left out: what each setting is, and which are impossible (`turbo.config`).
"""

from turbo.config import TrainConfig

# Card games smaller than Points24 learn within a few updates.
GAME_DEFAULTS: dict[str, dict] = {
    "points24": {},
    "ezpoints": dict(
        updates=30,
        steps_per_update=1024,
        epochs=4,
        learning_rate=1e-3,
        final_learning_rate=1e-4,
        baseline="loo",
        kl_coef="0.5",
    ),
    "numberline": dict(updates=20, steps_per_update=1024),
    "blackjack": dict(updates=30, steps_per_update=1024, group_size=16),
    "alfworld": dict(
        envs=64,
        group_size=4,  # half of the attempts at a game, twice the games
        steps_per_update=2048,
        updates=24,
        max_new_tokens=128,
        temperature=1.0,  # the warm start wins as often as at 0.2, and plays a game in several ways
        format_invalid=-8.0,
        eval_episodes=240,
    ),
}

PRESETS: dict[str, dict] = {
    "tiny": {},
    "paper": dict(
        updates=30,
        envs=64,
        steps_per_update=1024,
        group_size=1,
        temperature=0.2,
        max_new_tokens=256,
        advantage="gae",
        epochs=4,
        minibatch=128,
        clip=0.1,
        skip_certain=0.0,
        # The paper's code pays 3 for a legal answer and takes 2, outside of GAE. Within it, an
        # episode that is dragged out would be worth more than one that is won.
        format_valid=0.0,
        format_invalid=-5.0,
        learning_rate=1e-5,
        final_learning_rate=1e-9,
        critic_learning_rate=1e-3,
        grad_clip=0.01,
        adam_eps=1e-7,
        lora_rank=128,
        lora_alpha=256.0,
        kl_placement="advantage",
        kl_estimator="clip",
        kl_coef="1.0",
        weighting="sma",
        history_max=0,
        guide_first=False,
    ),
}


# What a preset has of its own for some games
PRESETS_OF_GAMES: dict[tuple[str, str], dict] = {
    ("paper", "alfworld"): dict(updates=20, thought_coef=0.2),
}


def defaults(env: str, preset: str) -> TrainConfig:
    """The settings of a preset for one environment."""
    if preset not in PRESETS:
        raise ValueError(f"preset {preset!r} is unknown: use {' or '.join(PRESETS)}")
    own = PRESETS[preset] | PRESETS_OF_GAMES.get((preset, env), {})
    return TrainConfig(**{"env": env, **GAME_DEFAULTS.get(env, {}), **own})
