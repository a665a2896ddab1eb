"""turbo/log.py: one name for each metric, lines that any JSON reader takes; a sink may fail."""

import json
import math

import pytest
import torch

from turbo.log import METRICS, JsonlLogger, read_jsonl


def test_every_metric_has_a_meaning_and_a_unit():
    for name, metric in METRICS.items():
        assert name.isidentifier() and name.islower()
        assert len(metric.meaning) > 10
        assert metric.unit
    assert len({metric.meaning for metric in METRICS.values()}) == len(METRICS)


def test_records_are_flushed_line_by_line(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = JsonlLogger(path)
    log.write({"update": 1, "success_rate": 0.5})
    assert read_jsonl(path) == [{"update": 1, "success_rate": 0.5}]  # before it is closed
    log.close()


def test_an_existing_file_is_continued(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for update in (1, 2):
        with JsonlLogger(path) as log:
            log.write({"update": update})
    assert read_jsonl(path) == [{"update": 1}, {"update": 2}]


@pytest.mark.parametrize("before", ["", '{"update": 1}\n'])
def test_a_line_cut_by_a_crash_is_removed(tmp_path, before):
    path = tmp_path / "metrics.jsonl"
    path.write_text(before + '{"update": 2, "succ')
    assert read_jsonl(path) == [json.loads(line) for line in before.splitlines()]
    with JsonlLogger(path) as log:
        log.write({"update": 2})
    assert path.read_text() == before + '{"update": 2}\n'


def test_what_is_not_finite_becomes_null(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlLogger(path) as log:
        log.write({"update": 1, "grad_norm": math.nan, "value_loss": -math.inf, "elapsed": None})
    record = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert record == {"update": 1, "grad_norm": None, "value_loss": None, "elapsed": None}


def test_tensors_of_one_element_are_numbers(tmp_path):
    with JsonlLogger(tmp_path / "m.jsonl") as log:
        log.write({"policy_loss": torch.tensor(0.25, requires_grad=True), "episodes": 3})
        with pytest.raises(TypeError, match="'value_loss' is a Tensor"):
            log.write({"value_loss": torch.ones(2)})
        with pytest.raises(TypeError, match="'value_loss' is a str"):
            log.write({"value_loss": "low"})
    assert (tmp_path / "m.jsonl").read_text() == '{"policy_loss": 0.25, "episodes": 3}\n'


def test_an_unknown_name_is_refused_and_nothing_is_written(tmp_path):
    path = tmp_path / "m.jsonl"
    with JsonlLogger(path) as log:
        with pytest.raises(ValueError, match=r"'sucess_rate'.*'success_rate'.*METRICS"):
            log.write({"update": 1, "sucess_rate": 0.5})
        with pytest.raises(ValueError, match="define it in METRICS"):
            log.write({"zzz": 0.5})
    assert path.read_text() == ""


class RecordingSink:
    """Keeps what it is given, but for what it fails on."""

    name = "recorder"

    def __init__(self):
        self.written, self.closed, self.fails = [], False, ()

    def write(self, update, record):
        if update in self.fails:
            raise ConnectionError(f"not update {update}")
        self.written.append((update, dict(record)))

    def close(self):
        self.closed = True


def test_sinks_receive_the_finite_numbers(tmp_path):
    sink = RecordingSink()
    with JsonlLogger(tmp_path / "m.jsonl", [sink]) as log:
        log.write({"update": 4, "success_rate": 1.0, "grad_norm": math.nan})
    assert sink.written == [(4, {"update": 4, "success_rate": 1.0})]
    assert sink.closed


def test_a_sink_that_fails_is_told_of_once_and_stops_nothing(tmp_path):
    sink, told = RecordingSink(), []
    sink.fails = (2, 3, 5)
    with JsonlLogger(tmp_path / "m.jsonl", [sink], told.append) as log:
        for update in range(1, 7):
            assert log.write({"update": update}) == {"update": update}
    assert [u for u, _ in sink.written] == [1, 4, 6] and sink.closed
    assert [r["update"] for r in read_jsonl(tmp_path / "m.jsonl")] == [1, 2, 3, 4, 5, 6]
    assert len(told) == 2  # with the second update, and anew with the fifth
    assert all("recorder misses records" in t and "m.jsonl has" in t for t in told)
    assert "not update 2" in told[0] and "not update 5" in told[1]
