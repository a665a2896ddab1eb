"""turbo/export.py: what it refuses, and what is left when it is interrupted."""

import json
import os
import shutil
import signal
import time

import pytest
import tiny_models
from safetensors.torch import load_file

from turbo import checkpoint, export
from turbo.hub import model_sha256
from turbo.lora import new_lora
from turbo.parallel import Crew
from turbo.run import Run


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of a random model whose factors are noise: one with a teacher, one without."""
    out = {}
    for guidance, updates in (("kl", (1, 2)), ("none", (1,))):
        path = tmp_path_factory.mktemp("refusals") / guidance
        config = tiny_models.new_config(model=str(tiny_models.random_folder()), guidance=guidance)
        checkpoint.create_run(path, config, model_sha256(config))
        run = Run(config, path, Crew())
        for run.update in updates:
            noise = tiny_models.noisy_lora(run.vlm, run.update)
            run.lora.load_state_dict(noise.state_dict())
            if guidance == "kl":
                run.teacher.push(run.update, run.lora)
            run.save()
        out[guidance] = path
    return out


@pytest.fixture(scope="module")
def adapter(runs, tmp_path_factory):
    """An export that is there already."""
    path = tmp_path_factory.mktemp("exports") / "adapter"
    assert export.main([str(runs["none"]), "--what", "adapter", "--out", str(path)]) == 0
    return path


def refused(capsys, *argv, status: int = 2) -> str:
    """The one line of an error."""
    capsys.readouterr()
    assert export.main([str(a) for a in argv]) == status
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line and "Loading weights" not in line]
    assert out == "" and len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--checkpoint 7", "has no checkpoint of update 7; those kept: 1, 2"),
        ("--push nobody", "--push must be owner/name, got 'nobody'"),
        ("--push a/b/c", "--push must be owner/name"),
        ("--private", "--private is for --push"),
    ],
)
def test_bad_options_are_refused(runs, tmp_path, capsys, options, message):
    assert message in refused(capsys, runs["kl"], "--out", tmp_path / "x", *options.split())
    assert list(tmp_path.iterdir()) == []


def test_bad_runs_are_refused(runs, tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    assert "is no folder" in refused(capsys, tmp_path / "absent", *out)
    assert "is not a run directory" in refused(capsys, tmp_path, *out)
    model = refused(capsys, tiny_models.random_folder(), *out)
    assert "was not written by turbo.train" in model

    def changed(name, **settings):
        run = shutil.copytree(runs["kl"], tmp_path / name)
        record = json.loads((run / checkpoint.CONFIG).read_text())
        record["config"] |= {k: v for k, v in settings.items() if k in record["config"]}
        record |= {k: v for k, v in settings.items() if k not in record["config"]}
        (run / checkpoint.CONFIG).write_text(json.dumps(record))
        return run

    teacher = [*out, "--what", "teacher"]
    message = refused(capsys, runs["none"], *teacher)
    assert "--guidance none" in message and "export its policy" in message
    gtr = changed("gtr", guidance="gtr")
    assert "--guidance gtr" in refused(capsys, gtr, *teacher)
    initial = changed("initial", teacher="initial")
    assert "is the warm start, " in refused(capsys, initial, *teacher)
    other = changed("other", model_sha256="0" * 64)
    assert "was trained from another model" in refused(capsys, other, *out)
    ranked = changed("ranked", lora_rank=8)
    assert "another rank or model" in refused(capsys, ranked, *out)
    damaged = changed("damaged")
    (damaged / checkpoint.CHECKPOINTS / "00000002" / checkpoint.STATE).write_bytes(b"no")
    assert "its size differs" in refused(capsys, damaged, *out, "--checkpoint", 2)
    assert export.main([str(damaged), "--out", str(tmp_path / "older")]) == 0
    assert "warning: " in capsys.readouterr().err
    assert json.loads((tmp_path / "older" / export.RECORD).read_text())["update"] == 1
    garbled = changed("garbled", versions=["odd"])
    (garbled / checkpoint.METRICS).write_text("no record\n")
    assert "metrics.jsonl, line 1" in refused(capsys, garbled, *out)
    (garbled / checkpoint.METRICS).write_text('{"update": 2, "eval_success_rate": "all"}\n')
    assert export.main([str(garbled), "--out", str(tmp_path / "odd")]) == 0
    assert "has no figures yet" in (tmp_path / "odd" / "README.md").read_text()
    assert not (tmp_path / "out").exists()


def test_a_teacher_before_its_first_merge(tmp_path, capsys):
    config = tiny_models.new_config(model=str(tiny_models.random_folder()))
    path = tmp_path / "run"
    checkpoint.create_run(path, config, model_sha256(config))
    Run(config, path, Crew()).save()
    message = refused(capsys, path, "--what", "teacher", "--out", tmp_path / "out")
    assert "choose a later --checkpoint" in message


def test_what_is_there_is_left_alone(runs, adapter, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("also mine")
    for name in ("mine", "file"):
        argv = [runs["kl"], "--out", tmp_path / name]
        assert "is there already" in refused(capsys, *argv)
        assert "is no export" in refused(capsys, *argv, "--overwrite")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    old = shutil.copytree(adapter, tmp_path / "old")
    assert export.main([str(runs["none"]), "--out", str(old), "--overwrite"]) == 0
    assert (old / "model.safetensors").is_file() and not (old / "adapter_config.json").exists()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine", "old"]


def test_what_cannot_work_is_bad_input_before_the_model_is_loaded(runs, tmp_path, capsys):
    """The status is 2, as that of eval and view."""
    (tmp_path / "file").write_text("")
    told = refused(capsys, runs["kl"], "--out", tmp_path / "file" / "x" / "out")
    assert "out cannot be made: Not a directory; choose another" in told
    run = shutil.copytree(runs["kl"], tmp_path / "run")
    record = json.loads((run / checkpoint.CONFIG).read_text())
    record["config"]["env"] = "gone_with_the_wind:Game"
    (run / checkpoint.CONFIG).write_text(json.dumps(record))
    told = refused(capsys, run, "--out", tmp_path / "out")
    assert "cannot be imported: there is no module 'gone_with_the_wind'" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "run"]


@pytest.fixture
def ctrl_c():
    """Python's own answer to Ctrl-C, whatever ran in this process before."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["full disk", "Ctrl-C", "SIGTERM"])
def test_an_interruption_leaves_nothing_half_made(
    runs, adapter, tmp_path, capsys, monkeypatch, ctrl_c, how
):
    """It comes late, when the weights are there; an older export stays what it was."""

    def interrupt(facts):
        if how == "full disk":
            raise OSError(28, "No space left on device")
        os.kill(os.getpid(), signal.SIGTERM if how == "SIGTERM" else signal.SIGINT)
        time.sleep(5)

    monkeypatch.setattr(export, "card", interrupt)
    old = shutil.copytree(adapter, tmp_path / "old")
    before = {p.name: p.read_bytes() for p in old.iterdir()}
    for argv in ([tmp_path / "new"], [old, "--overwrite"]):
        argv = [str(a) for a in (runs["none"], "--out", *argv)]
        if how == "SIGTERM":
            with pytest.raises(SystemExit) as stopped:
                export.main(argv)
            assert stopped.value.code == 128 + signal.SIGTERM
        else:
            assert export.main(argv) == (1 if how == "full disk" else 130)
            said = [x for x in capsys.readouterr().err.splitlines() if x and "Loading" not in x]
            assert len(said) == 1
            if how == "full disk":
                out = f"--out {argv[2]} cannot be written: "
                assert said == [f"error: {out}[Errno 28] No space left on device"]
        assert [p.name for p in tmp_path.iterdir()] == ["old"]
    assert {p.name: p.read_bytes() for p in old.iterdir()} == before


def test_the_base_of_a_run_is_not_replaced(runs, tmp_path, capsys):
    """Also where it is an export itself."""
    model = tmp_path / "model"
    assert export.main([str(runs["none"]), "--out", str(model)]) == 0
    config = tiny_models.new_config(model=str(model), guidance="none")
    checkpoint.create_run(tmp_path / "run", config, model_sha256(config))
    argv = [tmp_path / "run", "--out", model, "--overwrite"]
    assert "would replace" in refused(capsys, *argv)
    assert (model / "model.safetensors").is_file()


def test_peft_is_asked_for(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    argv = [runs["none"], "--what", "adapter", "--out", tmp_path / "out"]
    assert "pip install peft" in refused(capsys, *argv, status=1)


def test_other_names_of_the_base(runs, tmp_path):
    argv = [str(runs["none"]), "--what", "adapter", "--base", "someone/their-model"]
    assert export.main([*argv, "--out", str(tmp_path / "x")]) == 0
    card = (tmp_path / "x" / "README.md").read_text()
    assert "\nbase_model: someone/their-model\nbase_model_relation: adapter\n" in card
    known = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert known["base_model_name_or_path"] == "someone/their-model"
    assert load_file(tmp_path / "x" / "adapter_model.safetensors").keys() == {
        f"base_model.model.{name}.lora_{side}.weight"
        for name in new_lora(tiny_models.random_model().matrices, 1, 1.0, 0).factors
        for side in "AB"
    }
