"""What capturing adds to a plain forward of SmolLM2-135M at 8,192 tokens: seconds, processor seconds, resident memory.

`python tests/benchmarks/capture.py` prints one line. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from anchorscope.capture import capture_model
from anchorscope.models import PromptInput, prefill
from anchorscope.models.load import load_model

N = 8192


class PeakMemory:
    """Largest resident memory of this process inside the context, sampled every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self._process = psutil.Process()
        self.start = self.peak = self._process.memory_info().rss
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(0.002):
            self.peak = max(self.peak, self._process.memory_info().rss)


def measure(work: Callable[[], object]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and bytes of peak resident memory of one call."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    with PeakMemory() as memory:
        work()
    return time.perf_counter() - wall, time.process_time() - cpu, memory.peak


def main() -> None:
    """Capture twice and run plainly twice, in turn, so that whatever else the machine does falls on both."""
    loaded = load_model("smollm2", device="cpu", notify=print)
    assert loaded.tokenizer is not None
    ids = tuple(loaded.tokenizer(Path(argparse.__file__).read_text(encoding="utf-8"))["input_ids"][:N])
    p = PromptInput("p", token_ids=ids)
    prefill(loaded.model, ids)  # allocator, thread pools and caches warm
    plain, captured = [], []
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(2):
            plain.append(measure(lambda: prefill(loaded.model, ids)))
            out = Path(folder) / str(turn)
            captured.append(measure(lambda out=out: capture_model(loaded.model, [p], out, notify=lambda _: None)))
    wall, cpu = (min(c[i] for c in captured) / min(x[i] for x in plain) for i in (0, 1))
    extra = max(c[2] for c in captured) - min(x[2] for x in plain)
    print(f"plain (wall s, CPU s, peak bytes) {plain}; capture of all layers {captured}")
    print(f"wall ratio {wall:.3f}, CPU ratio {cpu:.3f}, extra memory {extra / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
