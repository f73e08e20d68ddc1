"""Batches that come in while others are measured: in order, with the tensors of their layer, read ahead."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from anchorscope.runs.executors import InTurn
from anchorscope.runs.incoming import Incoming
from anchorscope.runs.units import HeadUnit


class Layers:
    """A source that notes when a layer was asked for."""

    def __init__(self, log):
        self.log = log

    def stream(self, wanted, ahead=0):
        waiting = []
        for entry, heads in wanted:
            self.log.append(f"read {entry.layer}")
            waiting.append((entry.layer, tuple(heads)))
            if len(waiting) > ahead:
                yield waiting.pop(0)
        yield from waiting


def batch(layer):
    return tuple(HeadUnit(0, SimpleNamespace(layer=layer), head) for head in (0, 1))  # type: ignore[arg-type]


def incoming(layers, log):
    rest = iter([batch(i) for i in layers[1:]])
    make = SimpleNamespace(__call__=None)
    return Incoming.of(batch(layers[0]), lambda: next(rest, None), make, Layers(log), lambda *_: None)


def test_heads_come_with_their_layer_which_is_read_ahead():
    log: list[str] = []
    for unit, tensors in incoming([3, 5, 7, 8], log).with_tensors(ahead=2):
        assert tensors == (unit.entry.layer, (0, 1))
        log.append(f"{unit.entry.layer}:{unit.head}")
    assert log == ["read 3", "read 5", "read 7", "3:0", "3:1", "read 8", "5:0", "5:1", "7:0", "7:1", "8:0", "8:1"]
    log.clear()
    assert len(list(incoming([3, 5], log).with_tensors())) == 4


def test_it_says_what_is_at_work_and_what_is_done():
    said = []

    def make(unit, context):
        context.tick(1, "half")

    rest = iter([(SimpleNamespace(stem="b"),)])
    work = Incoming.of((SimpleNamespace(stem="a"),), lambda: next(rest, None), make, None, lambda *x: said.append(x))
    InTurn(torch.device("cpu")).run(work)
    assert said == [("tick", 1, "half", "a"), ("done", "a"), ("tick", 1, "half", "b"), ("done", "b")]
