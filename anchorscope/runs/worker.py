"""A process that measures units on one device for `pool.Devices`: the program it runs, and how the two talk.

Messages are pickled values with their length in front, on the process's standard input and output: both ends are this
program, on one machine. The process ends when its input does, however the other one ended.
"""

from __future__ import annotations

import os
import pickle
import queue
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

HEADER = 8  # bytes of a message's length
PROGRAM = "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from anchorscope.runs.worker import main; main()"


def send(stream: BinaryIO, message: object) -> None:
    """Write one message."""
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(HEADER, "little") + data)
    stream.flush()


def receive(stream: BinaryIO) -> Iterator[Any]:
    """The messages of the other end, until it closes or dies."""
    while len(header := stream.read(HEADER)) == HEADER:
        data = stream.read(size := int.from_bytes(header, "little"))
        if len(data) < size:
            return
        yield pickle.loads(data)


def main() -> None:
    """Carry out what comes in: ("job", Make, source, threads), then ("units", batch) some times, then ("rest",)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    inbox: queue.Queue[Any] = queue.Queue()

    def listen() -> None:
        for message in receive(sys.stdin.buffer):
            inbox.put(message)
        os._exit(1)  # nobody is left to work for

    threading.Thread(target=listen, daemon=True).start()
    lock = threading.Lock()

    def answer(*message: object) -> None:
        with lock:
            send(answers, message)

    try:
        _work(inbox, answer)
    except BaseException as error:  # whatever it is, the other end decides what that means
        answer("failed", *describe(error))


def _work(inbox: queue.Queue[Any], answer: Callable[..., None]) -> None:
    import torch

    from anchorscope.runs.incoming import Incoming

    while True:
        kind, *message = inbox.get()
        if kind == "job":
            make, source, threads = message
            device = make.command.plan.device
            torch.set_num_threads(threads)
            if device.type == "cuda":
                torch.cuda.set_device(device)
            continue
        if kind == "rest":
            continue

        def more() -> Any:
            word, *rest = inbox.get()
            return rest[0] if word == "units" else None

        make.command.executor().run(Incoming.of(message[0], more, make, source, answer))
        answer("rested", make.command.handed_over())


def describe(error: BaseException) -> tuple[str, Any, str]:
    """What failed ("memory", "device" or "error"), the error (as text where it cannot be sent), and its traceback."""
    from anchorscope.devices import is_device_failure, is_out_of_memory
    from anchorscope.errors import type_and_line

    kind = "memory" if is_out_of_memory(error) else "device" if is_device_failure(error) else "error"
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # errors of libraries' own classes
        return kind, RuntimeError(type_and_line(error)), trace
    return kind, error, trace
