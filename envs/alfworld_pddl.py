"""A drawn game in ALFWorld's terms: its PDDL problem, its sentence, and a plan that wins it.

The domain, the grammar, the goals, the sentences, what fits where and what can be heated or cleaned
are read from the installed alfworld. The planner is TextWorld's. It sees only what the task needs:
among 45 objects it may search for minutes. No rule of the domain asks for the absence of another
object or receptacle, so a plan for a part of the room is one for the room.

Left out: what stands where (`alfworld_rooms`), files (`alfworld_games`), playing (`alfworld`).
"""

import os
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

from turbo.envs.alfworld_rooms import LAMP, Game
from turbo.envs.alfworld_scene import TREATMENTS, Scene, kind_of

START = "loc_bar_0_bar_0_bar_0_bar_30"  # in the middle of the room


def import_alfworld() -> None:
    """Import alfworld without its making a folder in the user's home."""
    if "alfworld.info" in sys.modules:
        return
    has_folder = Path("~/.cache/alfworld").expanduser().exists()
    try:
        if "ALFWORLD_DATA" in os.environ or has_folder:
            import alfworld.info

            return
        with tempfile.TemporaryDirectory() as folder:  # it is made at import and used by nothing
            os.environ["ALFWORLD_DATA"] = folder
            try:
                import alfworld.info  # noqa: F401
            finally:
                del os.environ["ALFWORLD_DATA"]
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'gtr-turbo[alfworld]'") from error


def spelling(kind: str) -> str:
    """A kind as ALFWorld spells it: "SinkBasin" for "sinkbasin"; "" for ""."""
    import_alfworld()
    from alfworld.gen.constants import OBJECTS_LOWER_TO_UPPER

    return OBJECTS_LOWER_TO_UPPER[kind] if kind else ""


def sentence(game: Game) -> str:
    """The task in one of ALFWorld's own sentences."""
    import_alfworld()
    from alfworld.gen.goal_library import gdict

    goal = game.goal
    template = gdict[goal.task]["templates"][game.wording]
    return template.format(obj=goal.thing, recep=goal.place, toggle=goal.lamp, mrecep="")


def entities(game: Game) -> dict[str, str]:
    """Name -> its name in PDDL, for all receptacles and objects.

    ALFWorld's Demangler numbers those of a kind from behind: the last one is number 1.
    """
    places = game.scene.places
    names = [place.name for place in places]
    names += [thing.name for place in places for thing in place.contents]
    totals = Counter(map(kind_of, names))
    found = {}
    for name in names:
        kind = spelling(kind_of(name))
        rank = totals[kind_of(name)] + 1 - int(name.rsplit(" ", 1)[1])
        where = f"_bar__plus_{rank:02d}_dot_00_bar__plus_00_dot_90_bar__plus_00_dot_00"
        stem = kind.removesuffix("Basin")  # a sink's name ends with its basin
        found[name] = stem + where + (f"_bar_{kind}" if stem != kind else "")
    return found


def problem(game: Game, part: Scene | None = None) -> str:
    """The game in PDDL, over ALFWorld's domain; `part`: as if there were only this."""
    import_alfworld()
    from alfworld.gen.goal_library import gdict

    ids, goal, scene = entities(game), game.goal, part or game.scene
    at = {
        place.name: f"loc_bar_{i}_bar_0_bar_0_bar_30"
        for i, place in enumerate(game.scene.places, 1)
    }
    at = {place.name: at[place.name] for place in scene.places}
    things = [thing for place in scene.places for thing in place.contents]
    place_kinds = sorted({spelling(place.kind) for place in scene.places})
    thing_kinds = sorted({spelling(thing.kind) for thing in things})
    objects = [
        "agent1 - agent",
        *(f"{kind}Type - otype" for kind in thing_kinds),
        *(f"{kind}Type - rtype" for kind in place_kinds),
        *(f"{ids[thing.name]} - object" for thing in things),
        *(f"{ids[place.name]} - receptacle" for place in scene.places),
        *(f"{location} - location" for location in (START, *at.values())),
    ]
    facts = [f"atLocation agent1 {START}", *_kind_facts(place_kinds, thing_kinds)]
    for place in scene.places:
        own, where = ids[place.name], at[place.name]
        facts.append(f"receptacleType {own} {spelling(place.kind)}Type")
        facts.append(f"receptacleAtLocation {own} {where}")
        if place.openable:
            facts.append(f"openable {own}")
        for thing in place.contents:
            facts.append(f"inReceptacle {ids[thing.name]} {own}")
            facts.append(f"objectAtLocation {ids[thing.name]} {where}")
            facts += _thing_facts(ids[thing.name], thing.kind)
    wanted = gdict[goal.task]["pddl"].format(
        obj=spelling(goal.thing), recep=spelling(goal.place), toggle=spelling(goal.lamp), mrecep=""
    )
    head = ["(define (problem generated)", "(:domain alfred)", "(:objects", *objects, ")", "(:init"]
    # ALFWorld's goal closes the definition too; "#" stands there for the dash of a type
    return "\n".join([*head, *(f"({fact})" for fact in facts), ")", wanted.replace("#", "-")])


def _kind_facts(place_kinds: list[str], thing_kinds: list[str]) -> list[str]:
    """What fits where."""
    from alfworld.gen.constants import VAL_RECEPTACLE_OBJECTS as fits

    return [
        f"canContain {place}Type {thing}Type"
        for place in place_kinds
        for thing in thing_kinds
        if thing in fits[place]
    ]


def _thing_facts(entity: str, kind: str) -> list[str]:
    """The kind of an object, and what can be done with it."""
    from alfworld.gen.constants import VAL_ACTION_OBJECTS

    facts = [f"objectType {entity} {spelling(kind)}Type"]
    if kind != LAMP:
        facts.append(f"pickupable {entity}")
    return facts + [
        f"{ability.lower()} {entity}"
        for ability, able in VAL_ACTION_OBJECTS.items()
        if spelling(kind) in able
    ]


def relevant(game: Game) -> Scene:
    """What the task needs: objects of its kinds, where they lie, and where they are taken."""
    goal = game.goal
    kinds = {goal.place, TREATMENTS[goal.task][2] if goal.task in TREATMENTS else ""}
    places = []
    for place in game.scene.places:
        contents = tuple(t for t in place.contents if t.kind in (goal.thing, goal.lamp))
        if contents or place.kind in kinds:
            places.append(replace(place, contents=contents))
    return Scene(tuple(places))


class Planner:
    """TextWorld's planner; the domain and the grammar are parsed once for all games."""

    def __init__(self) -> None:
        import_alfworld()
        import fast_downward
        from alfworld.info import ALFRED_PDDL_PATH, ALFRED_TWL2_PATH
        from textworld.envs.pddl.logic import GameLogic

        self.domain = Path(ALFRED_PDDL_PATH).read_text(encoding="utf-8")
        self.grammar = Path(ALFRED_TWL2_PATH).read_text(encoding="utf-8")
        self.logic = GameLogic(self.domain, self.grammar)
        self.library = fast_downward.load_lib()

    def solve(self, game: Game) -> list[str]:
        """Commands that win the game, carried out in the engine; none if there are none."""
        import fast_downward
        from textworld.envs.pddl.logic import PddlState
        from textworld.generator.game import EntityInfo

        arguments = sys.argv
        try:  # the translator reads its options from the command line
            state = PddlState(self.library, problem(game, relevant(game)), self.logic)
        except KeyError:  # a goal that can never hold
            return []
        finally:
            sys.argv = arguments
        named = {entity.lower(): name for name, entity in entities(game).items()}
        infos = {v.name: EntityInfo(v.name, v.type) for f in state.facts for v in f.arguments}
        for entity, info in infos.items():
            info.name = named.get(entity, entity)
        commands = state.replan(infos)
        plan = (fast_downward.Operator * len(commands))()
        self.library.get_last_plan(plan)
        for operator in plan:
            for action in state.all_applicable_actions():
                values = (value.name for value in action.mapping.values())
                if " ".join([action.name, *values]) == operator.name:
                    state.apply(action)
                    break
        return commands if state.check_goal() else []
