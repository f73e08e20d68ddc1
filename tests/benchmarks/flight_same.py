"""On a GPU: an analysis in flight leaves the bytes of one through a dump: `python tests/benchmarks/flight_same.py`."""

from __future__ import annotations

import itertools
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))
from resumable import contents, still_clock

from anchorscope import AnchorParams, ModelSource, PromptInput, analyze, capture_model

SIZES: dict[str, Any] = {
    "num_hidden_layers": 3,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "max_position_embeddings": 8192,
}


def main() -> None:
    """Print what differs, of both dtypes, both back ends, whole and in chunks; exit with 1 if anything does."""
    torch.manual_seed(0)
    lengths = {"a": 3000, "b": 2100}
    prompts = [PromptInput(name, token_ids=tuple(torch.randint(3, 999, (n,)).tolist())) for name, n in lengths.items()]
    root, wrong = Path(tempfile.mkdtemp()), 0
    how: dict[str, Any] = {"thetas": (4.0, 9.0), "figure_theta": 4.0, "params": AnchorParams(64, 4), "diagnose": True}
    for dtype in (torch.bfloat16, torch.float32):
        with torch.device("cuda"):
            config = transformers.LlamaConfig(**SIZES)
            model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        for chunk, backend in itertools.product((None, 700), ("triton", "torch")):
            at = root / f"{dtype}-{chunk}-{backend}"
            dump = capture_model(model, prompts, at / "dump", chunk=chunk, notify=lambda _: None)
            source = ModelSource(model, prompts, chunk=chunk, notify=lambda _: None)
            dump.identity = source.identity
            with still_clock():
                for given, name in ((dump, "through-dump"), (source, "in-flight")):
                    analyze(given, at / name, device="cuda", backend=backend, figures=False, **how)
            want, found = contents(at / "through-dump"), contents(at / "in-flight")
            different = [name for name, data in want.items() if data != found.get(name)]
            wrong += len(different)
            print(f"{dtype}, chunk {chunk}, {backend}: {len(want)} files, different: {different or 'none'}", flush=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
