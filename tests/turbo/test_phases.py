"""turbo/phases.py: what a phase took, and how far the one under way is."""

import time

import tiny_models

from turbo.measure import evaluate
from turbo.parallel import Crew
from turbo.phases import Phases
from turbo.rollout import RolloutOptions, Table


def test_phases_follow_each_other():
    phases = Phases()
    assert (phases.name, phases.total, phases.seconds) == ("", 0, {})
    for name in ("rollout", "train"):
        phases.begin(name)
        assert phases.name == name and (phases.done, phases.total) == (0, 0)
        phases.expect(7)
        phases.done = 3
        time.sleep(0.02)
    phases.end()
    assert phases.name == "" and list(phases.seconds) == ["rollout", "train"]
    assert all(value >= 0.02 for value in phases.seconds.values())
    assert phases.elapsed >= sum(phases.seconds.values()) - 1e-6
    phases.restart("rollout")
    assert phases.name == "rollout"
    assert phases.seconds == {} and phases.elapsed < 1


class Watched(Phases):
    """Remembers how far it was told to be."""

    def __setattr__(self, name, value):
        if name == "done":
            self.__dict__.setdefault("heard", []).append(value)
        super().__setattr__(name, value)


def test_playing_tells_how_far_it_is():
    vlm, phases = tiny_models.fitted_model(), Watched()
    table = Table(vlm, tiny_models.new_env, RolloutOptions(8, 4, 0.7, 40), Crew(), phases)
    rollout = table.collect(vlm.weights(), (1,), 24)
    steps = phases.heard
    assert phases.total == 24 and steps[-1] == len(rollout.steps) >= 24
    assert steps[2:] == sorted(steps[2:]) and len(set(steps)) > 4
    phases.heard.clear()
    evaluate(
        vlm,
        vlm.weights(),
        tiny_models.new_env,
        episodes=12,
        seed=0,
        temperature=0.7,
        max_new_tokens=40,
        crew=Crew(),
        envs=4,
        phases=phases,
    )
    assert phases.total == 12 == phases.heard[-1]  # episodes here
    assert phases.heard[1:] == sorted(phases.heard[1:]) and len(set(phases.heard)) > 3
