"""Commands side by side: how many at a time, on which cores, what is said of failures, and how they are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from blip_pipelines.commands.side_by_side import Task, cores_of, perform, places

SPAN = """
import json, os, sys, time
start = time.time()
time.sleep(0.6)
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
json.dump([start, time.time(), cores], open(sys.argv[1], "w"))
print("written")
"""


def python(folder: Path, code: str, *arguments: str) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    return Task(folder.name, [sys.executable, "-c", code, *arguments], folder)


def test_each_has_cores_of_its_own_and_at_most_so_many_run(tmp_path, capfd):
    tasks = [python(tmp_path / str(n), SPAN, str(tmp_path / f"{n}.json")) for n in range(4)]
    assert perform(tasks, 2) == []
    spans = [json.loads((tmp_path / f"{n}.json").read_text()) for n in range(4)]
    for moment, _, _ in spans:
        assert sum(start <= moment < end for start, end, _ in spans) <= 2
    first, second = spans[:2]
    assert first[0] < second[1] and second[0] < first[1], "the first two run at the same time"
    if len(os.sched_getaffinity(0)) > 1:
        assert not {*first[2]} & {*second[2]}
    assert (tmp_path / "0" / "log.txt").read_text() == "written\n"
    shown = capfd.readouterr().out
    assert "written" not in shown and "4 of 4" in shown


def test_one_alone_has_all_cores_and_is_seen_as_it_goes(tmp_path, capfd):
    assert perform([python(tmp_path / "a", SPAN, str(tmp_path / "a.json"))], 1) == []
    assert json.loads((tmp_path / "a.json").read_text())[2] == sorted(os.sched_getaffinity(0))
    assert "written" in capfd.readouterr().out
    assert not (tmp_path / "a" / "log.txt").exists()


def test_one_that_fails_is_shown_and_the_others_are_done(tmp_path, capfd):
    tasks = [python(tmp_path / "bad", "raise SystemExit('no such stage')"), python(tmp_path / "good", "print(1)")]
    assert perform([*tasks, python(tmp_path / "late", "print(2)")], 2) == [tasks[0]]
    shown = capfd.readouterr()
    assert "no such stage" in shown.err
    assert "bad: failed" in shown.out
    assert (tmp_path / "late" / "log.txt").read_text() == "2\n"


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_stops_it_stops_what_runs(tmp_path, parallel, number):
    mark = tmp_path / "saved"
    code = (
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path({str(mark)!r}).touch(), sys.exit(1)))\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).touch(); time.sleep(60)"
    )
    launcher = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\nfrom blip_pipelines.commands.side_by_side import Task, perform\n"
        f"perform([Task('long', [sys.executable, '-c', {code!r}], Path({str(tmp_path)!r}))], {parallel})"
    )
    with subprocess.Popen([sys.executable, "-c", launcher], stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(20) != 0
    assert mark.exists()


def test_places_are_as_many_as_cores_and_memory_allow(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert places(1) == len(os.sched_getaffinity(0))
    assert places(1 << 60) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert places(1) == 1


def test_cores_are_shared_out_evenly_and_shared_where_they_are_few(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3, 4})
    assert cores_of(2) == [{0, 1}, {2, 3}]
    assert cores_of(1) == [{0, 1, 2, 3, 4}]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3})
    assert cores_of(2) == [{3}, {3}]
