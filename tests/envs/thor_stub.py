"""Stands in for the Unity build, so that the real AlfredThorEnv runs: threads, queues, infos.

The room is TextWorld's, the frame is red.
"""

import sys
import types

import numpy as np


class Thor:
    """The simulator: one red frame, and the goal of the text game."""

    def __init__(self, player_screen_height, player_screen_width, **options):
        self.shape = (player_screen_height, player_screen_width, 3)
        self.save_frames_to_disk, self.save_frames_path, self.state = False, "", None

    def reset(self, scene):
        """Nothing to load."""

    restore_scene = step = set_task = lambda self, *values, **options: None

    def get_goal_satisfied(self):
        """Whether the text game is won."""
        return bool(self.state["won"])

    def get_goal_conditions_met(self):
        """Of one condition."""
        return int(self.state["won"]), 1

    def stop(self):
        """Nothing runs."""

    @property
    def last_event(self):
        """The simulator's frames are RGB."""
        frame = np.zeros(self.shape, np.uint8)
        frame[..., 0] = 255
        return types.SimpleNamespace(frame=frame)


class Oracle:
    """ALFWorld's controller, over the text game: it takes "put X in/on Y" and offers "move"."""

    def __init__(self, env, traj_data, traj_root, **options):
        import textworld
        from alfworld.agents.environment.alfred_tw_env import AlfredDemangler
        from textworld.envs import PddlEnv

        infos = textworld.EnvInfos(admissible_commands=True, won=True)
        self.game, self.env = AlfredDemangler(PddlEnv(infos)), env
        self.game.load(f"{traj_root}/game.tw-pddl")
        self.state = env.state = self.game.reset()
        self.feedback = self.state.feedback

    def step(self, command):
        """Raises on what the real controller would not understand."""
        assert not command.startswith("move "), command
        if command.startswith("put "):
            thing, place = command.removeprefix("put ").split(" in/on ")
            command = f"move {thing} to {place}"
        self.state = self.env.state = self.game.step(command)[0]
        self.feedback = self.state.feedback
        return self.feedback

    def get_admissible_commands(self):
        """Those of the text game."""
        return list(self.state["admissible_commands"])


def install():
    """Put the stand-ins where alfworld imports the simulator."""
    nothing = dict.fromkeys(("OracleAStarAgent", "MaskRCNNAgent", "MaskRCNNAStarAgent"))
    for name, found in {
        "alfworld.env.thor_env": {"ThorEnv": Thor},
        "alfworld.agents.detector.mrcnn": {"load_pretrained_model": None},
        "alfworld.agents.controller": {"OracleAgent": Oracle, **nothing},
    }.items():
        module = types.ModuleType(name)
        module.__dict__.update(found)
        sys.modules[name] = module


if __name__ == "__main__":
    install()
    from turbo.envs.alfworld_engine import serve
    from turbo.envs.alfworld_thor import ThorGame

    serve(ThorGame)
