"""The verb `export`: a model and its plugins -> a bundle, gated."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir

import variator
from variator.errors import InputError, PluginError
from variator.exporters.flops import PART_KEY, count_flops, counted_flops, part_of
from variator.exporters.gate import (
    PASSAGE,
    Case,
    add_logits,
    compare,
    decoder_cases,
    gate_head,
    make_feeds,
    picture_feeds,
    plain_runner,
    reference_outputs,
    save_cases,
)
from variator.exporters.graph import Compressed, export_decoder, export_graph, export_shared
from variator.exporters.low_memory import check_in_pieces, expect, expect_of_decoder, fill
from variator.exporters.pieces import LAYER_KEY
from variator.exporters.precision import check_precision, narrow, widened
from variator.files import directory_resumed, directory_written_whole
from variator.toolkit.bundle import (
    DECODER_GATE_FILE,
    DECODER_GRAPH,
    GATE_FILE,
    LAYOUTS,
    PER_RATIO,
    SHARED,
    SHARED_GRAPH,
    Bundle,
    DecoderEntry,
    Manifest,
    RatioEntry,
    SharedProfile,
    list_files,
    write_manifest,
)
from variator.toolkit.checkpoint import Backbone, load_backbone, stream_backbone
from variator.toolkit.decoder import Decoder, cache_width
from variator.toolkit.plugin_file import Plugin, find_plugin, heads_agree, save_plugin, untrained_plugin
from variator.toolkit.plugin_format import (
    MAX_RATIO,
    PLUGIN_FORMAT,
    Key,
    PluginConfig,
    in_order,
    parse_key,
    setting_name,
)
from variator.toolkit.stack import Inputs, graph_inputs, neutral
from variator.toolkit.weights import WeightStore

if TYPE_CHECKING:
    from collections.abc import Mapping

FLOPS_LENGTH = 128
"""Sequence length of the manifest's FLOPs."""

PACKAGES = ("torch", "transformers", "onnx", "onnxscript")
"""Whose versions a bundle records."""

JOURNAL = "weights.jsonl"
"""Beside a bundle that is being exported with low memory: what has been written of its weights."""

FLOPS_BEFORE = 16
"""Tokens in front of the one whose FLOPs the manifest states for a decoder."""

MAX_RANK, MAX_CLASSES = 256, 1024
"""What a shared graph's engines have to be ready for, if no plugin of the export is larger."""


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Args:
        ratios: Ratios, or names of other settings, beside 1, which is always included.
        plugins: Directory of plugin files; None looks among those shipped with the package.
        untrained: Make up plugins where none is found: for speed measurements only, and marked so everywhere.
        rank: Of made-up plugins.
        overwrite: Whether an existing bundle may be replaced.
        layout: `per-ratio`, one graph per ratio, or `shared`, one graph that takes its plugin as inputs.
        precision: That the graphs are written in: fp32 for every engine, fp16 or bf16 for those of a GPU alone.
        low_memory: Read weights one by one and check layer by layer, for a model that is larger than memory. What was
            killed goes on where it stopped.
    """

    ratios: tuple[Key, ...]
    plugins: Path | None = None
    untrained: bool = False
    rank: int = 64
    overwrite: bool = False
    layout: str = PER_RATIO
    precision: str = "fp32"
    low_memory: bool = False


def export(
    model: str | Backbone,
    output: Path | str,
    settings: ExportSettings,
    task: str | None = None,
    name: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Bundle:
    """Export a model at ratio 1 and the asked ratios into a bundle.

    Args:
        model: Directory, hub id, or a loaded backbone.
        output: The bundle's directory; it appears only when everything has passed the gate.
        task, name: As for `load_backbone`.
        on_stage: Told what is being done.

    Raises:
        InputError, BackboneError, PluginError: Before anything is written.
        GateError: If a graph's numbers differ from PyTorch's.
    """
    output = Path(output)
    ratios = in_order({1, *map(parse_key, settings.ratios)})
    if settings.layout not in LAYOUTS:
        raise InputError(f"unknown layout {settings.layout!r}", valid=", ".join(LAYOUTS))
    check_precision(settings.precision)
    if output.exists() and not settings.overwrite:
        raise InputError(f"{output} exists already", fix="choose another -o, or pass --overwrite")
    if output.exists() and not (output / "manifest.json").exists():
        raise InputError(f"{output} exists and is not a bundle, so it is not overwritten", fix="choose another -o")
    on_stage("loading the model")
    if settings.low_memory and (isinstance(model, Backbone) or settings.layout != PER_RATIO):
        raise InputError("low memory with a loaded backbone or another layout", valid=f"a directory, {PER_RATIO}")
    load = stream_backbone if settings.low_memory else load_backbone
    backbone = model if isinstance(model, Backbone) else load(model, task, name)
    if settings.layout == SHARED and (backbone.config.picture or backbone.decoder):
        raise InputError(
            f"layout {SHARED} for a model that {'reads pictures' if backbone.config.picture else 'writes texts'}",
            valid=f"--layout {PER_RATIO}",
        )
    plugins = {ratio: _plugin_for(backbone, ratio, settings) for ratio in ratios if ratio != 1}
    for plugin in plugins.values():
        backbone.config.check(plugin.config)
    if backbone.decoder is not None:
        _ = backbone.special  # else it would fail when all else is done
        if backbone.unapplied:
            told = ", ".join(f"{name} {value!r}" for name, value in backbone.unapplied.items())
            warnings.warn(
                f"{backbone.id} asks for {told} when texts are generated, which a bundle does not do by itself: beams "
                "and a length penalty are a request's, the others are not computed",
                stacklevel=2,
            )
    profile = _profile(backbone, plugins) if settings.layout == SHARED else None
    for plugin in plugins.values():
        if plugin.head is not None and (profile is None or not profile.head):
            raise PluginError(
                f"the ratio-{plugin.config.key} plugin carries a task head, which a {settings.layout} bundle of task "
                f"{backbone.task} has no place for",
                valid="--layout shared and task embed",
            )
    with _place(output, backbone, plugins, settings) as (directory, store):
        entries = _export_ratios(backbone, plugins, ratios, profile, settings.precision, store, directory, on_stage)
        decoder = None
        if backbone.decoder is not None:
            decoder = _export_decoder(backbone, backbone.decoder, settings.precision, store, directory, on_stage)
        if backbone.tokenizer is not None:
            _save_tokenizer(backbone.tokenizer, directory)
        for file in directory.iterdir():  # a tokenizer may bring folders or code; a bundle is flat data
            if file.is_dir():
                shutil.rmtree(file)
        on_stage("writing the manifest")
        manifest = _manifest(backbone, entries, profile, settings.precision, directory)
        write_manifest(directory, replace(manifest, decoder=decoder))
    return Bundle.open(output)


@contextlib.contextmanager
def _place(
    output: Path, backbone: Backbone, plugins: Mapping[Key, Plugin], settings: ExportSettings
) -> Iterator[tuple[Path, WeightStore]]:
    """Where a bundle is written, and its weights: renamed to `output` when it is whole."""
    if backbone.stream is None:
        with directory_written_whole(output, replace=settings.overwrite) as directory:
            yield directory, WeightStore(directory)
        return
    made_from = [
        variator.__version__,
        backbone.fingerprint,
        backbone.task,
        backbone.id,
        settings.precision,
        [(str(key), plugin.digest) for key, plugin in plugins.items()],
        backbone.stream.state,
        {name: importlib.metadata.version(name) for name in PACKAGES},
    ]
    with directory_resumed(output, made_from, replace=settings.overwrite) as (directory, beside):
        for path in directory.iterdir():  # all but weights is made again
            if path.suffix != ".data":
                path.unlink()
        yield directory, WeightStore(directory, beside / JOURNAL)


def _save_tokenizer(tokenizer: Any, directory: Path) -> None:
    try:
        tokenizer.save_pretrained(directory)
    except Exception as error:  # the system's errors come as plain ones out of Rust, their number in the text
        number = re.search(r"\(os error (\d+)\)", str(error))
        if isinstance(error, OSError) or number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def _plugin_for(backbone: Backbone, ratio: Key, settings: ExportSettings) -> Plugin:
    plugin = find_plugin(backbone, ratio, settings.plugins)
    if plugin is None and settings.untrained and isinstance(ratio, int):
        return untrained_plugin(backbone, PluginConfig(ratio, settings.rank))
    if plugin is None:
        place = f"in {settings.plugins}" if settings.plugins else "among those shipped with variator"
        raise PluginError(
            f"there is no plugin of ratio {ratio} for {backbone.id} {place}",
            valid="a directory with ratio-<k>.safetensors files trained for this backbone (--plugin DIR)",
            fix=f"variator train {backbone.source} --ratio {ratio} --corpus FILE -o DIR; "
            "or --untrained to measure speed only",
        )
    return plugin


def _profile(backbone: Backbone, plugins: Mapping[Key, Plugin]) -> SharedProfile:
    """What the shared graph will take: these plugins, and later ones like them."""
    for key, plugin in plugins.items():
        plugin.check_plain(f"setting {key!r}")
    activations = sorted({plugin.config.activation for plugin in plugins.values()}) or ["tanh"]
    if len(activations) > 1:
        raise PluginError(
            f"the plugins have different activations: {', '.join(activations)}",
            valid="one activation, it is built into the shared graph",
            fix="--layout per-ratio, or train them with the same --activation",
        )
    rank = max([MAX_RANK, *(plugin.config.rank for plugin in plugins.values())])
    classes = max([MAX_CLASSES, *(len(plugin.head.bias) for plugin in plugins.values() if plugin.head)])
    return SharedProfile(PLUGIN_FORMAT, activations[0], MAX_RATIO, rank, classes, backbone.task == "embed")


def _export_ratios(
    backbone: Backbone,
    plugins: Mapping[Key, Plugin],
    ratios: Sequence[Key],
    profile: SharedProfile | None,
    precision: str,
    store: WeightStore,
    directory: Path,
    on_stage: Callable[[str], None],
) -> dict[Key, RatioEntry]:
    if profile is not None:
        _write_shared(backbone, profile, precision, store, directory, on_stage)
    cases = _cases(backbone)
    hidden = backbone.config.hidden_size
    length = backbone.max_length if backbone.config.picture else FLOPS_LENGTH
    head = gate_head(hidden) if profile and profile.head else None
    entries: dict[Key, RatioEntry] = {}
    if backbone.stream is not None:
        on_stage("running the model in PyTorch, layer by layer")
        expect(backbone, {ratio: plugins.get(ratio) for ratio in ratios}, cases, _told(on_stage, "PyTorch"))
    for ratio in ratios:
        plugin = plugins.get(ratio)
        graph = directory / (SHARED_GRAPH if plugin and profile else f"{setting_name(ratio)}.onnx")
        if profile is None:
            on_stage(f"exporting ratio {ratio}")
            _write_graph(export_graph(backbone, plugin), backbone, precision, store, graph, _data_file(ratio))
        beside = graph_inputs(profile, hidden, plugin, head)
        on_stage(f"checking ratio {ratio} against PyTorch")
        own = graph_inputs(profile, hidden, plugin, plugin.head if plugin else None)
        if backbone.stream is not None:
            tokens = {name: np.full((1, FLOPS_LENGTH), name == "attention_mask", np.int64) for name in backbone.inputs}
            error, (counted,) = check_in_pieces(
                graph, precision, cases, ratio, [tokens], _told(on_stage, f"ratio {ratio}")
            )
        else:
            module = Compressed(backbone.model, plugin).eval()
            for case in cases:
                case.expected[ratio] = reference_outputs(backbone, module, case.feed)
                if head is not None:
                    add_logits(case.expected[ratio], head)
            with _runnable(graph, precision) as path:
                error = _gate(path, precision, cases, ratio, beside)
                counted = count_flops(path, length, own)
        flops = _flops(counted, length, entries)
        if ratio == 1 and profile is not None:  # exact without its plugin, too
            with _runnable(directory / SHARED_GRAPH, precision) as path:
                _gate(path, precision, cases, 1, beside | neutral(backbone.config.layers, hidden))
        bring = [plugin] if plugin else list(plugins.values())
        with_head = bool(bring) and bring[0].head is not None and heads_agree(bring)
        file = save_plugin(plugin, directory).name if plugin and profile else ""
        entries[ratio] = replace(_entry(graph.name, plugin, flops, error), plugin=file, head=with_head)
    save_cases(cases, directory / GATE_FILE)
    return entries


def _data_file(ratio: Key) -> str:
    return "backbone.data" if ratio == 1 else f"plugin-{ratio}.data"


def _write_shared(
    backbone: Backbone,
    profile: SharedProfile,
    precision: str,
    store: WeightStore,
    directory: Path,
    on_stage: Callable[[str], None],
) -> None:
    """The two graphs of a shared layout: all ratios above 1, and ratio 1, which need not pay for them."""
    for name, compressed in (("ratio-1.onnx", False), (SHARED_GRAPH, True)):
        on_stage(f"exporting {name}")
        _write_graph(
            export_shared(backbone, profile, compressed), backbone, precision, store, directory / name, _data_file(1)
        )


def _export_decoder(
    backbone: Backbone,
    decoder: Decoder,
    precision: str,
    store: WeightStore,
    directory: Path,
    on_stage: Callable[[str], None],
) -> DecoderEntry:
    """The one decoder of all ratios, over the same weights."""
    on_stage("exporting the decoder")
    graph = directory / DECODER_GRAPH
    _write_graph(export_decoder(decoder), backbone, precision, store, graph, _data_file(1))
    on_stage("checking the decoder against PyTorch")
    width = cache_width(decoder.config)
    first, later = (
        _decoder_feed(decoder, width, *tokens) for tokens in ((FLOPS_LENGTH, 0, 0), (0, FLOPS_LENGTH, FLOPS_BEFORE))
    )
    if backbone.stream is not None:
        cases = expect_of_decoder(backbone, decoder, _told(on_stage, "PyTorch's decoder"))
        error, (flops, read) = check_in_pieces(
            graph, precision, cases, 1, [later, first], _told(on_stage, "the decoder")
        )
    else:
        cases = decoder_cases(backbone)
        with _runnable(graph, precision) as path:
            error = _gate(path, precision, cases, 1, {})
            flops, read = counted_flops(path, later), counted_flops(path, first)
    save_cases(cases, directory / DECODER_GATE_FILE)
    special = backbone.special
    shared = {id(parameter) for parameter in backbone.model.parameters()}
    return DecoderEntry(
        DECODER_GRAPH,
        decoder.config.layers,
        width,
        special.start,
        list(special.ends),
        special.pad,
        sum(parameter.numel() for parameter in decoder.parameters() if id(parameter) not in shared),
        {"source": FLOPS_LENGTH, "before": FLOPS_BEFORE, **flops, "first": read["total"]},
        error,
    )


def _decoder_feed(decoder: Decoder, width: int, new: int, known: int, before: int) -> dict[str, npt.NDArray[Any]]:
    """One token of one row, with so many tokens of the encoder that are new and known, and so many before it."""
    return {
        "input_ids": np.zeros((1, 1), np.int64),
        "lengths": np.array([new + known]),
        "hidden": np.zeros((1, new, decoder.config.hidden_size), np.float32),
        "cross": np.zeros((1, known, width), np.float32),
        "past": np.zeros((1, before, width), np.float32),
    }


def _cases(backbone: Backbone) -> list[Case]:
    if backbone.config.picture is not None:
        return [Case(feed, {}) for feed in picture_feeds(backbone.config.picture)]
    tokens = backbone.tokenizer(PASSAGE, truncation=True, max_length=backbone.max_length)["input_ids"]
    text = [token for token in tokens if token != backbone.checkpoint.pad_token_id]
    feeds = make_feeds(backbone.inputs, backbone.config.vocabulary, backbone.max_length, text)
    return [Case(feed, {}) for feed in feeds]


def _gate(graph: Path, precision: str, cases: Sequence[Case], ratio: Key, beside: Inputs) -> float:
    run = plain_runner(graph)
    return compare(graph.name, precision, cases, ratio, lambda feed: run({**beside, **feed}))


@contextlib.contextmanager
def _runnable(graph: Path, precision: str) -> Iterator[Path]:
    """A graph as ONNX Runtime runs it on a CPU: it has no bf16 there, so each result is rounded to it instead."""
    if precision != "bf16":
        yield graph
        return
    with tempfile.TemporaryDirectory() as scratch:
        wide = Path(scratch) / graph.name
        onnx_ir.save(widened(onnx_ir.load(graph)), wide, external_data=f"{graph.stem}.data")
        yield wide


def _write_graph(
    model: onnx_ir.Model, backbone: Backbone, precision: str, store: WeightStore, graph: Path, file: str
) -> None:
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        node.metadata_props[PART_KEY] = part_of(scopes.strip("[]").replace("'", "").split(", "))
        if layer := re.search(r"\blayers\.(\d+)", scopes):
            node.metadata_props[LAYER_KEY] = layer[1]
    if backbone.stream is not None:
        fill(model, backbone)
    narrow(model, precision)
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "variator", variator.__version__
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    store.externalise(model, file)
    if backbone.stream is not None:
        backbone.stream.release()
    onnx_ir.save(model, graph)


def _told(on_stage: Callable[[str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, of: on_stage(f"{what}: {done} of {of} pieces")


def _flops(flops: Mapping[str, int], length: int, entries: Mapping[Key, RatioEntry]) -> dict[str, float]:
    whole = entries[1].flops["total"] if entries else flops["total"]
    return {"batch": 1, "sequence": length, **flops, "saved": round(1 - flops["total"] / whole, 6)}


def _entry(graph: str, plugin: Plugin | None, flops: dict[str, float], error: float) -> RatioEntry:
    if plugin is None:
        return RatioEntry(graph, flops=flops, max_abs_error=error)
    return RatioEntry(
        graph,
        plugin_sha256=plugin.digest,
        plugin_parameters=plugin.parameters,
        rank=plugin.config.rank,
        activation=plugin.config.activation,
        untrained=plugin.untrained,
        flops=flops,
        max_abs_error=error,
        quality={
            f"{entry['split']} {metric}": value
            for entry in plugin.training.get("scores", [])
            for metric, value in entry["value"].items()
        },
        training=plugin.training,
        setting=plugin.config.header(),
    )


def _manifest(
    backbone: Backbone,
    entries: dict[Key, RatioEntry],
    profile: SharedProfile | None,
    precision: str,
    directory: Path,
) -> Manifest:
    return Manifest(
        versions={"variator": variator.__version__, **{name: importlib.metadata.version(name) for name in PACKAGES}},
        model=backbone.id,
        family=backbone.family,
        task=backbone.task,
        pooling=backbone.pooling,
        hidden_size=backbone.config.hidden_size,
        layers=backbone.config.layers,
        vocabulary=backbone.config.vocabulary,
        parameters=backbone.parameters,
        max_length=backbone.max_length,
        precision=precision,
        inputs=list(backbone.inputs),
        outputs=list(backbone.outputs),
        backbone=backbone.fingerprint,
        real=backbone.real,
        ratios=entries,
        files=list_files(directory),
        layout=PER_RATIO if profile is None else SHARED,
        shared=profile,
        labels=list(backbone.labels),
        picture=backbone.config.picture,
        prompt=backbone.prompt,
    )
