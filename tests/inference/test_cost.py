import itertools
from types import SimpleNamespace

import pytest
import torch

from blip_pipelines.inference import cost


def test_weights_are_counted_once_wherever_they_are_held():
    shared = torch.nn.Linear(10, 20, bias=False)
    whole = torch.nn.Sequential(shared, torch.nn.BatchNorm1d(20, affine=False))
    model = SimpleNamespace(module=whole, holder=SimpleNamespace(again=shared), name="x", words=["y"])
    assert cost.weights_bytes(model) == 10 * 20 * 4 + 2 * 20 * 4 + 8


def test_requests_take_turns_after_a_warm_up_and_the_median_counts(monkeypatch):
    order = []
    clock = itertools.count()
    monkeypatch.setattr(cost, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    found = cost.seconds_of({"one": lambda: order.append("one"), "two": lambda: order.append("two")}, times=3)
    assert found == {"one": pytest.approx(1.0), "two": pytest.approx(1.0)}
    assert order == ["one"] * 2 + ["two"] * 2 + ["one", "two"] * 3
