"""bench.flops: the formula against PyTorch's own count, and what a run of turbo is charged with."""

import pytest
import tiny_models
import torch
from family_models import folder
from torch.utils.flop_counter import FlopCounterMode

from bench.flops import Sizes, Tally, causal_pairs, text_flops, vision_flops
from turbo.model import Engine, load
from turbo.parallel import Crew
from turbo.presets import defaults
from turbo.run import Run
from turbo.train import train_update


def counted(call) -> tuple[int, int]:
    """Operations of a call: in products of a matrix and weights, and in batched products."""
    with FlopCounterMode(display=False) as mode:
        call()
    operations = {str(k): v for k, v in mode.get_flop_counts()["Global"].items()}
    batched = operations.pop("aten.bmm", 0)
    return sum(operations.values()), batched


@pytest.fixture(scope="module")
def module():
    module = tiny_models.load(tiny_models.random_folder(), torch.float32).module
    module.set_attn_implementation("eager")  # its attention is two batched products
    return module


def test_the_formula_is_what_pytorch_counts(module):
    sizes, length = Sizes.of(module), 24
    ids = torch.arange(100, 100 + length)[None]
    with torch.no_grad():
        weights, attention = counted(lambda: module(input_ids=ids, use_cache=False))
    assert weights == text_flops(sizes, length, 0, length)
    # The eager attention multiplies what the mask forbids too.
    assert attention == text_flops(sizes, 0, length**2, 0)
    assert causal_pairs(0, length) == length * (length + 1) // 2


def test_a_model_in_nf4_is_asked_for_the_same_arithmetic(module):
    engines = [Engine("modules", "cpu", quantize) for quantize in ("none", "nf4")]
    models = [load(folder("qwen2_5_vl"), torch.bfloat16, engine) for engine in engines]
    plain, coded = (Sizes.of(vlm.module) for vlm in models)
    assert coded == plain == Sizes.of(module) and plain.text > 0


def test_training_takes_three_times_the_layers_and_twice_the_head(module):
    s = Sizes.of(module)
    assert text_flops(s, 10, 55, 0, trained=True) == 3 * text_flops(s, 10, 55, 0)
    assert text_flops(s, 0, 0, 10, trained=True) == 2 * text_flops(s, 0, 0, 10)


def test_the_vision_tower(module):
    patches, grid = (
        tiny_models.random_model().pixels([tiny_models.new_env().reset(seed=0)[0]]).values()
    )
    with torch.no_grad():
        weights, _ = counted(lambda: module.model.visual(patches, grid_thw=grid))
    assert weights == vision_flops(Sizes.of(module), len(patches))


def test_a_row_behind_a_prefix_attends_to_it():
    assert causal_pairs(4, 3) == 5 + 6 + 7
    assert causal_pairs(0, 7) == causal_pairs(0, 4) + causal_pairs(4, 3)


@pytest.fixture
def run(tmp_path):
    c = tiny_models.new_config(model="tiny", teacher_sample=0, minibatch=4096)
    return Run(c, tmp_path, Crew())


def test_a_run_is_charged_for_what_it_plays_reads_and_learns(run):
    tally, charged, rows = Tally(run), [], []
    gradients = run.learner.gradients

    def listen(rollout, data, chosen, total, teacher, *others):
        rows.append((rollout, chosen, teacher))
        return gradients(rollout, data, chosen, total, teacher, *others)

    run.learner.gradients = listen
    for _ in range(2):
        train_update(run)
        charged.append(tally.take())
    assert tally.take() == 0

    def charge(rollout, chosen, head=True, trained=False):
        prefix = 4 + 8 + len(run.vlm.encode(rollout.fixed))  # <|im_start|> user \n, picture
        steps = [rollout.steps[i] for i in chosen]
        pictures = len({s.picture for s in steps})
        flops = 0
        for n in [prefix] * pictures:
            flops += text_flops(tally.sizes, n, sum(range(1, n + 1)), 0, trained)
        for s in steps:
            n, answer = len(s.suffix) + len(s.tokens) - 1, len(s.tokens)
            pairs = sum(prefix + i for i in range(1, n + 1))
            flops += text_flops(tally.sizes, n, pairs, answer if head else 0, trained)
        return flops

    for update, flops in enumerate(charged):
        (rollout, chosen, teacher) = rows[update]  # one minibatch each
        assert (teacher is None) == (update == 0)
        wanted = charge(rollout, range(len(rollout.steps)))
        wanted += vision_flops(tally.sizes, len(rollout.features) * int(rollout.grid.prod()))
        wanted += charge(rollout, chosen, trained=True)
        if teacher is not None:
            wanted += charge(rollout, teacher.hidden)
        assert flops == pytest.approx(wanted, rel=1e-9)


def test_imitated_thoughts_are_charged_and_an_external_teachers_are_not(tmp_path):
    small = dict(steps_per_update=16, envs=8, dtype="float32", workers=1, lora_rank=2)
    written = {}
    for guidance in ("sft", "gtr"):
        c = defaults("numberline", "tiny")
        vars(c).update(small, guidance=guidance, teacher_url="http://none", teacher_model="none")
        run = Run(c, tmp_path, Crew())
        tally = Tally(run)
        with torch.no_grad():
            rollout = run.table.collect(run.vlm.weights(), (0,), 16)
        tally.take()
        run.examples.add(rollout, rollout.episodes, run.crew)
        assert len(run.examples)
        written[guidance] = tally.take()
    assert written["sft"] > 0 and written["gtr"] == 0
