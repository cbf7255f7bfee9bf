"""What the meter counts, and where its line goes."""

import io
import time

import pytest
import torch

from blip_pipelines.training.meter import Meter, measure_peak_flops
from blip_pipelines.training.progress import MARK, RELAY, Progress


def measured(steps: int, wait: float, work: float, pause: float = 0.0) -> Meter:
    meter = Meter(samples_per_step=10, ranks=2, flops_per_sample=1e6, peak_flops=1e9)

    def batches():
        for _ in range(steps):
            time.sleep(wait)
            yield None

    for _ in meter.timed(batches()):
        time.sleep(work)
        meter.step()
        with meter.paused():
            time.sleep(pause)
    return meter


def test_speed_leaves_pauses_out_and_counts_waiting() -> None:
    """Sleeps are never shorter than asked, so the bounds hold on any machine."""
    numbers = measured(steps=7, wait=0.01, work=0.01, pause=0.03).numbers()
    assert numbers["samples_per_second"] <= 10 / 0.02
    assert numbers["samples_per_second"] > 10 / (0.02 + 0.03)  # the pauses alone would make it slower than this
    assert 0.2 < numbers["data_wait_share"] < 0.8
    assert numbers["mfu"] == pytest.approx(1e6 * numbers["samples_per_second"] / 2 / 1e9)
    assert numbers["peak_memory_bytes"] > 2**20


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_speed_of_the_first_steps_is_one_of_steps(steps: int) -> None:
    """Also of exactly those that are left out later on."""
    assert measured(steps, wait=0.01, work=0.01).numbers()["samples_per_second"] <= 10 / 0.02


def test_unknown_flops_leave_mfu_out() -> None:
    meter = Meter(10, 1, None, 1e9)
    meter.step()
    assert "mfu" not in meter.numbers()
    assert "MFU" not in meter.line(1, 2, {"loss": 1.0})


def test_line_says_where_it_is_and_how_long_it_takes() -> None:
    line = measured(steps=3, wait=0.0, work=0.01).line(3, 6, {"loss": 1.25, "itc": 0.5})
    assert line.startswith("step 3/6  loss 1.250  itc 0.500  ")
    assert line.endswith("left")


def test_peak_is_a_plausible_rate() -> None:
    assert measure_peak_flops(torch.device("cpu"), torch.float32, seconds=0.01) > 1e8


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_terminal_is_redrawn_in_place_and_the_last_line_stays() -> None:
    screen = Terminal()
    progress = Progress(stream=screen)
    progress.show("one")
    progress.show("too soon")
    progress.clear()
    progress.show("two", last=True)
    assert screen.getvalue() == "\r\x1b[Kone\r\x1b[K\r\x1b[Ktwo\n"


def test_log_gets_a_line_now_and_then_and_always_the_last(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(every_seconds=1000, stream=io.StringIO())
    with caplog.at_level("INFO"):
        for line in ("one", "two", "three"):
            progress.show(line)
        progress.show("four", last=True)
    assert caplog.messages == ["one", "four"]


def test_worker_relays_its_line_to_the_launcher_which_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(RELAY, "0")
    Progress().show("step 1")
    relayed = capsys.readouterr().out
    assert relayed.startswith(MARK)
    monkeypatch.delenv(RELAY)
    screen = Terminal()
    launcher = Progress(stream=screen)
    assert launcher.relay(relayed.rstrip("\n"))
    assert screen.getvalue() == "\r\x1b[Kstep 1"
    assert not launcher.relay("an ordinary line")
