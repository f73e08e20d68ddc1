"""Times a whole model's prefill, dense against sparse, on a GPU: `python tests/benchmarks/prefill.py OUT.json`.

The model has the configuration of Llama-3.1-8B and random weights, whose attention would have no structure. So in both
arms attention receives planted Q, K and V (anchorscope/planted.py) instead of the model's own, in place and at no
cost: every layer the same tensors, all else as in the model (projections, rotary embedding, KV cache, MLP, logits of
the last position). The dense arm takes the fastest of PyTorch's attention back ends on those tensors; recall, density
and output error of the sparse arm are measured on them too.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import anchorscope.kernels
from anchorscope import attention_clock, sparse_attention
from anchorscope.anchors import AnchorConfig
from anchorscope.bench.environment import hardware
from anchorscope.kernels.dense_lse import dense_lse
from anchorscope.kernels.pipeline import anchor_attention
from anchorscope.models.calls import AttentionInputs, Own
from anchorscope.models.hook import divert
from anchorscope.params import AnchorParams
from anchorscope.planted import planted
from anchorscope.runs.environment import versions

DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
LLAMA: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
Tensors = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def llama(layers: int) -> Any:
    """The model in bf16, random weights drawn on the GPU."""
    config = transformers.LlamaConfig(num_hidden_layers=layers, **LLAMA)
    torch.manual_seed(0)
    with torch.device("cuda"):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def tensors(n: int, fraction: float) -> Tensors:
    """Planted Q, K, V, with Q in the memory layout in which a model's queries come."""
    q, k, v = planted(n, fraction=fraction)
    return q.transpose(1, 2).contiguous().transpose(1, 2), k, v


@contextlib.contextmanager
def replaced(model: Any, given: Tensors) -> Iterator[None]:
    """Attention sees `given` instead of the model's own tensors."""
    q, k, v = given

    def swap(call: AttentionInputs, own: Own) -> Any:
        if call.q.shape != q.shape or call.k.shape != k.shape:
            raise ValueError(f"planted {tuple(q.shape)} in place of {tuple(call.q.shape)}")
        return own(q, k, v)

    with divert(model, swap):
        yield


def median_ms(run: Callable[[], Any], repeats: int = 3) -> float:
    """Median milliseconds between CUDA events, after a warm-up."""
    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def dense_backends(given: Tensors) -> dict[str, float]:
    """Milliseconds of one layer's dense attention by each back end that runs."""
    q, k, v = given
    found: dict[str, float] = {}
    for name, backend in DENSE.items():
        with sdpa_kernel(backend), contextlib.suppress(RuntimeError):
            found[name] = median_ms(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return found


def quality(given: Tensors, theta: float, shape: AnchorParams) -> dict[str, float]:
    """Recall, stripe density and relative output error of one layer, against dense attention on the same tensors."""
    q, k, v = given
    place = {"block": shape.block, "step": shape.step}
    sparse = anchor_attention(q, k, v, theta=theta, **place)
    recall = torch.exp(sparse.lse - dense_lse(q, k, None)[1]).double().mean()
    with sdpa_kernel(list(DENSE.values())):
        dense = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    error = torch.linalg.vector_norm((sparse.out - dense).float()) / torch.linalg.vector_norm(dense.float())
    return {"recall": float(recall), "output_error": float(error)}


def prefill(model: Any, ids: torch.Tensor) -> float:
    """Milliseconds until the first token is known, KV cache included."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    with torch.inference_mode():
        model(input_ids=ids, use_cache=True, logits_to_keep=1).logits[0, -1].argmax().item()
    return (time.perf_counter() - start) * 1e3


def arm(model: Any, context: Any, given: Tensors, ids: torch.Tensor, repeats: int) -> dict[str, Any]:
    """Time to first token, attention's share of it, peak memory."""
    with context as run, replaced(model, given):
        prefill(model, ids)  # compiles and fills the allocator
        run.reset()
        torch.cuda.reset_peak_memory_stats()
        times = [prefill(model, ids) for _ in range(repeats)]
        layers = run.layers()
    attention = sum(x.seconds for x in layers) * 1e3 / repeats
    total = statistics.median(times)
    kept, visible = (sum(getattr(x, f) for x in layers) for f in ("kept_pairs", "visible_pairs"))
    return {
        "first_token_ms": total,
        "all_ms": times,
        "attention_ms": attention,
        "attention_share": attention / total,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "density": kept / visible,
        "kinds": sorted({x.kind for x in layers}),
    }


def measure(model: Any, n: int, fraction: float, theta: float, shape: AnchorParams, repeats: int) -> dict[str, Any]:
    """Both arms on the same tensors."""
    given = tensors(n, fraction)
    ids = torch.randint(0, LLAMA["vocab_size"], (1, n), device="cuda")
    depth = model.config.num_hidden_layers
    backends = dense_backends(given)
    fastest = min(backends, key=backends.__getitem__)
    config = AnchorConfig.uniform(theta, range(depth), LLAMA["num_attention_heads"], shape)
    checked = quality(given, theta, shape)
    sparse = arm(model, sparse_attention(model, config), given, ids, repeats)
    with sdpa_kernel(DENSE[fastest]):
        dense = arm(model, attention_clock(model), given, ids, repeats if n < 2**17 else 1)
    return {
        "tokens": n,
        "layers": depth,
        "planted_fraction": fraction,
        "theta": theta,
        "block": shape.block,
        "step": shape.step,
        **checked,
        "density": sparse["density"],
        "dense_backend": fastest,
        "dense_layer_ms": backends,
        "dense": dense,
        "sparse": sparse,
        "speedup_first_token": dense["first_token_ms"] / sparse["first_token_ms"],
        "speedup_attention": dense["attention_ms"] / sparse["attention_ms"],
    }


def kernels_sha256() -> str:
    """Which kernels ran: a hash of their sources and launch table."""
    folder = Path(anchorscope.kernels.__file__).parent
    files = sorted(p for p in folder.iterdir() if p.suffix in (".py", ".json"))
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("--lengths", default="32768,65536,131072")
    parser.add_argument("--fractions", default="0.01,0.05", help="share of columns planted per direction and kv head")
    parser.add_argument("--theta", type=float, default=6.0)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # sdpa explains at length why it does not take the back ends not asked for
    begin = time.perf_counter()
    model = llama(args.layers)
    torch.cuda.synchronize()
    print(f"model ready after {time.perf_counter() - begin:.1f} s", flush=True)
    rows = []
    for n in (int(x) for x in args.lengths.split(",")):
        for fraction in (float(x) for x in args.fractions.split(",")):
            row = measure(model, n, fraction, args.theta, AnchorParams(), args.repeats)
            rows.append(row)
            d, s = row["dense"], row["sparse"]
            print(
                f"{n:7d} tokens, density {row['density']:.3f}, recall {row['recall']:.4f}, error"
                f" {row['output_error']:.3f}: first token {d['first_token_ms']:.0f} ({row['dense_backend']}) ->"
                f" {s['first_token_ms']:.0f} ms, {row['speedup_first_token']:.2f}x; attention {d['attention_ms']:.0f}"
                f" -> {s['attention_ms']:.0f} ms, {row['speedup_attention']:.2f}x; share {d['attention_share']:.2f} ->"
                f" {s['attention_share']:.2f}; peak {d['peak_bytes'] / 2**30:.1f} -> {s['peak_bytes'] / 2**30:.1f} GiB"
                f" ({time.perf_counter() - begin:.0f} s)",
                flush=True,
            )
            record = {
                "command": " ".join(["python tests/benchmarks/prefill.py", Path(args.out).name, *sys.argv[2:]]),
                "versions": {**versions(), "transformers": transformers.__version__},
                "hardware": hardware(torch.device("cuda")),
                "kernels_sha256": kernels_sha256(),
                "model": {"class": "LlamaForCausalLM", "weights": "random, bf16", **LLAMA, "layers": args.layers},
                "rows": rows,
            }
            Path(args.out).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
