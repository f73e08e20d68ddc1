"""What a Ray task does: measure some units in a folder of its own, and hand back the bytes of their parts.

Nothing is shared but what comes as arguments, so nodes need no common disk; a dump that a node sees is read there.
"""

from __future__ import annotations

import socket
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from anchorscope.dumps import Dump, Entry, LayerTensors, open_dump
from anchorscope.dumps.format import Prompt
from anchorscope.errors import DumpError
from anchorscope.runs.environment import hardware_name, versions
from anchorscope.runs.executors import Work
from anchorscope.runs.life import Make
from anchorscope.runs.worker import describe


@dataclass(frozen=True)
class Answer:
    """What a task hands back.

    Attributes:
        node: name of the machine.
        hardware: of its device.
        parts: path below the run's folder and bytes of every part, by the stem of its unit.
        unseen: True where the node does not see the dump; then there are no parts.
        failed: what failed, as `worker.describe` gives it, or None.
    """

    node: str
    hardware: str
    parts: Mapping[str, Sequence[tuple[str, bytes]]]
    unseen: bool = False
    failed: tuple[str, Any, str] | None = None


@dataclass(frozen=True)
class Sent:
    """A source of layers that were sent along, with all their heads; otherwise it is the dump that they are of."""

    dump: Dump
    layers: Mapping[Entry, LayerTensors]

    @property
    def identity(self) -> str:
        return self.dump.identity

    @property
    def model(self) -> Mapping[str, Any] | None:
        return self.dump.model

    @property
    def prompts(self) -> Sequence[Prompt]:
        return self.dump.prompts

    @property
    def entries(self) -> Sequence[Entry]:
        return self.dump.entries

    def stream(self, wanted: Iterable[tuple[Entry, Sequence[int]]]) -> Iterator[LayerTensors]:
        """See `anchorscope.runs.sources.Source`."""
        for entry, heads in wanted:
            layer = self.layers[entry]
            rows = [layer.query_heads.index(head) for head in heads]
            kv_rows = tuple(layer.kv_rows[row] for row in rows)
            yield replace(layer, q=layer.q[rows], query_heads=tuple(heads), kv_rows=kv_rows)


def probe(kind: str) -> tuple[str, str, dict[str, str | None]]:
    """Name, hardware and versions of the machine that this runs on."""
    return socket.gethostname(), hardware_name(_device(kind)), versions()


def measure(make: Make[Any], units: Sequence[Any], threads: int, *layers: tuple[Entry, LayerTensors]) -> Answer:
    """Measure units; errors are handed back, since Ray would repeat the task and wrap them.

    Args:
        make: the run; its folder is replaced by one of this task.
        units: what to measure.
        threads: of torch.
        *layers: what was sent of the dump; nothing where it is read here.
    """
    device = _device(make.command.plan.device.type)
    answer = Answer(socket.gethostname(), "", {})
    try:
        torch.set_num_threads(threads)
        answer = replace(answer, hardware=hardware_name(device))
        source: Any = make.command.plan.source
        if layers:
            source = Sent(source, dict(layers))
        elif isinstance(source, Dump) and not _sees(source):
            return replace(answer, unseen=True)
        command = type(make.command)(replace(make.command.plan, source=source, device=device, devices=()))
        with tempfile.TemporaryDirectory(prefix="anchorscope-") as name:
            root = Path(name)
            for unit in units:
                for file in command.files(root, unit):
                    file.parent.mkdir(parents=True, exist_ok=True)
            command.executor().run(Work(tuple(units), Make(command, root), source=source))
            parts = {
                unit.stem: [(str(f.relative_to(root)), f.read_bytes()) for f in command.files(root, unit)]
                for unit in units
            }
        return replace(answer, parts=parts)
    except Exception as error:  # whatever it is, the driver decides what that means
        return replace(answer, failed=describe(error))


def _device(kind: str) -> torch.device:
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")  # Ray shows a task its own GPU alone


def _sees(dump: Dump) -> bool:
    try:
        return open_dump(dump.path).identity == dump.identity
    except DumpError:
        return False
