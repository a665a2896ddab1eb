"""turbo/scribe.py: warnings of a real run, printed once, kept in warnings.jsonl, and resumed."""

import json
import shutil

import tiny_models

from turbo import train

FLAGS = """
    --workers 1 --dtype float32 --envs 8 --group-size 4 --steps-per-update 16 --max-new-tokens 40
    --minibatch 16 --lora-rank 4 --save-every 1 --keep 9 --eval-episodes 0 --teacher-sample 0
    --temperature 0.8 --learning-rate 0.005 --kl-coef 1e-7 --updates 5
"""


def test_a_warning_is_printed_once_recorded_and_known_after_a_resume(tmp_path, capsys):
    run, model = tmp_path / "run", str(tiny_models.fitted_folder())
    argv = ["numberline", "--model", model, "--out", str(run), *FLAGS.split()]
    assert train.main(argv) == 0
    out = capsys.readouterr().out
    assert out.count("warning: guidance without effect: the policy moves") == 1
    assert "try this: raise --kl-coef (it is 1e-7)" in out
    events = [json.loads(line) for line in (run / "warnings.jsonl").read_text().splitlines()]
    (idle,) = [e for e in events if e["name"] == "guidance without effect"]
    assert idle["update"] == 3 and idle["on"] and idle["meaning"] in out and idle["remedy"] in out
    for update, printed in ((2, 1), (4, 1)):  # before it began; and it is still on
        copied = shutil.copytree(run, tmp_path / str(update))
        for folder in (copied / "checkpoints").iterdir():
            if int(folder.name) > update:
                shutil.rmtree(folder)
        assert train.main(["--resume", str(copied)]) == 0
        assert capsys.readouterr().out.count("guidance without effect") == printed
        resumed = (copied / "warnings.jsonl").read_text()
        assert resumed == (run / "warnings.jsonl").read_text()


def test_a_model_that_cannot_answer_is_told_of_before_it_is_trained(tmp_path, capsys):
    run, model = tmp_path / "run", str(tiny_models.fitted_folder())
    argv = ["numberline", "--model", model, "--out", str(run), *FLAGS.split(), "--updates", "1"]
    assert train.main([*argv, "--eval-episodes", "8", "--max-new-tokens", "3"]) == 0
    said = "".join(capsys.readouterr())
    assert said.count("only 0% of the answers are legal before training") == 1
    assert "turbo.sft numberline --model" in said and "--max-new-tokens 3 is too short" in said
