"""What a run is asked for and would do nothing, refused before it starts.

What a preset sets is left alone, and so is what an older run was saved with. Left out: settings
that cannot work (`turbo.config`); those that stand in a row of runs of which one has no teacher,
such as `--kl-coef 20` beside `--guidance none`.
"""

from turbo.config import TrainConfig
from turbo.flags import flag


def check_idle(c: TrainConfig, base: TrainConfig) -> None:
    """Refuse what is not as in `base`, a preset or a run's own settings, and would do nothing."""
    critic = "is for the critic: add --advantage gae, or leave it out"
    # As a loss the other estimators do not have the gradient of a KL, and k1 has none.
    is_loss = c.guidance == "kl" and c.kl_placement == "loss"
    steers = not is_loss or c.kl_estimator in ("full", "forward", "k3")
    external = "is for --guidance gtr: add that, or leave it out"
    rules = {
        "teacher": (
            c.teaches,
            f"has no use with --guidance {c.guidance}: leave it out, or use --guidance kl",
        ),
        "teacher_url": (c.guidance == "gtr", external),
        "teacher_model": (c.guidance == "gtr", external),
        "density": (
            c.density > 0,
            "keeps no entry, and the teacher would be the warm start: give more than 0, or "
            "--teacher initial",
        ),
        "history_length": (c.env == "alfworld", "is for alfworld alone: leave it out"),
        "kl_estimator": (
            steers,
            "has not the gradient of a KL as a loss: use full, forward or k3, or --kl-placement "
            "advantage",
        ),
        "kl_placement": (
            steers,
            f"makes no KL of --kl-estimator {c.kl_estimator}: add --kl-estimator full",
        ),
        "kl_share": (c.kl_coef == "auto", "is for --kl-coef auto: add that, or leave it out"),
        "gamma": (c.advantage == "gae", critic),
        "gae_lambda": (c.advantage == "gae", critic),
        "value_coef": (c.advantage == "gae", critic),
        "critic_learning_rate": (c.advantage == "gae", critic),
        "ema_alpha": (c.weighting == "ema", "is for --weighting ema: leave it out"),
        "score_episodes": (c.weighting == "score", "is for --weighting score: add that"),
        "skip_certain": (
            c.advantage != "gae" or c.skip_certain == 0,
            "has no use with --advantage gae: a critic learns of all steps",
        ),
    }
    for name, (used, why) in rules.items():
        value = getattr(c, name)
        if value != getattr(base, name) and not used:
            raise ValueError(f"{flag(name)} {value} {why}")
