"""A Ray cluster of two nodes on this machine: the bytes of one process, whatever happens to a node."""

from __future__ import annotations

import importlib.util
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from resumable import COMMANDS, Command, Inputs, contents

from anchorscope.cli.app import main
from anchorscope.errors import InputError, MissingBackendError, RunFailure
from anchorscope.runs import cluster
from anchorscope.runs.cluster import RayTasks

pytestmark = pytest.mark.usefixtures("quiet")
ON_HEADS = [c for c in COMMANDS if c.name in ("analyze", "heads", "compare", "calibrate")]
on_heads = pytest.mark.parametrize("command", ON_HEADS, ids=lambda c: c.name)
HEADS = ON_HEADS[2]
needs_ray = [
    pytest.mark.cluster,
    pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs the extra ray"),
]


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[Any]:
    """A head that does no tasks, and two nodes that do one at a time each."""
    from ray.cluster_utils import Cluster

    small = {"object_store_memory": 80 << 20, "include_dashboard": False}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
    for _ in range(2):
        nodes.add_node(num_cpus=1, object_store_memory=80 << 20)
    yield nodes
    nodes.shutdown()


@pytest.fixture
def tasks(two_nodes) -> Iterator[RayTasks]:
    with RayTasks(two_nodes.address, "cpu") as found:
        yield found


class TestOnTwoNodes:
    pytestmark = needs_ray

    @on_heads
    def test_the_bytes_are_those_of_one_process(self, command: Command, inputs, tasks, tmp_path):
        command.run(inputs, tmp_path / "one", figures=False)
        seen = []
        command.run(inputs, tmp_path / "two", figures=False, executor=tasks, progress=seen.append)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        steps = [e.work for e in seen if e.stage == "heads"]
        assert steps == sorted(steps)
        assert steps[-1] == seen[0].total

    @pytest.mark.parametrize("name", ["analyze", "heads"])
    def test_layers_are_sent_to_a_node_that_does_not_see_the_dump(self, name, inputs, tasks, tmp_path, monkeypatch):
        command = next(c for c in ON_HEADS if c.name == name)
        command.run(inputs, tmp_path / "one", figures=False)
        real = cluster._portable

        def elsewhere(make):
            sent = real(make)
            sent.command.plan.source.path = Path("/no/such/dump")
            return sent

        monkeypatch.setattr(cluster, "_portable", elsewhere)
        said: list[str] = []
        command.run(inputs, tmp_path / "two", figures=False, executor=tasks, notify=said.append)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        assert [s for s in said if "does not see" in s and "layers are sent to the nodes" in s]
        assert len(said) == 1

    def test_an_error_of_a_task_is_said_as_it_is(self, inputs, tasks, tmp_path):
        hurt = shutil.copytree(inputs.dump, tmp_path / "hurt")
        file = next(hurt.glob("*.safetensors"))
        file.write_bytes(file.read_bytes()[:-1] + b"!")
        with pytest.raises(InputError, match="does not match its checksum"):
            HEADS.run(Inputs(hurt, None, None, 96), tmp_path / "o", executor=tasks)

    def test_other_versions_are_refused(self, two_nodes, monkeypatch):
        mine = cluster.versions()
        monkeypatch.setattr(cluster, "versions", lambda: {**mine, "torch": "2.0.0"})
        with pytest.raises(InputError, match=r"has other versions: torch .* there and 2\.0\.0 here; install the same"):
            RayTasks(two_nodes.address, "cpu")

    def test_gpus_that_the_cluster_lacks(self, two_nodes):
        with pytest.raises(MissingBackendError, match="the Ray cluster has no GPU; use --device cpu"):
            RayTasks(two_nodes.address, "cuda")
        with pytest.raises(InputError, match="Ray chooses the GPU"):
            RayTasks(two_nodes.address, "cuda:1")

    def test_from_the_command_line(self, inputs, two_nodes, tmp_path, capfd):
        words = ["heads", str(inputs.dump), "--step", "2", "--block", "16", "--no-figures", "--json", "--out"]
        assert main([*words, str(tmp_path / "one"), "--device", "cpu"]) == 0
        want = capfd.readouterr().out
        assert main([*words, str(tmp_path / "two"), "--ray", two_nodes.address]) == 0
        assert capfd.readouterr().out == want
        assert contents(tmp_path / "two") == contents(tmp_path / "one")

    def test_a_node_that_dies_in_the_middle_changes_nothing(self, inputs, two_nodes, tmp_path, capfd):
        """The last test of the cluster, which has one node less after it."""
        compare = ON_HEADS[1]
        compare.run(inputs, tmp_path / "one", figures=False)
        said: list[str] = []
        node = two_nodes.worker_nodes and list(two_nodes.worker_nodes)[-1]

        def kill(event) -> None:
            if event.work and node in two_nodes.worker_nodes:
                two_nodes.remove_node(node, allow_graceful=False)

        with RayTasks(two_nodes.address, "cpu") as tasks:
            compare.run(inputs, tmp_path / "two", figures=False, executor=tasks, notify=said.append, progress=kill)
            assert node not in two_nodes.worker_nodes
            end = time.monotonic() + 60
            while not said and time.monotonic() < end:  # where the run ended before Ray noticed
                tasks._look(SimpleNamespace(tell=said.append))  # type: ignore[arg-type]
                time.sleep(0.2)
        assert contents(tmp_path / "two") == contents(tmp_path / "one")
        assert len(said) == 1
        assert "of the Ray cluster is lost; what it had is measured again; 1 node left" in said[0]
        assert not capfd.readouterr().out, "Ray's own words"

    def test_nobody_answers(self):
        with pytest.raises(InputError, match="no Ray cluster answers"), socket.create_server(("127.0.0.1", 0)) as other:
            RayTasks(f"127.0.0.1:{other.getsockname()[1]}")  # something listens there, which is no Ray
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
            with pytest.raises(InputError, match=f"--ray {address}: no Ray cluster answers at {address}; start one"):
                RayTasks(address)


def fake_ray(**parts: Any) -> Any:
    return SimpleNamespace(
        **{
            "is_initialized": lambda: False,
            "shutdown": lambda: None,
            "_private": SimpleNamespace(worker=SimpleNamespace()),
            **parts,
        }
    )


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_answers", lambda _: True)


def raising(error: Exception) -> Any:
    def init(**_: Any) -> None:
        raise error

    return init


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (
            RuntimeError(
                "Version mismatch: The cluster was started with:\n    Ray: 2.1\nThis process was started with:"
            ),
            "the cluster runs another Ray or Python (Version mismatch: The cluster was started with: Ray: 2.1 This",
        ),
        (ConnectionError("Could not find any running Ray instance.\nmore"), "cannot be joined (Could not find any"),
    ],
)
def test_a_cluster_that_cannot_be_joined(monkeypatch, answering, error, sentence):
    monkeypatch.setitem(sys.modules, "ray", fake_ray(init=raising(error)))
    with pytest.raises(InputError) as caught:
        RayTasks("1.2.3.4:6379")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_addresses_that_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", fake_ray())
    with pytest.raises(InputError, match="give host:port of the head"):
        RayTasks("ray://head:10001")
    for address in ("", "head", "head:", "head:port", ":-1"):
        with pytest.raises(InputError, match="is malformed: write auto, or host:port"):
            RayTasks(address)
    with pytest.raises(InputError, match=r"no Ray cluster answers at 127\.0\.0\.1:99999"):
        RayTasks("127.0.0.1:99999")
    monkeypatch.setitem(sys.modules, "ray", fake_ray(is_initialized=lambda: True))
    with pytest.raises(InputError, match="connected to a Ray cluster already"):
        RayTasks("auto")


def test_a_task_that_fits_no_node(monkeypatch):
    nodes = [{"Alive": True, "Resources": {"memory": 1e9}}, {"Alive": False, "Resources": {"memory": 1e12}}]
    tasks = RayTasks.__new__(RayTasks)
    tasks._ray, tasks.kind = fake_ray(nodes=lambda: nodes), "cpu"
    with pytest.raises(RunFailure, match=r"no node of the Ray cluster has the 2\.0 GB .* largest has 1\.0 GB"):
        tasks._refuse_too_large(SimpleNamespace(memory=2e9))
    tasks._refuse_too_large(SimpleNamespace(memory=5e8))


@pytest.mark.parametrize("command", ["analyze", "heads", "compare", "calibrate"])
def test_the_extra_is_named_where_it_is_missing(command, inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    words = [command, str(inputs.dump), "--out", str(tmp_path / "o"), "--ray", "auto"]
    assert main(words) == 2
    assert capsys.readouterr().err == "error: --ray needs Ray, which is not installed: pip install 'anchorscope[ray]'\n"
    for more in (["--shard", "1/2"], ["--devices", "all"]):
        assert main([*words, *more]) == 2
        assert f"--ray and {more[0]} contradict each other" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize("option", [("--ray", "auto"), ("--shard", "1/2"), ("--devices", "all")])
@pytest.mark.parametrize("command", ["analyze", "heads", "compare", "calibrate"])
def test_a_model_that_runs_is_not_shared(command, option, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("words")
    words = [command, "--model", "smollm2", "--prompt", str(tmp_path / "p.txt"), "--out", str(tmp_path / "o"), *option]
    assert main(words) == 2
    assert f"error: --model and {option[0]} contradict each other: the layers" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
