"""Commands side by side: how many at a time, on which cores, what is said of failures, and how they are stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from blip_pipelines.commands import side_by_side
from blip_pipelines.commands.side_by_side import Task, available_bytes, cores_of, perform, places

CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
SPAN = """
import json, os, pathlib, sys, time
mine, other = map(pathlib.Path, sys.argv[1:])
mine.with_suffix(".begun").touch()
while not other.with_suffix(".begun").exists():  # a rendezvous: it ends only if both run at the same time
    time.sleep(0.01)
start = time.time()
time.sleep(0.3)
cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
json.dump([start, time.time(), cores], open(mine, "w"))
print("written")
"""


def python(folder: Path, code: str, *arguments: str) -> Task:
    folder.mkdir(parents=True, exist_ok=True)
    return Task(folder.name, [sys.executable, "-c", code, *arguments], folder)


def test_each_has_cores_of_its_own_and_at_most_so_many_run(tmp_path, capfd):
    files = [tmp_path / f"{n}.json" for n in range(4)]
    # Pairs meet: 0 and 1, then 2 and 3.
    tasks = [python(tmp_path / str(n), SPAN, str(files[n]), str(files[n ^ 1])) for n in range(4)]
    assert perform(tasks, 2) == []
    spans = [json.loads(file.read_text()) for file in files]
    for moment, _, _ in spans:
        assert sum(start <= moment < end for start, end, _ in spans) <= 2
    if len(CORES) > 1:
        assert not {*spans[0][2]} & {*spans[1][2]}
    assert (tmp_path / "0" / "log.txt").read_text() == "written\n"
    shown = capfd.readouterr().out
    assert "written" not in shown and "4 of 4" in shown


def test_one_alone_has_all_cores_and_is_seen_as_it_goes(tmp_path, capfd):
    """Alone it is also where more were allowed."""
    file = tmp_path / "a.json"
    assert perform([python(tmp_path / "a", SPAN, str(file), str(file))], 4) == []
    assert json.loads(file.read_text())[2] == CORES
    assert "written" in capfd.readouterr().out
    assert not (tmp_path / "a" / "log.txt").exists()


def test_one_that_fails_is_shown_and_the_others_are_done(tmp_path, capfd):
    tasks = [python(tmp_path / "bad", "raise SystemExit('no such stage')"), python(tmp_path / "good", "print(1)")]
    assert perform([*tasks, python(tmp_path / "late", "print(2)")], 2) == [tasks[0]]
    shown = capfd.readouterr()
    assert "no such stage" in shown.err and f"{tmp_path / 'bad' / 'log.txt'}" in shown.err
    assert "bad: failed" in shown.out
    assert (tmp_path / "late" / "log.txt").read_text() == "2\n"


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_who_stops_it_stops_what_runs(tmp_path, parallel, number):
    code = (
        "import os, pathlib, signal, sys, time\n"
        f"here = pathlib.Path({str(tmp_path)!r})\n"
        "def save(*_):\n    (here / f'{os.getpid()}.saved').touch()\n    sys.exit(1)\n"
        "signal.signal(signal.SIGTERM, save)\n(here / f'{os.getpid()}.begun').touch()\ntime.sleep(60)"
    )
    launcher = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
        "from pathlib import Path\nfrom blip_pipelines.commands.side_by_side import Task, perform\n"
        f"perform([Task('long', [sys.executable, '-c', {code!r}], Path({str(tmp_path)!r}))] * {parallel}, {parallel})"
    )
    command = [sys.executable, "-c", launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 30
        while len([*tmp_path.glob("*.begun")]) < parallel:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert process.stdout
        process.stdout.close()  # who shows it goes first, as `| tee` does
        process.send_signal(number)
        assert process.wait(20) != 0
    assert len([*tmp_path.glob("*.saved")]) == parallel


def test_a_second_interrupt_kills(tmp_path):
    code = (
        "import os, pathlib, signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        f"pathlib.Path({str(tmp_path / 'begun')!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    launcher = (
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from pathlib import Path\nfrom blip_pipelines.commands.side_by_side import Task, perform\n"
        f"perform([Task('long', [sys.executable, '-c', {code!r}], Path({str(tmp_path)!r}))], 1)"
    )
    command = [sys.executable, "-u", "-c", launcher]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        deadline = time.monotonic() + 30
        while not (begun := tmp_path / "begun").exists() or not begun.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stdout and any("Ctrl-C again" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) != 0
    deadline = time.monotonic() + 20
    while psutil.pid_exists(int(begun.read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_places_are_as_many_as_cores_and_memory_allow(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert places(1) == len(CORES)
    assert places(1 << 60) == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert places(1) == 1


def test_a_container_has_what_its_limit_leaves_but_for_cached_files(tmp_path, monkeypatch):
    monkeypatch.setattr(side_by_side, "CGROUP", tmp_path)
    assert available_bytes() > 1 << 20  # no container
    for name, text in {"max": "5000", "current": "4000", "stat": "anon 1\nactive_file 30\ninactive_file 70"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert available_bytes() == 1100
    (tmp_path / "memory.max").write_text("max\n")
    assert available_bytes() > 1 << 20


def test_cores_are_given_out_equally_and_shared_where_they_are_few(monkeypatch):
    monkeypatch.setattr(side_by_side, "_cores", lambda: [0, 1, 2, 3, 4])
    assert cores_of(2) == [{0, 1}, {2, 3}]
    assert cores_of(1) == [{0, 1, 2, 3, 4}]
    monkeypatch.setattr(side_by_side, "_cores", lambda: [3])
    assert cores_of(2) == [{3}, {3}]
