"""The runtime: texts in, outputs out, at the ratio and with the plugin asked for.

Tokenises, groups rows into length buckets, runs the engine of the ratio. Loads a ratio when it is first asked
for. Safe to share between threads: requests compute one after another, each with all of the runtime's threads,
so the ratios' sessions never compete (their pools sleep in between).

With a shared bundle, plugins come and go while requests run: `plug` gets everything ready, then publishes a name's
ratios all at once; a request keeps the ones it began with.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import numpy as np
import numpy.typing as npt

from variator import machine
from variator.engines.base import Engine, Feed
from variator.engines.built import BuiltEngine, find_built, load_engine
from variator.engines.profiles import most_rows
from variator.engines.reader import Reader, padded_length
from variator.errors import EngineError, InputError
from variator.toolkit.bundle import SHARED_GRAPH, Bundle
from variator.toolkit.plugin_file import Head, Plugin, heads_agree, load_plain
from variator.toolkit.plugin_format import Key, in_order
from variator.toolkit.rows import Input, Outputs, Row, place
from variator.toolkit.stack import LOGITS, Inputs, check_fits, check_head, graph_inputs, inputs_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from variator.engines.generation import GenerateSettings
    from variator.engines.seq2seq import Generation
    from variator.engines.serving import Observer, Server, ServeSettings

TOKENS_PER_RUN = 16384
"""Largest rows x length of one engine call; longer requests run in parts."""

SQUARES_PER_RUN = 1 << 25
"""Largest rows x length x length of one call, unless it is a single row: attention compares all pairs of tokens."""

AUTO = "auto"
"""The ratio that today's load allows."""

BLANK = "<extra_id_0>"
"""T5's mark for the first gap in a text, and for what fills it."""

DEFAULT = "default"
"""Name of the plugins that are in the bundle."""


@dataclass(frozen=True)
class Result:
    """What one request got.

    Args:
        outputs: By name, fp32, one row per input in the order given; token outputs padded by `rows.PADDING`.
        lengths: Tokens per row.
        plugin: Name of the plugin that served it.
        precision: As read back from the engine.
        load_ms: Time to load the ratio, for the first request that asks for it.
        queue_ms: Time the request waited for others.
        compute_ms: Time in the engine; of the whole batch if it was served in one.
        expected_quality: Of this ratio, relative to ratio 1, where a score was recorded with its plugin.
    """

    outputs: Outputs
    lengths: list[int]
    ratio: Key
    plugin: str
    engine: str
    precision: str
    tokenise_ms: float
    load_ms: float
    queue_ms: float
    compute_ms: float
    expected_quality: float | None = None


class Slot:
    """A ratio of a plugin: a graph and what it holds, ready when it is first needed."""

    def __init__(self, graph: str, inputs: Callable[[], Inputs], head: bool) -> None:
        self.graph, self.head = graph, head
        self._inputs = inputs
        self._engine: Engine | None = None
        self._lock = Lock()

    @property
    def ready(self) -> bool:
        """Whether it can run at once."""
        return self._engine is not None

    def engine(self, hold: Callable[[str, Inputs], Engine]) -> Engine:
        """The engine, made now if it is not yet; `hold` gives that of a graph with its inputs held."""
        if self._engine is not None:
            return self._engine
        with self._lock:
            if self._engine is None:
                self._engine = hold(self.graph, self._inputs())
                self._inputs = dict  # they are on the device now
            return self._engine


class Runtime:
    """An opened bundle; use it as a context manager. Made by `Runtime.open`."""

    def __init__(self, bundle: Bundle, built: BuiltEngine, reason: str, threads: int) -> None:
        self.bundle = bundle
        self.picked = reason
        """Which engine was picked, and why."""
        self.built = built
        self.threads = threads or machine.cores()
        self._graphs: dict[str, Engine] = {}
        self._own = self._own_slots()
        self._plugged: dict[str, Mapping[Key, Slot]] = {DEFAULT: self._own}
        """Never changed in place: whoever reads it once has a consistent view."""
        self._load_lock, self._compute_lock, self._plug_lock, self._closed = Lock(), Lock(), Lock(), False
        self._server: Server | None = None
        self._servers: WeakSet[Server] = WeakSet()
        self._no_more_servers = False
        self._server_lock = Lock()
        self._reader = Reader(bundle)

    @staticmethod
    def open(
        bundle: Path | str | Bundle, engine: str = "auto", precision: str | None = None, threads: int = 0
    ) -> Runtime:
        """Open a bundle with an engine that was built for it on this machine.

        Args:
            engine: `auto`, `onnxruntime` or `openvino`.
            precision: None takes the fastest without int8's loss.
            threads: 0 means all cores.

        Raises:
            BundleError: If the bundle is damaged.
            EngineError: If no fitting engine is built, or it is stale or damaged.
        """
        bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
        built, reason = find_built(bundle, engine, precision)
        return Runtime(bundle, built, reason, threads)

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Answer what waits, wait for the running request and give all memory back."""
        with self._server_lock:
            servers, self._server, self._no_more_servers = list(self._servers), None, True
        for server in servers:
            server.close()
        with self._plug_lock, self._load_lock:
            if not self._compute_lock.acquire(timeout=1.0 if any(one.hanging for one in servers) else -1):
                self._closed, self._plugged = True, {}
                raise EngineError("a run does not end: its memory cannot be given back", fix="end this process")
            try:
                self._closed, self._plugged, self._own = True, {}, {}
                while self._graphs:
                    self._graphs.popitem()[1].close()
            finally:
                self._compute_lock.release()

    @property
    def engine(self) -> str:
        """Name of the backend."""
        return self.built.record.backend

    @property
    def tokenizer(self) -> Tokenizer:
        """The bundle's tokenizer, without truncation or padding. Not to be changed.

        Raises:
            InputError: If the model reads pictures.
        """
        return self._reader.tokenizer

    @property
    def loaded(self) -> list[Key]:
        """Ratios that can run at once, of any plugin: those asked for so far, or plugged in since."""
        return in_order({ratio for slots in self._plugged.values() for ratio, slot in slots.items() if slot.ready})

    @property
    def plugins(self) -> dict[str, list[Key]]:
        """Names that can be asked for now, and the ratios each has."""
        return {name: in_order(slots) for name, slots in self._plugged.items()}

    def plug(
        self, name: str, plugin: Plugin | Path | str | Sequence[Plugin | Path | str], head: Head | None = None
    ) -> None:
        """Make plugins available under a name, at once for all requests that begin from now on.

        Replaces whatever the name stood for; requests that run finish with what they began with. `default` stands for
        the bundle's own.

        Args:
            name: As `infer` will ask for it.
            plugin: Plugins, one per ratio, or their files; or a directory of `ratio-<k>.safetensors`.
            head: A classifier for those that bring none, and for ratio 1. Without it ratio 1 has the head that all the
                plugins agree on.

        Raises:
            InputError: If the name is empty, or there is no plugin or two of one ratio.
            PluginError: If one is damaged, for another backbone, or beyond what the shared graph takes; the name then
                stands for what it did.
        """
        if not isinstance(name, str) or not name.strip():
            raise InputError(f"{name!r} is no name for a plugin", valid="a text with at least one character")
        plugins = _read_plugins(name, plugin)
        for one in plugins:
            check_fits(one, self.bundle.manifest, f"plugin {name!r}, ratio {one.config.key}")
        if head is not None:
            check_head(head, self.bundle.manifest, f"plugin {name!r}")
        slots = self._slots_of(plugins, head)
        for slot in slots.values():
            if slot.graph in self._graphs:  # else its first request loads the graph
                slot.engine(self._held)
        with self._plug_lock:
            self._check_open()
            self._plugged = {**self._plugged, name: slots}

    def unplug(self, name: str) -> None:
        """Take a name away; its memory goes when the last request that uses it is done. `default` becomes the bundle's
        own again.

        Raises:
            InputError: If nothing is plugged in under that name.
        """
        with self._plug_lock:
            self._check_open()
            self._slots(name)
            rest = {key: slots for key, slots in self._plugged.items() if key != name}
            self._plugged = {DEFAULT: self._own, **rest} if name == DEFAULT else rest

    def infer(
        self,
        inputs: Sequence[Input],
        *,
        ratio: Key,
        plugin: str = DEFAULT,
        truncate: bool = False,
        slo_ms: float | None = None,
        min_ratio: Key | None = None,
        max_ratio: Key | None = None,
        min_quality: float | None = None,
    ) -> Result:
        """Run a request.

        Args:
            inputs: Texts, pairs of texts, lists of token ids, or such with their types (`Row`); at least one.
            ratio: One that the plugin has, or the name of a setting; 1 is the uncompressed backbone. `auto` takes the
                lowest that today's load allows: the request goes through `server`.
            plugin: A name that is plugged in; `default` is what the bundle holds. If its plugins bring heads, ratio 1
                has `logits` only if they all bring the same.
            truncate: Cut what is longer than the model's limit instead of refusing it; token ids simply at the end.
            slo_ms, min_ratio, max_ratio, min_quality: For `auto`; see `serving.Server.submit`.

        Raises:
            InputError: For an empty request or row, a row that is too long, ids outside the vocabulary, a plugin that
                is not plugged in or a ratio that it does not have.
            DeadlineExceeded, Overloaded: With `auto`, if the request cannot be answered in time.
        """
        bounds = {"slo_ms": slo_ms, "min_ratio": min_ratio, "max_ratio": max_ratio, "min_quality": min_quality}
        if ratio == AUTO and AUTO not in self._slots(plugin):
            if self.bundle.manifest.decoder is not None:
                raise InputError(f"ratio {AUTO!r} with a decoder", valid=", ".join(map(str, self.bundle.ratios)))
            if not self._is_own(plugin):
                raise InputError(f"ratio {AUTO!r} with plugin {plugin!r}", valid="the bundle's own plugins")
            return self.server().submit(inputs, truncate=truncate, **bounds).result()  # type: ignore[arg-type]
        given = [name for name, value in bounds.items() if value is not None]
        if given:
            raise InputError(f"{given[0]} with ratio {ratio!r}", valid=f"{given[0]} with ratio {AUTO!r}")
        slot = self._slot(ratio, plugin)
        started = time.perf_counter()
        rows = self.tokenise(inputs, truncate)
        tokenised = time.perf_counter()
        slot.engine(self._held)
        loaded = time.perf_counter()
        outputs, queue_ms, compute_ms = self._computed(slot, lambda engine: self._run(engine, rows))
        return self.result(
            outputs,
            [len(row.ids) for row in rows],
            ratio,
            plugin,
            tokenise_ms=(tokenised - started) * 1e3,
            load_ms=(loaded - tokenised) * 1e3,
            queue_ms=queue_ms,
            compute_ms=compute_ms,
        )

    def _is_own(self, plugin: str) -> bool:
        """Whether a name stands for what the bundle brought."""
        return plugin == DEFAULT and self._plugged.get(DEFAULT) is self._own

    def _computed(
        self, slot: Slot, work: Callable[[Engine], Outputs], on_start: Callable[[], None] = lambda: None
    ) -> tuple[Outputs, float, float]:
        """What an engine gives when its turn comes; ms waited and computed."""
        outputs, queue_ms, compute_ms = self._in_turn(slot.engine(self._held), work, on_start)
        if self._has_head_input and not slot.head:
            del outputs[LOGITS]
        return outputs, queue_ms, compute_ms

    def _in_turn(
        self, engine: Engine, work: Callable[[Engine], Outputs], on_start: Callable[[], None] = lambda: None
    ) -> tuple[Outputs, float, float]:
        """Requests compute one after another: what an engine gives, ms waited and computed."""
        waiting = time.perf_counter()
        with self._compute_lock:
            self._check_open()
            on_start()
            computing = time.perf_counter()
            outputs = work(engine)
            done = time.perf_counter()
        return outputs, (computing - waiting) * 1e3, (done - computing) * 1e3

    def result(
        self,
        outputs: Outputs,
        lengths: list[int],
        ratio: Key,
        plugin: str = DEFAULT,
        *,
        tokenise_ms: float,
        load_ms: float = 0.0,
        queue_ms: float,
        compute_ms: float,
    ) -> Result:
        """A request's result."""
        precision = self.built.record.precision  # that of all its graphs: `load_engine` sees to it
        expected = self.quality.get(ratio) if self._is_own(plugin) else None
        times = (tokenise_ms, load_ms, queue_ms, compute_ms)
        return Result(outputs, lengths, ratio, plugin, self.engine, precision, *times, expected)

    def run_together(
        self, ratio: Key, rows: Sequence[Row], on_start: Callable[[], None] = lambda: None
    ) -> tuple[Outputs, float]:
        """Run rows as one batch of the bundle's own plugin, padded to the longest: for whoever has sorted them.

        Args:
            on_start: Called when its turn has come.

        Returns:
            Outputs, those of tokens with the padding; and ms in the engine.
        """

        def work(engine: Engine) -> Outputs:
            longest, parts = max(len(row.ids) for row in rows), []
            most = min(rows_of(longest), most_rows(engine.profiles, longest))
            for start in range(0, len(rows), most):
                parts.append(engine.run(self.feed(rows[start : start + most], longest)))
            if len(parts) == 1:
                return dict(parts[0])
            return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

        outputs, _, compute_ms = self._computed(self._own_slot(ratio), work, on_start)
        return outputs, compute_ms

    def run_graph(self, graph: str, feed: Feed) -> tuple[Outputs, float, float]:
        """Run a graph that belongs to no ratio, a decoder: its outputs, ms waited and computed."""
        return self._in_turn(self._held(graph, {}), lambda engine: dict(engine.run(feed)))

    def generate(
        self,
        inputs: Sequence[Input],
        *,
        ratio: Key,
        plugin: str = DEFAULT,
        truncate: bool = False,
        settings: GenerateSettings | None = None,
    ) -> Generation:
        """Generate a text for every input; the ratio is the encoder's. For bundles of task seq2seq.

        Raises:
            InputError: As `infer`, and for a bundle without a decoder or ratio `auto`.
        """
        from variator.engines.generation import GenerateSettings
        from variator.engines.seq2seq import write

        return write(self, inputs, ratio, plugin, truncate, settings or GenerateSettings())

    def score(
        self,
        inputs: Sequence[Input],
        candidates: Sequence[str],
        *,
        ratio: Key,
        prefix: str = BLANK,
        plugin: str = DEFAULT,
        truncate: bool = False,
    ) -> Result:
        """Classify by what would fill a gap: `logits` [rows, candidates], one per word that could stand there.

        The form of the paper: the text holds `<extra_id_0>` where a word is asked for, and the decoder, started with
        that mark, scores the first token of each candidate ("yes", "no", …) at the next place.

        Args:
            candidates: Words with different first tokens.
            prefix: Token that the decoder starts with; empty for none.

        Raises:
            InputError: As `generate`, and for candidates or a prefix that are none.
        """
        from variator.engines.seq2seq import score

        found, encoded, queue_ms, compute_ms = score(self, inputs, candidates, prefix, ratio, plugin, truncate)
        return replace(
            encoded,
            outputs={LOGITS: found},
            queue_ms=encoded.queue_ms + queue_ms,
            compute_ms=encoded.compute_ms + compute_ms,
        )

    def _own_slot(self, ratio: Key) -> Slot:
        own = self._own
        self._check_open()
        return own[ratio]

    def timed_run(self, ratio: Key, feed: Feed) -> float:
        """ms that a run of the bundle's own plugin takes, without waiting for others."""
        return self._computed(self._own_slot(ratio), lambda engine: dict(engine.run(feed)))[2]

    @cached_property
    def quality(self) -> dict[Key, float]:
        """Relative to ratio 1, where plugins bring scores: that of the split they were scored on first."""
        found: dict[Key, float] = {1: 1.0}
        for ratio, entry in self.bundle.manifest.ratios.items():
            for score in entry.training.get("scores", [])[:1]:
                metric, value = next(iter(score["value"].items()))
                if score["ratio_1"].get(metric):
                    found[ratio] = round(value / score["ratio_1"][metric], 4)
        return found

    def serve(self, settings: ServeSettings | None = None, observers: Sequence[Observer] = ()) -> Server:
        """A queue with a policy in front of this runtime, for requests that leave the ratio to the load.

        Raises:
            EngineError: If no latency was measured for this engine on this machine (`variator bench --calibrate`).
        """
        from variator.engines.serving import ServeSettings

        with self._server_lock:
            return self._serve(settings or ServeSettings(), observers)

    def _serve(self, settings: ServeSettings, observers: Sequence[Observer] = ()) -> Server:
        """A server that ends with the runtime. Holds the lock."""
        from variator.engines.latency import load_table
        from variator.engines.serving import Server

        if self._no_more_servers:
            raise EngineError("the runtime is closed", fix="use it inside its `with` block")
        server = Server(self, load_table(self.built, self.threads), settings, self.quality, observers=observers)
        self._servers.add(server)
        return server

    def server(self) -> Server:
        """The one that `infer(ratio="auto")` goes through, with default settings; made when it is first needed."""
        from variator.engines.serving import ServeSettings

        with self._server_lock:
            if self._server is None:
                self._server = self._serve(ServeSettings())
            return self._server

    def tokenise(self, inputs: Sequence[Input], truncate: bool = False) -> list[Row]:
        """Check inputs and turn them into token ids. Errors as `infer`."""
        return self._reader.tokenise(inputs, truncate)

    def load(self, ratio: Key, plugin: str = DEFAULT) -> Engine:
        """The engine of a ratio, loaded if it is not yet. Errors as `infer`."""
        return self._slot(ratio, plugin).engine(self._held)

    def _check_open(self) -> None:
        if self._closed:
            raise EngineError("the runtime is closed", fix="use it inside its `with` block")

    def _slots(self, plugin: str) -> Mapping[Key, Slot]:
        plugged = self._plugged
        if plugin not in plugged:
            self._check_open()
            raise InputError(
                f"no plugin {plugin!r} is plugged in",
                valid=", ".join(plugged),
                fix=f"runtime.plug({plugin!r}, FILE)",
            )
        return plugged[plugin]

    def _slot(self, ratio: Key, plugin: str) -> Slot:
        slots = self._slots(plugin)
        if isinstance(ratio, bool) or ratio not in slots:
            if slots is self._own:
                self.bundle.ratio(ratio)  # says what the bundle holds
            raise InputError(
                f"plugin {plugin!r} has no ratio {ratio!r}" + (": its heads differ" if ratio == 1 else ""),
                valid=", ".join(map(str, in_order(slots))),
                fix="plug it in with head=…" if ratio == 1 else "plug it in with a plugin of that ratio, too",
            )
        return slots[ratio]

    def _held(self, graph: str, inputs: Inputs) -> Engine:
        """The engine of a graph, loaded if it is not yet, with inputs held. Excludes `close`."""
        with self._load_lock:
            self._check_open()
            if graph not in self._graphs:
                self._graphs[graph] = load_engine(self.bundle, self.built, graph, self.threads)
            return self._graphs[graph].hold(inputs)

    @property
    def _has_head_input(self) -> bool:
        shared = self.bundle.manifest.shared
        return shared is not None and shared.head

    def _own_slots(self) -> dict[Key, Slot]:
        """The bundle's own plugins."""
        return {
            ratio: Slot(entry.graph, partial(inputs_of, self.bundle, ratio), entry.head)
            for ratio, entry in self.bundle.manifest.ratios.items()
        }

    def _slots_of(self, plugins: Sequence[Plugin], head: Head | None) -> dict[Key, Slot]:
        manifest = self.bundle.manifest

        def slot(one: Plugin | None, head: Head | None) -> Slot:
            graph = SHARED_GRAPH if one else self.bundle.ratio(1).graph
            inputs = graph_inputs(manifest.shared, manifest.hidden_size, one, head)
            return Slot(graph, lambda: inputs, head is not None)

        slots: dict[Key, Slot] = {one.config.key: slot(one, one.head or head) for one in plugins}
        if head is not None or heads_agree(plugins):
            slots[1] = slot(None, head or plugins[0].head)
        return slots

    def _run(self, engine: Engine, rows: Sequence[Row]) -> Outputs:
        outputs: Outputs = {}
        lengths = [len(row.ids) for row in rows]
        for length, indices in _buckets(rows, self.bundle.manifest.max_length):
            rows_per_run = min(rows_of(length), most_rows(engine.profiles, length))
            for start in range(0, len(indices), rows_per_run):
                part = indices[start : start + rows_per_run]
                for name, values in engine.run(self.feed([rows[i] for i in part], length)).items():
                    place(outputs, name, values, part, lengths)
        return outputs

    def feed(self, rows: Sequence[Row], length: int) -> dict[str, npt.NDArray[Any]]:
        """The inputs for tokenised rows, see `Reader.feed`."""
        return self._reader.feed(rows, length)


def _read_plugins(name: str, plugin: Plugin | Path | str | Sequence[Plugin | Path | str]) -> list[Plugin]:
    """What `Runtime.plug` was given, read from files where it is not yet: at least one, no two of one ratio."""
    given = [plugin] if isinstance(plugin, Plugin | str | Path) else list(plugin)
    plugins = [found for one in given for found in ([one] if isinstance(one, Plugin) else load_plain(Path(one)))]
    ratios = [one.config.key for one in plugins]
    if not ratios or len(set(ratios)) < len(ratios):
        raise InputError(
            f"plugin {name!r} has " + (f"several plugins of one ratio: {ratios}" if ratios else "no plugin file"),
            valid="one plugin per ratio, or a directory with ratio-<k>.safetensors files",
        )
    return plugins


def rows_of(length: int) -> int:
    """Most rows of a length that run at once."""
    return max(1, min(TOKENS_PER_RUN // length, SQUARES_PER_RUN // length**2))


def _buckets(rows: Sequence[Row], limit: int) -> list[tuple[int, list[int]]]:
    """Rows by the bucket that holds them: (length, indices), shortest first."""
    found: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
        found.setdefault(padded_length(len(row.ids), limit), []).append(index)
    return sorted(found.items())
