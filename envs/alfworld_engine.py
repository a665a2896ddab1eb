"""ALFWorld's text engine, many times faster: the game is translated once and played from that.

TextWorld plays a PDDL problem through Fast Downward's library, which takes a tenth of a
millisecond a step; around it a grammar is parsed again for every command, some 20 ms in a small
room and 100 ms in a large one, and at every reset the problem is translated twice. Here
TextWorld's own classes translate a game once, into what playing needs: the planner's two files,
the facts that never change, the names of things, and a command for every action. That is kept in a
file. Games, commands and outcomes are those of TextWorld, which a test compares step by step.

A game can be played in this process, by one thread, or in a process of its own: run as
`python -m turbo.envs.alfworld_engine` this is asked by lines of JSON on its standard input
(`alfworld_process` is the other side).

Left out: pictures, rewards, what a person or a model sees (`alfworld`).
"""

import base64
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import zlib
from functools import cache
from pathlib import Path
from typing import ClassVar

from turbo.envs.alfworld_pddl import import_alfworld

VERSION = 1  # of the translation
HINT = "ALFWorld's engine is not installed: pip install 'gtr-turbo[alfworld]'"
GO_TO = "gotolocation"
TOLD = {  # facts that say what is where and how it is
    *("atlocation", "receptacleatlocation", "inreceptacle", "holds", "openable", "opened"),
    *("ishot", "iscool", "isclean", "istoggled", "issliced"),
}
_FIELD = re.compile(r"\{(\w+)\}")


def check_engine() -> None:
    """ValueError, with what to install, where the engine is not there."""
    if not all(map(importlib.util.find_spec, ("alfworld", "textworld", "fast_downward"))):
        raise ValueError(HINT)


def cache_folder() -> Path:
    """Where translations are kept: $GTR_TURBO_CACHE, else gtr-turbo in the user's cache."""
    own = os.environ.get("GTR_TURBO_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(own) if own else base / "gtr-turbo"


def translation(game: Path, apart: bool = True) -> dict:
    """The translated game, from the cache where it is there; else it is made and kept.

    It is made in a process of its own unless told otherwise: TextWorld touches what a process has
    once.
    """
    text = game.read_text()
    digest = hashlib.sha256(f"{VERSION} {text}".encode()).hexdigest()[:32]
    kept = cache_folder() / "alfworld-games" / f"{digest}.json"
    try:
        return json.loads(kept.read_text())
    except (OSError, ValueError):
        found = translate_apart(game) if apart else translate(json.loads(text))
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(found))
        part.replace(kept)
    except OSError:
        pass  # a cache that cannot be written costs time only
    return found


def translate_apart(game: Path) -> dict:
    """`translate` in a process of its own."""
    command = [sys.executable, "-m", "turbo.envs.alfworld_engine", "translate", str(game)]
    root = str(Path(sys.modules["turbo"].__file__).resolve().parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {**os.environ, "PYTHONPATH": path}
    # in a session of its own: Ctrl-C is for this process to deal with
    options = dict(capture_output=True, text=True, env=own, start_new_session=True)
    done = subprocess.run(command, **options)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise ValueError(f"{game} could not be translated: {last[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def translate(game: dict) -> dict:
    """A game file's content, through TextWorld's own translation, as plain data.

    Raises ValueError where the goal cannot be reached at all (the planner's translator then leaves
    it out), ImportError without the engine.
    """
    try:
        import_alfworld()
        from alfworld.agents.utils.misc import Demangler

        stock = _textworld()
    except ImportError as error:
        raise ImportError(HINT) from error
    arguments = sys.argv
    try:  # the translator reads its options from the command line
        stock.load(game)
    except KeyError as error:
        raise ValueError(f"the goal of this game cannot be reached: {error}") from error
    finally:
        sys.argv = arguments
    names = Demangler(game_infos=stock._entity_infos)
    for info in stock._entity_infos.values():
        info.name = names.demangle_alfred_name(info.id)
    state, logic = stock._pddl_state, stock._logic
    facts = {(fact.name, *(a.name for a in fact.arguments)) for fact in state.facts}
    holds = {}  # kind of place -> kinds of things that it may hold
    for fact in facts:
        if fact[0] == "cancontain":
            place, thing = (name.removesuffix("type") for name in fact[1:])
            holds.setdefault(place, []).append(thing)
    text = logic.grammar.derive("#task#", _context(stock, {}, {}))
    return {
        "sas": _pack(state.sas),
        "sas_replan": _pack(state.sas_replan),
        "facts": sorted(list(fact) for fact in facts if fact[0] in TOLD),
        "holds": {place: sorted(things) for place, things in sorted(holds.items())},
        "names": {info.id: info.name for info in stock._entity_infos.values()},
        "parameters": {
            name: [p.name.strip("?") for p in action.parameters]
            for name, action in state._actions.items()
        },
        "templates": {name: action.template for name, action in logic.actions.items()},
        "go_to": _go_to(stock),
        "task": text.split(":", 1)[1].strip().rstrip(".") if ":" in text else text,
    }


@cache
def _textworld():
    """TextWorld's environment, one for all games of a process: each maps a copy of the planner, 33
    MB that no later call gives back."""
    import textworld
    from textworld.envs import PddlEnv

    return PddlEnv(textworld.EnvInfos())


def _context(stock, variables: dict, mapping: dict) -> dict:
    """What TextWorld's grammar is derived in."""
    return {
        "state": stock._pddl_state,
        "facts": list(stock._pddl_state.facts),
        "variables": variables,
        "mapping": mapping,
        "entity_infos": stock._entity_infos,
    }


def _go_to(stock) -> dict[str, str]:
    """Location -> the command that goes there, by TextWorld's grammar: it names what stands there.

    The places of one location cannot move, so this holds for the whole game.
    """
    from textworld.logic import Placeholder, Variable

    template = stock._logic.actions[GO_TO].template
    found = {}
    for fact in stock._pddl_state.facts:
        if fact.name == "receptacleatlocation":
            where = fact.arguments[1].name
            mapping = {Placeholder("lend", "location"): Variable(where, "location")}
            variables = {"lend": stock._entity_infos[where]}
            found[where] = stock._logic.grammar.derive(
                template, _context(stock, variables, mapping)
            )
    return found


def _pack(text: str) -> str:
    return base64.b85encode(zlib.compress(text.encode(), 6)).decode()


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b85decode(text))


class TextGame:
    """One room that is played: `reset`, then `step`. Of one process at most one thread."""

    free: ClassVar[list] = []  # libraries of games that are over; each is a copy of 33 MB, mapped

    def __init__(self):
        try:
            import fast_downward
        except ImportError as error:
            raise ImportError(HINT) from error
        self.planner, self.loaded = fast_downward, ""
        self.library = self.free.pop() if self.free else fast_downward.load_lib()

    def __del__(self):
        if hasattr(self, "library"):
            self.free.append(self.library)

    def reset(self, game: str) -> dict:
        """Begin the game of a file `game.tw-pddl`; what can be told of it, see `_tell`."""
        if game != self.loaded:
            self.game = translation(Path(game))
            self.sas, self.replan = _unpack(self.game["sas"]), _unpack(self.game["sas_replan"])
            self.loaded = game
        self.library.load_sas(self.sas)
        self.library.load_sas_replan(self.replan)
        self.facts = {tuple(fact) for fact in self.game["facts"]}
        atoms = (self.planner.Atom * self.library.get_state_size())()
        self.library.get_state(atoms)
        self._note(atoms)
        return {"task": self.game["task"], "holds": self.game["holds"], **self._tell()}

    def step(self, command: str) -> dict:
        """Do a command that is admissible; any other one leaves the world as it is."""
        if (operator := self.operators.get(command)) is not None:
            effects = (self.planner.Atom * operator[1])()
            self.library.apply_operator(operator[0], effects)
            self._note(effects)
        return {**self._tell(), "done": operator is not None}

    def plan(self) -> dict:
        """The planner's commands to the goal from here; none where it finds no way."""
        if not self.library.replan(False):
            return {"plan": []}
        found = (self.planner.Operator * self.library.get_last_plan_length())()
        self.library.get_last_plan(found)
        return {"plan": [self._command(operator.name, True) for operator in found]}

    def _note(self, atoms) -> None:
        """Take over facts that the planner states or denies."""
        for atom in atoms:
            sign, _, rest = atom.name.partition(" ")
            name, _, arguments = rest.partition("(")
            if name not in TOLD:
                continue
            fact = (name, *arguments[:-1].split(", "))
            (self.facts.discard if sign == "NegatedAtom" else self.facts.add)(fact)

    def _command(self, operator: str, plain: bool = False) -> str:
        """The words of an operator; `plain`, as plans have it: of places side by side, only one."""
        name, *arguments = operator.split()
        values = dict(zip(self.game["parameters"][name], arguments, strict=False))
        if name == GO_TO and not plain:
            return self.game["go_to"][values["lend"]]
        template = "go to {r}" if name == GO_TO else self.game["templates"][name]
        return _FIELD.sub(lambda field: self.game["names"][values[field[1]]], template)

    def _tell(self) -> dict:
        """Facts by their names in the game, the commands that are admissible, whether it is won."""
        count = self.library.get_applicable_operators_count()
        found = (self.planner.Operator * count)()
        self.library.get_applicable_operators(found)
        self.operators: dict[str, tuple[int, int]] = {}
        for operator in found:
            value = (operator.id, operator.nb_effect_atoms)
            self.operators.setdefault(self._command(operator.name), value)
        names = self.game["names"]
        facts = [[fact[0], *(names.get(a, a).strip() for a in fact[1:])] for fact in self.facts]
        return {
            "facts": sorted(facts),
            "actions": sorted(self.operators),
            "won": bool(self.library.check_goal()),
        }


def answer(game, asked: dict) -> dict:
    """What a game, or a maker of games, says to a question."""
    if asked["do"] == "reset":
        return game.reset(asked["game"])
    if asked["do"] == "make":
        return game.make(asked)
    return game.step(asked["action"]) if asked["do"] == "step" else game.plan()


def serve(new_game) -> None:
    """Answer lines of JSON on standard input, one each, until it closes.

    Libraries print, and the planner does: only the copy of standard output made here carries
    answers.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    game = None
    for line in sys.stdin:
        try:
            asked = json.loads(line)
            game = game or new_game()
            told = answer(game, asked)
        except Exception as error:  # told to the other side, which knows what it asked for
            told = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(told) + "\n")
        answers.flush()


def main() -> None:
    """Play text games; AI2-THOR's with the argument "thor"; "make" games; or "translate" one."""
    if sys.argv[1:2] == ["translate"]:
        print("\n" + json.dumps(translate(json.loads(Path(sys.argv[2]).read_text()))))
    elif sys.argv[1:] == ["thor"]:
        from turbo.envs.alfworld_thor import ThorGame

        serve(ThorGame)
    elif sys.argv[1:] == ["make"]:
        from turbo.envs.alfworld_games import Maker

        serve(Maker)
    else:
        serve(TextGame)


if __name__ == "__main__":
    main()
