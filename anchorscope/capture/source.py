"""`ModelSource`: a model and prompts in place of a dump. Layers are measured while the model runs, and dropped.

    analyze(ModelSource("smollm2", ["book.txt"], tokens=4096), "out")

The model is loaded and tried on a few tokens when something of it is first asked for; the prompts run when measuring
begins. Whatever `capture_model` refuses or warns of, this does too, since it is the same code: the same request, the
same checks of every call, the same proof of model and prompts.

A prompt that runs whole has one layer in memory at a time. With `chunk`, a layer is complete when its last chunk is in,
and the queries of the chunks before are in no cache: so Q, K and V of several layers are held in the host's memory, as
many as fit into half of what is free, and the prompt passes as often as that takes for all layers.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from anchorscope.capture.held import HeldLayers
from anchorscope.capture.passes import model_failures, pass_over
from anchorscope.capture.recorder import Storage
from anchorscope.capture.request import CapturePlan, CaptureRequest
from anchorscope.dumps import Entry, LayerTensors
from anchorscope.dumps.format import Prompt, canonical_sha256, parse_prompts, parse_token_texts
from anchorscope.dumps.writer import PROOF
from anchorscope.files import human_bytes
from anchorscope.models.load import require_transformers
from anchorscope.models.memory import Forecast, forecast, free_bytes, weight_bytes
from anchorscope.models.placement import model_device
from anchorscope.models.prompts import PromptInput, TokenizedPrompt
from anchorscope.proof import PromptProof
from anchorscope.runs.record import FORMAT, VERSION
from anchorscope.runs.sources import InFlight, Wanted
from anchorscope.shapes import fits
from anchorscope.vocabulary import Vocabulary

if TYPE_CHECKING:
    import os

    from transformers import PreTrainedModel

HOST = torch.device("cpu")
SHARE = 0.5  # of the host's free memory, for the layers of a prompt in chunks
logger = logging.getLogger(__name__)


class ModelSource(InFlight):
    """A model and prompts whose attention layers are measured as they pass; give it where a dump is asked for.

    Args:
        model: a preset, a `.gguf` file, a folder or a Hugging Face id, or a loaded transformers model.
        prompts: file paths or `PromptInput`s.
        notify: receives warnings and facts worth a line; the default logs them.
        options: the other fields of `anchorscope.capture.request.CaptureRequest`: `tokens`, `layers`, `chunk`, how the
            model is loaded, ... `dtype` is what layers are rounded to before they are measured, as in a dump.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        prompts: Sequence[PromptInput | str | os.PathLike[str]],
        *,
        notify: Callable[[str], None] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.request = CaptureRequest(model, prompts, **options)
        self._tell = notify or logger.warning
        self._proofs: dict[str, PromptProof] = {}
        self._said: set[str] = set()
        self._failed: BaseException | None = None  # in the middle of a pass, by what measures

    def __repr__(self) -> str:
        return f"ModelSource({self.request.model if isinstance(self.request.model, str) else 'a loaded model'})"

    @functools.cached_property
    def _plan(self) -> CapturePlan:
        """The model, loaded and tried.

        Raises:
            InputError, MissingBackendError, RunFailure: as `capture_model`.
        """
        require_transformers()
        self.request.check()
        prompts = self.request.read_prompts()
        with model_failures():
            return self.request.plan(prompts, self._tell, refuse=False)

    @functools.cached_property
    def _forecast(self) -> Forecast | None:
        """The memory that a prefill takes, said when it is first asked for."""
        plan = self._plan
        with model_failures():
            return forecast(plan.loaded.model, plan.longest, plan.request.chunk, self._tell)

    @functools.cached_property
    def _header(self) -> dict[str, Any]:
        return self._plan.header()

    @property
    def name(self) -> str:  # type: ignore[override]  # known once the model is loaded
        """The model's."""
        return self._plan.loaded.name.rsplit("/", 1)[-1]

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of what determines the tensors: the model, its dtype and device, the prompts' tokens, the chunks, and
        the versions of torch and transformers. Which layers are asked for does not change it.
        """
        header = self._header
        how = {key: header["capture"][key] for key in ("values", "chunk", "device", "torch", "transformers")}
        prompts = [{key: p[key] for key in ("name", "tokens", "sha256")} for p in header["prompts"]]
        facts = {key: header["model"][key] for key in header["model"] if key not in ("query_heads", "kv_heads")}
        return canonical_sha256(
            {"format": FORMAT, "model": facts, "dtype": self.request.dtype, "capture": how, "prompts": prompts}
        )

    @property
    def model(self) -> Mapping[str, Any]:
        """What a dump's manifest would say of the model."""
        return dict(self._header["model"])

    @functools.cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompts, with their token ids."""
        return tuple(parse_prompts(self._header, Path()))

    @functools.cached_property
    def vocabulary(self) -> Vocabulary | None:
        """Text of the prompts' tokens, where a tokenizer knows it."""
        return parse_token_texts(self._header, Path())

    @property
    def refused(self) -> Mapping[int, str]:
        """Why layers cannot be measured, by index."""
        return self._plan.refused

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The layers of every prompt; window, scale and soft-cap are those of a trial run."""
        plan, storage = self._plan, self.request.storage
        found = []
        for prompt in plan.prompts:
            for layer, shape in plan.shapes.items():
                heads, kv_heads = storage.heads(shape.heads, shape.kv_heads)
                tokens = len(prompt.token_ids)
                found.append(
                    Entry(
                        prompt=prompt.name,
                        layer=layer,
                        file="",
                        scale=float(shape.scale),
                        window=shape.window,
                        softcap=shape.softcap,
                        query_heads=tuple(heads),
                        kv_heads=tuple(kv_heads),
                        tokens=tokens,
                        head_dim=shape.head_dim,
                        dtype=storage.dtype or shape.dtype,
                        has_values=storage.values,
                        bytes=shape.bytes(tokens, storage),
                    )
                )
        return tuple(found)

    def memory(self, entries: Sequence[Entry], device: torch.device) -> int:
        """See `InFlight.memory`; it is said in words too."""
        own = model_device(self._plan.loaded.model)
        largest = max(entries, key=lambda e: e.bytes)
        at_once = self._passes([e for e in dict.fromkeys(entries) if e.prompt == largest.prompt])
        whole = not self._in_chunks(largest)
        held = largest.bytes if whole else max(sum(e.bytes for e in group) for group in at_once)
        self._say(largest, [len(group) for group in at_once], held)
        found = self._forecast
        prefill = 0 if found is None else found.needed
        weights = weight_bytes(self._plan.loaded.model)
        return (weights + prefill if own == device else 0) + (held if self._place(largest) == device else 0)

    def fly(self, wanted: Wanted) -> None:
        """See `InFlight.fly`."""
        for prompt in self._plan.prompts:
            asked = [e for e in wanted.asked if e.prompt == prompt.name]
            left = [e for e in wanted.kv_heads if e.prompt == prompt.name]
            if asked and (left or prompt.name not in self._proofs):
                self._fly(prompt, sorted(left, key=lambda e: e.layer), asked, wanted)

    def _fly(self, prompt: TokenizedPrompt, left: Sequence[Entry], asked: Sequence[Entry], wanted: Wanted) -> None:
        """Let the wanted layers of one prompt pass, and prove the prompt if that has not been done."""
        layers = sorted(e.layer for e in asked)
        every = set(layers) == {e.layer for e in self.entries if e.prompt == prompt.name}
        for group in self._passes(left) or [[]]:
            prove = prompt.name not in self._proofs
            store = HeldLayers(
                {e.layer: e for e in group}, self._place(asked[0]), functools.partial(self._visit, wanted)
            )
            found = self._guarded(
                functools.partial(
                    pass_over,
                    self._plan,
                    prompt,
                    store,
                    [e.layer for e in group],
                    storage=self._storage(group, wanted),
                    asked=None if every else layers,
                    prove=prove,
                )
            )
            if found is not None:
                self._proofs[prompt.name] = found
                wanted.proven()
                if (doubt := found.warning(prompt.name)) is not None:
                    self._tell(f"warning: {doubt}")

    def _visit(self, wanted: Wanted, entry: Entry, tensors: LayerTensors) -> None:
        """Have a layer measured. What that raises passes through the model's code, and is known behind it."""
        try:
            with self.at_hand(entry, tensors):
                wanted.visit(entry)
        except BaseException as error:
            self._failed = error
            raise

    def _guarded(self, run: Callable[[], PromptProof | None]) -> PromptProof | None:
        """A pass; the model's failures become one sentence, those of measuring stay what they are."""
        found = None
        try:
            with model_failures(lambda: self._forecast):
                found = run()
        except BaseException:
            if self._failed is None:
                raise
        failed, self._failed = self._failed, None
        if failed is not None:
            raise failed
        return found

    def _storage(self, group: Sequence[Entry], wanted: Wanted) -> Storage:
        """What is held of the layers of a pass: the kv heads that are needed, with their query heads."""
        same = len({e.kv_heads for e in group}) == 1
        needed = {h for e in group for h in wanted.kv_heads[e]}
        return Storage(tuple(sorted(needed)), self.request.dtype, self.request.values) if same else self.request.storage

    def _place(self, entry: Entry) -> torch.device:
        """Where the layers of a prompt are held."""
        return HOST if self._in_chunks(entry) else model_device(self._plan.loaded.model)

    def _in_chunks(self, entry: Entry) -> bool:
        return self.request.chunk is not None and entry.tokens > self.request.chunk

    @functools.cached_property
    def _room(self) -> float:
        """Bytes for the layers of a prompt in chunks."""
        free = free_bytes(HOST)
        return float("inf") if free is None else SHARE * free

    def _passes(self, entries: Sequence[Entry]) -> list[list[Entry]]:
        """Layers of one prompt by the pass in which they are measured."""
        groups: list[list[Entry]] = []
        room = 0.0
        for entry in entries:
            room -= entry.bytes
            if not groups or (room < 0 and self._in_chunks(entry)):
                groups.append([])
                room = self._room - entry.bytes
            groups[-1].append(entry)
        return groups

    def record(self) -> dict[str, Any]:
        """See `InFlight.record`."""
        header = self._header
        prompts = [
            {**p, PROOF: self._proofs[p["name"]].to_json()} if p["name"] in self._proofs else p
            for p in header["prompts"]
        ]
        return {"format": FORMAT, "version": VERSION, "identity": self.identity, **header, "prompts": prompts}

    def recall(self, record: object) -> None:
        """See `InFlight.recall`."""
        if not fits(record, {"format": FORMAT, "identity": self.identity, "prompts": [{"name": str}]}):
            return
        for prompt in record["prompts"]:  # type: ignore[index]  # it fits
            if prompt.get(PROOF) is not None and prompt["name"] not in self._proofs:
                try:
                    self._proofs[prompt["name"]] = PromptProof.from_json(prompt[PROOF])
                except ValueError:
                    continue

    def _say(self, largest: Entry, passes: Sequence[int], held: int) -> None:
        """Say what is held in memory while prompts run."""
        often = "once" if len(passes) == 1 else f"{len(passes)} times"
        sentence = (
            f"memory: {human_bytes(held)} of the host's for Q, K and V of {max(passes)} layers, which are complete when"
            f" their last chunk is in; the prompt passes {often}"
            if self._in_chunks(largest)
            else f"memory: {human_bytes(held)} for one layer at a time, which is measured and dropped"
        )
        if sentence not in self._said:  # several plans may be made of one source
            self._said.add(sentence)
            self._tell(sentence)


__all__ = ["ModelSource"]
