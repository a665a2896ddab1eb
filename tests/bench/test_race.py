"""bench/race.py and bench/report.py: memory counted, failures left out, tables from rows."""

import csv

import pytest
import torch

from bench import ema, harness, head_rivals, nf4, policy_head, race, report, ties


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A results folder of the test's own."""
    path = tmp_path / "cpu.csv"
    monkeypatch.setattr(race, "results_file", lambda name="": path)
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    return path


def test_peak_memory_is_what_exists_at_once():
    def call():
        a = torch.ones(1 << 18)  # 1 MiB
        b = a + 1
        del a
        return b * 2

    assert race.peak_bytes(call, "cpu") == pytest.approx(2 << 20, rel=0.02)
    assert race.peak_bytes(lambda: None, "cpu") < 1024


def test_a_variant_that_fails_is_named_and_left_out(results, capsys):
    def missing():
        raise ModuleNotFoundError("No module named 'rival'")

    calls = []
    variants = {"ours": lambda: calls.append("a"), "rival": missing, "b": lambda: calls.append("b")}
    timed = race.race("ties", "2x2", variants, repeats=2, floor=1e-9)
    assert list(timed) == ["ours", "b"] and timed["ours"].seconds.repeats == 2
    assert calls == ["a", "a", "b", "b"] + ["a", "b"] * 2  # warm-up and memory, then two turns
    out = capsys.readouterr().out
    assert "rival is left out: No module named 'rival'" in out
    rows = list(csv.DictReader(results.open(newline="")))
    assert [row["metric"] for row in rows] == ["seconds", "peak_bytes", "floor_share"] * 2
    assert set(rows[0]) == set(harness.COLUMNS)


def test_a_variant_that_fails_in_its_turn_is_left_out_too(results, capsys):
    turns = iter([1, 2, 3])

    def tires():
        if next(turns) == 3:
            raise torch.OutOfMemoryError("out of memory, at last")

    timed = race.race("ties", "2x2", {"ours": lambda: None, "rival": tires}, repeats=3)
    assert list(timed) == ["ours"] and timed["ours"].seconds.repeats == 3
    assert "rival is left out: out of memory, at last" in capsys.readouterr().out


def test_who_disagrees_with_the_reference_is_named_and_ours_fails_it(capsys):
    truth = torch.arange(1000.0, dtype=torch.float64)

    def check(call):
        race.check_close(call(), truth, rtol=1e-6, atol=0, odd=1e-3)

    def off(count, by):
        return lambda: truth.index_fill(0, torch.arange(count), by)

    rivals = {"exact": truth.clone, "one off": off(1, 7.0), "two off": off(2, 7.0)}
    rivals |= {"NaN": off(2, torch.nan), "short": lambda: truth[:1], "cuda": lambda: 1 / 0}
    assert list(race.agreeing("ties 2x2", rivals, check)) == ["exact", "one off"]
    out = capsys.readouterr().out
    assert "ties 2x2: two off is left out: 2.0e-03 of the entries differ from the fp64" in out
    assert all(f"{name} is left out" in out for name in ("NaN", "short", "cuda"))
    assert race.status() == 0
    ours = {"ours, a": truth.clone, "ours, b": off(2, 7.0)}
    assert list(race.agreeing("ties", ours, check)) == ["ours, a"]
    assert race.status() == 1 and race.status() == 0
    assert "error: ties: ours, b: 2.0e-03 of the entries" in capsys.readouterr().err


def test_the_report_shows_the_latest_rows_and_fills_the_page(
    results, tmp_path, monkeypatch, capsys
):
    for _ in range(2):
        race.race("ema", "small", {"ours": lambda: None, "b": lambda: None}, repeats=1)
    race.race("train_step", "not a kernel", {"ours": lambda: None}, repeats=1)
    page = tmp_path / "README.md"
    page.write_text("text\n## Measured\nold\n")
    monkeypatch.setattr(report, "PAGE", page)
    monkeypatch.setattr(report, "ROOT", tmp_path)
    assert report.main(["--write"]) == 0
    text = page.read_text()
    assert text.startswith("text\n## Measured\n") and "old" not in text
    assert text.count("| ema | small | ours |") == 1 and "not a kernel" not in text
    page.write_text("no mark")
    assert report.main(["--write"]) == 2
    assert "has no line" in capsys.readouterr().err
    assert report.main([]) == 0 and "| ema |" in capsys.readouterr().out


BENCHMARKS = {
    "ties": (ties, "--size 96 --rank 4 --checkpoints 3"),
    "policy_head": (policy_head, "--rows 8 --widths 16 --vocabulary 500"),
    "ema": (ema, ""),
    "nf4": (nf4, "--size 96 64 4 --checkpoints 3"),
}


@pytest.fixture
def small(monkeypatch):
    """Benchmarks of small lists, whose floors are not measured and which compile nothing."""
    monkeypatch.setattr(ema, "LISTS", {"few": [(30, 4), (50,)]})
    monkeypatch.setattr(ema, "FACTORS", {"cpu": (40, 30, 4)})
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for module in (ties, policy_head, nf4, ema):
        for name in {"product_rate", "copy_rate"} & set(vars(module)):
            monkeypatch.setattr(module, name, lambda *where: 1e9)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_each_benchmark_runs_and_agrees_with_the_reference(name, results, small):
    bench, arguments = BENCHMARKS[name]
    if name == "nf4":
        pytest.importorskip("bitsandbytes")
    assert bench.main([*arguments.split(), "--repeats", "1"]) == 0
    rows = list(csv.DictReader(results.open(newline="")))
    assert {"seconds", "peak_bytes"} <= {row["metric"] for row in rows}
    assert any(row["variant"].startswith("ours") for row in rows)
    assert any(not row["variant"].startswith("ours") for row in rows)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("ties", "ties_merge_lora"),
        ("ties", "linear_merge_lora"),
        ("ema", "ema_update_"),
        ("ema", "ema_update_lora_"),
        ("nf4", "quantize_nf4"),
        ("nf4", "ties_merge_lora_nf4"),
        ("policy_head", "policy_head"),
    ],
)
def test_a_kernel_that_is_wrong_is_left_out(name, kernel, results, small, monkeypatch, capsys):
    bench, arguments = BENCHMARKS[name]
    module = head_rivals if name == "policy_head" else bench
    right = getattr(module, kernel)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        if name == "ema":
            first = arguments[0][0] if isinstance(arguments[0], list) else arguments[0]
            first.add_(0.1)
        elif name == "nf4":
            out.codes.bitwise_xor_(0x10)
        elif name == "ties":
            out.mul_(1.01)
        elif out.logprob is not None:
            out.logprob = out.logprob * 1.01
        return out

    monkeypatch.setattr(module, kernel, wrong)
    assert bench.main([*arguments.split(), "--repeats", "1"]) == 1
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert all("ours" in line and "differ from the fp64 reference" in line for line in told)
    wrong = {tuple(line.split(": ")[1:3]) for line in told}  # race, variant
    rows = list(csv.DictReader(results.open(newline="")))

    def race_of(row: dict) -> str:  # whichever way: forward, forward+backward
        task = row["benchmark"].removesuffix("+backward").removesuffix(" forward")
        return f"{task} {row['shape']}"

    raced = {(race_of(row), row["variant"]) for row in rows}
    assert wrong and not wrong & raced
    assert any(not variant.startswith("ours") for _, variant in raced)


def test_the_rivals_gradients_are_compared_too(results, small, monkeypatch, capsys):
    def detached(hidden, *others):
        value = head_rivals.eager_logprob(hidden, *others)[0]
        return (value.detach() + 0.5 * (value - value.detach()),)  # right, with half the gradient

    tasks = {"policy_head logprob": dict(head_rivals.TASKS["policy_head logprob"])}
    tasks["policy_head logprob"]["half"] = head_rivals.Variant(detached, head_rivals.logprob)
    monkeypatch.setattr(policy_head, "TASKS", tasks)
    assert policy_head.main([*BENCHMARKS["policy_head"][1].split(), "--repeats", "1"]) == 0
    out = capsys.readouterr().out
    assert "half is left out: the gradient is 5.0e-01 of its norm off" in out
    assert "liger fused linear cross-entropy is left out: it needs a CUDA device" in out
    assert "half" not in results.read_text()


def test_an_unknown_dtype_is_refused(capsys):
    assert policy_head.main(["--dtype", "int8"]) == 2
    assert "--dtype must be float32 or bfloat16, got 'int8'" in capsys.readouterr().err
