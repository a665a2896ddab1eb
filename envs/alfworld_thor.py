"""ALFWorld in AI2-THOR: the same answers as the text engine's, with the simulator's own frames.

What differs is made equal here: frames come as BGR and leave as RGB; the file of a game is its
traj_data.json; "move X to Y", which is offered, is understood as "put X in/on Y"; the step limit is
the environment's own (`alfworld`), so that of the simulator is out of reach.

Left out: AI2-THOR itself, which needs a display and a download (`pip install alfworld[full]`).
"""

import base64
import json
import tempfile
from pathlib import Path

from turbo.envs.alfworld_pddl import import_alfworld
from turbo.envs.alfworld_scene import TASKS

FOREVER = 1_000_000  # steps
SIZE = 300  # pixels


class ThorGame:
    """One room in the simulator; the interface of `alfworld_engine.TextGame`."""

    def __init__(self):
        try:
            import_alfworld()
            from alfworld.agents.environment import get_environment

            make = get_environment("AlfredThorEnv")
        except ImportError as error:
            raise ImportError(
                f"AI2-THOR cannot be used ({error}): pip install 'alfworld[full]==0.4.2', on a "
                "machine with a display"
            ) from error
        self.make, self.env = make, None

    def reset(self, game: str) -> dict:
        """Begin the game of a folder or of its game.tw-pddl."""
        folder = Path(game) if Path(game).is_dir() else Path(game).parent
        task = json.loads((folder / "traj_data.json").read_text())["task_type"]
        if self.env is None:
            self.env = self.make(_settings(str(folder)), train_eval="eval_in_distribution")
            self.env.init_env(batch_size=1)
        self.env.json_file_list = [str(folder / "traj_data.json")]
        self.env.get_env_paths = lambda: None  # the one game stays in the list
        observed, infos = self.env.reset()
        words = observed[0].split("Your task is to: ")[-1].strip().rstrip(".")
        assert task in TASKS, task
        return {"task": words, "holds": {}, **self._tell(infos)}

    def step(self, command: str) -> dict:
        """Do an admissible command; any other one leaves the world as it is."""
        if command not in self.actions:
            return {**self.told, "done": False}
        thing, _, place = command.removeprefix("move ").partition(" to ")
        said = f"put {thing} in/on {place}" if command.startswith("move ") else command
        _, _, _, infos = self.env.step([said])
        return {**self._tell(infos), "done": True}

    def plan(self) -> dict:
        """The simulator has no planner."""
        return {"plan": []}

    def _tell(self, infos: dict) -> dict:
        self.actions = sorted(set(infos["admissible_commands"][0]))
        frame = self.env.get_frames()[0][:, :, ::-1]  # BGR to RGB
        self.told = {
            "facts": [],
            "actions": self.actions,
            "won": bool(infos["won"][0]),
            "goal_rate": float(infos["goal_condition_success_rate"][0]),
            "frame": base64.b64encode(frame.tobytes()).decode(),
            "shape": list(frame.shape),
        }
        return self.told


def _settings(folder: str) -> dict:
    """What the simulator's environment asks for."""
    paths = dict.fromkeys(("data_path", "eval_id_data_path", "eval_ood_data_path"), folder)
    thor = {
        "screen_height": SIZE,
        "screen_width": SIZE,
        "smooth_nav": False,
        "save_frames_to_disk": False,
        "save_frames_path": tempfile.gettempdir(),
    }
    return {
        "dataset": {**paths, "num_train_games": -1, "num_eval_games": -1},
        "env": {
            "goal_desc_human_anns_prob": 0,
            "task_types": list(range(1, len(TASKS) + 1)),
            "domain_randomization": False,
            "expert_type": "handcoded",
            "thor": thor,
        },
        "controller": {"type": "oracle", "load_receps": True, "debug": False},
        "general": {"training_method": "dagger"},
        "dagger": {"training": {"max_nb_steps_per_episode": FOREVER}},
    }
