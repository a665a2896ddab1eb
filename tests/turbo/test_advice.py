"""turbo/advice.py on runs that took place: those of docs/study and docs/results, and short ones in
warned_runs.csv, made with the flags below (`no success` and the like are what went wrong)."""

import csv
from collections import defaultdict
from pathlib import Path

import pytest

from turbo import advice, train
from turbo.advice import OLD, WINDOW, Watch, advise, levels
from turbo.config import TrainConfig
from turbo.measure import distinct, self_bleu

HERE = Path(__file__).resolve().parent
DOCS = HERE.parents[1] / "docs"
SHORT = "--steps-per-update 512 --workers 1 --envs 64"
FLAGS = {  # of the runs in warned_runs.csv, beside --eval-episodes 0
    "no success": f"ezpoints {SHORT} --updates 10 --guidance none --advantage gae "
    "--learning-rate 0.02 --final-learning-rate 0.02",
    # of the nano model of tests/tiny_models.py, with 8 environments and rank 4
    "value loss diverges": "numberline --updates 10 --guidance none --advantage gae "
    "--learning-rate 0.0001 --final-learning-rate 0.1",
    "weak guidance": f"ezpoints {SHORT} --updates 6 --kl-coef 0.002",
    "old teacher": f"ezpoints {SHORT} --updates 9 --merge-every 50",
    "critic": f"ezpoints {SHORT} --updates 10 --advantage gae --learning-rate 0.0005",
    "ezpoints": "ezpoints --updates 5",
    "numberline": "numberline --updates 5",
    "blackjack": "blackjack --updates 5",
}
# Collapsed, with the update at which that is to be known: of 14, and of 40 at a lower rate.
RUINED = {("harsh", "none"): 12, ("harsh", "trust"): 12, ("long", "none"): 30}
# It ends at 24.6 % at temperature 0.2, from 39.8; at that of training, which is all that a warning
# sees, its thoughts hardly get worse.
MISSED = ("long", "none", "2")


def read(path, *keys):
    """Runs of a CSV file: their records of updates, as metrics.jsonl has them."""
    runs = defaultdict(list)
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["success_rate"]:
                run = tuple(row.pop(key) for key in keys)
                odd = ("regime", "method", "label", "commit")
                runs[run].append({k: float(v) for k, v in row.items() if v and k not in odd})
    return dict(runs)


STUDY = read(DOCS / "study" / "runs.csv", "regime", "method", "seed")
RESULTS = {
    (name, *run): records
    for name in ("points24", "ezpoints", "collapse")
    for run, records in read(DOCS / "results" / f"{name}.csv", "label", "seed").items()
}
OWN = {run: records for (run,), records in read(HERE / "warned_runs.csv", "run").items()}


def warned(records, c):
    """Every warning that a run gave, with the update at which it began."""
    watch, told = Watch(c), {}
    for record in records:
        for begun in watch.note(record)[0]:
            told.setdefault(begun.name, int(record["update"]))
    return told


def method(name):
    """The settings of a run of the study, as far as warnings depend on them."""
    guidance = {"none": "none", "trust": "none", "slow": "none", "sft": "sft"}
    return TrainConfig(guidance=guidance.get(name, "kl"))


@pytest.mark.parametrize("run", STUDY, ids=" ".join)
def test_the_runs_of_the_study(run):
    """Those that collapsed are told of in time, and nothing is suspected of the others."""
    told = warned(STUDY[run], method(run[1]))
    if run[:2] in RUINED and run != MISSED:
        assert 5 <= told.pop("collapse suspected") <= RUINED[run[:2]]
    if run[0] == "harsh" and run[1] != "slow":
        told.pop("updates too large", None)
    assert told == {}, told


def test_a_rate_that_is_too_high_is_told_of_before_the_collapse():
    for run, records in STUDY.items():
        if run[:2] == ("harsh", "none"):
            told = warned(records, method(run[1]))
            assert told["updates too large"] == 1 + WINDOW < told["collapse suspected"]


@pytest.mark.parametrize("run", RESULTS, ids=" ".join)
def test_the_runs_of_the_results(run):
    told = warned(RESULTS[run], TrainConfig(guidance="none"))
    assert set(told) == ({"collapse suspected"} if run[:2] == ("collapse", "plain PPO") else set())


@pytest.mark.parametrize("run", FLAGS)
def test_short_runs(run):
    expected = {
        "no success": {"no success", "entropy near zero"},
        "value loss diverges": {"value loss diverges", "no success", "updates too large"},
        "weak guidance": {"guidance without effect"},
        "old teacher": {"teacher is old"},
    }
    assert set(warned(OWN[run], train.parse(FLAGS[run].split()))) == expected.get(run, set())


def test_what_is_said_names_figures_and_flags():
    said = {}
    for run, records in OWN.items():
        c = train.parse(FLAGS[run].split())
        for n in range(1, len(records) + 1):
            said |= {a.name: a for a in advise(records[:n], c)}
    records = STUDY["harsh", "none", "0"]
    said |= {a.name: a for a in advise(records, method("none"))}
    checks = (
        "collapse",
        "certainty",
        "failure",
        "large_steps",
        "divergence",
        "old_teacher",
        "idle",
    )
    assert len(said) == len(checks)
    for a in said.values():
        assert any(letter.isdigit() for letter in a.meaning) or "no episode" in a.meaning
        assert "--" in a.remedy or "turbo.sft" in a.remedy
        flags = [
            word.strip("(),:;") for word in a.remedy.split() if word.strip("(").startswith("--")
        ]
        known = {"--" + name.replace("_", "-") for name in TrainConfig.__dataclass_fields__}
        assert set(flags) <= known, flags
    assert "from 47.0% to 24.8%" in said["collapse suspected"].meaning
    assert "(it is 50)" in said["teacher is old"].remedy


@pytest.mark.parametrize("play", ["auto", "merged"])
def test_sampling_and_training_that_disagree(play):
    c = TrainConfig(play=play)

    def told(*apart):
        records = [{"update": i, "sampling_kl": kl} for i, kl in enumerate(apart)]
        return [a for a in advise(records, c) if a.name == "sampling and training disagree"]

    assert not told(0.0007, 0.0007, 0.0007) and not told(0.03, 0.03)  # two updates tell nothing
    assert not advise([{"update": i} for i in range(5)], c)  # of runs made before it was measured
    (advice,) = told(0.001, 0.03, 0.03, 0.036)
    assert "0.032 nats" in advice.meaning and "--rescore" in advice.remedy
    assert ("--play unmerged" in advice.remedy) == (play == "merged")
    c.rescore = True  # the ratios begin at 1
    assert not told(0.001, 0.03, 0.03, 0.036)


def test_thoughts_that_turn_into_a_template():
    """As in the paper's collapse: ever more of the thoughts are the same sentence."""
    c, own = (
        TrainConfig(),
        [f"the cards are {i} {i * 7 % 11} {i % 5}: make {i % 24}" for i in range(300)],
    )
    records = []
    for update in range(10):
        alike = min(290, 40 * update)
        texts = ["I will think about it and play a card"] * alike + own[alike:]
        record = {"update": update, "distinct_thoughts": distinct(texts)}
        records.append(record | {"self_bleu": self_bleu(texts), "success_rate": 0.5})
    told = warned(records, c)
    assert list(told) == ["thoughts repeat one template"] and 6 <= told.popitem()[1] <= 9
    flat = [r | {"self_bleu": 0.5} for r in records]  # fewer thoughts, and no more alike
    assert warned(flat, c) == {}


def test_a_solved_game_may_be_certain():
    records = [
        dict(thought_entropy=0.1 / 2**n, success_solvable=0.95, success_rate=0.7) for n in range(9)
    ]
    assert warned([{"update": n} | r for n, r in enumerate(records)], TrainConfig()) == {}
    unsolved = [{"update": n} | r | {"success_solvable": 0.4} for n, r in enumerate(records)]
    assert list(warned(unsolved, TrainConfig())) == ["entropy near zero"]


def test_a_critic_may_follow_growing_returns():
    """From hardly any success to much, the returns' spread grows, and the loss with it."""
    loss = [{"value_loss": 0.1 * 1.6**n, "episode_return": -1 + n} for n in range(10)]
    assert advise(loss, TrainConfig(advantage="gae")) == []
    falling = [r | {"episode_return": -1 - n} for n, r in enumerate(loss)]
    assert [a.name for a in advise(falling, TrainConfig(advantage="gae"))] == [
        "value loss diverges"
    ]
    assert advise(falling, TrainConfig()) == []


def test_a_teacher_of_a_few_checkpoints_is_young_enough():
    for age, count in ((OLD, 0), (OLD + 1, 1)):
        assert len(advise([{"teacher_age": age}], TrainConfig())) == count
    assert advise([{}], TrainConfig()) == [] == advise([], TrainConfig())


def test_levels_leave_out_what_is_missing():
    records = [{"a": v} for v in (1.0, 2.0, None, 3.0, float("nan"), 4.0, 5.0, 6.0)]
    assert levels(records, "a") == [2.0, 3.0, 4.0, 5.0]
    assert levels(records[:6], "a") == []  # one of the latest is missing
    assert levels(records, "b") == [] == levels([], "a")


def test_a_warning_is_told_once_until_it_clears():
    c, watch = TrainConfig(), Watch(TrainConfig())
    ages = [9, 9, 0, 9, 0, 0, 0, 9]
    begun, ended = [], []
    for n, age in enumerate(ages):
        new, gone = watch.note({"update": n, "teacher_age": age})
        begun += [n] * len(new)
        ended += [n] * len(gone)
    assert begun == [0, 7] and ended == [6]
    assert list(watch.active) == ["teacher is old"]
    assert advice.advise([], c) == []


@pytest.mark.parametrize(
    "run", [("harsh", "none", "3"), ("harsh", "trust", "2"), ("calm", "kl", "0")]
)
def test_a_resumed_run_knows_what_was_on(run):
    records, c = STUDY[run], method(run[1])
    whole = Watch(c)
    for n, record in enumerate(records, 1):
        told = [[a.name for a in part] for part in whole.note(record)]
        assert Watch(c, records[:n]).active == whole.active
        resumed = Watch(c, records[: n - 1])
        assert [[a.name for a in part] for part in resumed.note(record)] == told
