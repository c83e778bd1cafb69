"""The progress of long work: not too many lines, never none, and advice when the machine becomes busy."""

import io
import sys

import pytest

from refqlora.commands import progress as module
from refqlora.commands.progress import BUSY, Meter, duration, progress


def row(step, seconds=1.0, tokens=100, loss=2.0):
    return {"step": step, "loss": loss, "tokens": tokens, "seconds": seconds}


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(module.time, "monotonic", clock)
    return clock


def said(clock, rows, total, seconds=1.0, stream=None, **options):
    """The lines on stderr, where the steps take so many seconds each."""
    stream = stream or io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", stream)
        with progress("fine-tuning", total, **options) as update:
            for one in rows:
                clock.now += seconds
                update(one)
    return stream.getvalue().splitlines()


def test_quick_steps_have_a_line_each_twentieth(clock):
    lines = said(clock, map(row, range(1, 201)), 200, seconds=0.01)
    assert [int(line.split()[1].split("/")[0]) for line in lines] == [1, *range(11, 200, 10), 200]
    assert lines[1] == "fine-tuning 11/200  loss 2.000  100 tokens/s  2 s left"


def test_slow_steps_have_a_line_each_half_minute(clock):
    lines = said(clock, map(row, range(1, 1001)), 10_000, seconds=7)
    assert len(lines) == 1 + 999 // 5  # 35 seconds apart
    assert lines[0] == "fine-tuning 1/10,000  loss 2.000  100 tokens/s  19 h 27 min left"


def test_a_resumed_run_does_not_count_what_was_done_before(clock):
    lines = said(clock, map(row, range(101, 111)), 200, seconds=2)
    assert lines[0].endswith("  3 min left")  # 99 steps of 2 seconds


def test_numbers_have_a_line_each_half_minute(clock):
    assert said(clock, range(1, 11), 10, seconds=1) == []
    assert said(clock, range(1, 11), 10, seconds=12) == [
        "fine-tuning 3/10  84 s left",
        "fine-tuning 6/10  48 s left",
        "fine-tuning 9/10  12 s left",
    ]


def test_nothing_where_it_is_unwanted(clock):
    assert said(clock, map(row, range(1, 20)), 20, quiet=True) == []


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar(clock, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    text = "\n".join(said(clock, map(row, range(1, 6)), 5, stream=Terminal()))
    assert "fine-tuning" in text
    assert "5/5" in text
    assert "loss 2.000" in text
    assert "\x1b[2K" in text  # it goes when it is done


def test_work_goes_on_when_nobody_reads(clock):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    assert said(clock, map(row, range(1, 6)), 5, stream=Broken()) == []


def advice(costs):
    meter = Meter(1000)
    found = []
    for step, (seconds, tokens) in enumerate(costs, start=1):
        meter.read(row(step, seconds, tokens))
        found.append(meter.advice())
    return [(step, words) for step, words in enumerate(found, start=1) if words]


def test_a_busy_machine_is_reported_once():
    assert advice([(1.0, 100)] * 20 + [(9.0, 100)] * 20) == [(23, BUSY.format(9))]
    assert "OPENBLAS_NUM_THREADS=1" in BUSY


@pytest.mark.parametrize(
    "costs",
    [
        [(1.0, 100)] * 40,
        [(9.0, 100)] + [(1.0, 100)] * 40,  # the first step takes longer
        [(1.0, 100)] * 20 + [(9.0, 100)] * 2 + [(1.0, 100)] * 20,  # a moment
        [(1.0, 100)] * 20 + [(9.0, 900)] * 20,  # longer texts
        [(1.0, 100)] * 20 + [(1.0, 10)] * 20,  # fewer tokens that count
        [(1.0, 100)] * 20 + [(3.9, 100)] * 20,
        [(0.0, 0)] * 40,
    ],
)
def test_a_machine_that_is_not_busy(costs):
    assert advice(costs) == []


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (90000, "25 h 0 min")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text
