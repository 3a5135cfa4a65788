"""The verb `export`: a model and its plugins -> a bundle, gated."""

from __future__ import annotations

import importlib.metadata
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import onnx_ir

import variator
from variator.errors import InputError, PluginError
from variator.exporters.flops import PART_KEY, count_flops, part_of
from variator.exporters.gate import PASSAGE, Case, compare, make_feeds, plain_runner, reference_outputs, save_cases
from variator.exporters.graph import Compressed, export_graph
from variator.files import directory_written_whole
from variator.toolkit.bundle import GATE_FILE, Bundle, Manifest, RatioEntry, list_files, write_manifest
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.plugin_file import Plugin, find_plugin, untrained_plugin
from variator.toolkit.plugin_format import PluginConfig, check_ratio
from variator.toolkit.weights import WeightStore

if TYPE_CHECKING:
    from collections.abc import Mapping

FLOPS_LENGTH = 128
"""Sequence length of the manifest's FLOPs."""


@dataclass(frozen=True)
class ExportSettings:
    """What to export.

    Args:
        ratios: Ratios beside 1, which is always included.
        plugins: Directory of plugin files; None looks among those shipped with the package.
        untrained: Make up plugins where none is found: for speed measurements only, and marked so everywhere.
        rank: Of made-up plugins.
        overwrite: Whether an existing bundle may be replaced.
    """

    ratios: tuple[int, ...]
    plugins: Path | None = None
    untrained: bool = False
    rank: int = 64
    overwrite: bool = False


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
    ratios = sorted({1, *map(check_ratio, settings.ratios)})
    if output.exists() and not settings.overwrite:
        raise InputError(f"{output} exists already", fix="choose another -o, or pass --overwrite")
    if output.exists() and not (output / "manifest.json").exists():
        raise InputError(f"{output} exists and is not a bundle, so it is not overwritten", fix="choose another -o")
    on_stage("loading the model")
    backbone = model if isinstance(model, Backbone) else load_backbone(model, task, name)
    plugins = {ratio: _plugin_for(backbone, ratio, settings) for ratio in ratios if ratio > 1}
    with directory_written_whole(output, replace=settings.overwrite) as directory:
        entries = _export_ratios(backbone, plugins, ratios, directory, on_stage)
        backbone.tokenizer.save_pretrained(directory)
        for file in directory.iterdir():  # a tokenizer may bring folders or code; a bundle is flat data
            if file.is_dir():
                shutil.rmtree(file)
        on_stage("writing the manifest")
        write_manifest(directory, _manifest(backbone, entries, directory))
    return Bundle.open(output)


def _plugin_for(backbone: Backbone, ratio: int, settings: ExportSettings) -> Plugin:
    plugin = find_plugin(backbone, ratio, settings.plugins)
    if plugin is None and settings.untrained:
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


def _export_ratios(
    backbone: Backbone,
    plugins: Mapping[int, Plugin],
    ratios: Sequence[int],
    directory: Path,
    on_stage: Callable[[str], None],
) -> dict[int, RatioEntry]:
    store = WeightStore(directory)
    tokens = backbone.tokenizer(PASSAGE, truncation=True, max_length=backbone.max_length)["input_ids"]
    text = [token for token in tokens if token != backbone.original.config.pad_token_id]
    feeds = make_feeds(backbone.inputs, backbone.config.vocabulary, backbone.max_length, text)
    cases = [Case(feed, {}) for feed in feeds]
    entries: dict[int, RatioEntry] = {}
    for ratio in ratios:
        plugin = plugins.get(ratio)
        on_stage(f"exporting ratio {ratio}")
        graph = directory / f"ratio-{ratio}.onnx"
        _write_graph(backbone, plugin, store, graph, "backbone.data" if ratio == 1 else f"plugin-{ratio}.data")
        on_stage(f"checking ratio {ratio} against PyTorch")
        module = Compressed(backbone.model, plugin).eval()
        for case in cases:
            case.expected[ratio] = reference_outputs(backbone, module, case.feed)
        error = compare(graph.name, "fp32", cases, ratio, plain_runner(graph))
        flops = _flops(graph, entries)
        entries[ratio] = _entry(graph.name, plugin, flops, error)
    save_cases(cases, directory / GATE_FILE)
    return entries


def _write_graph(backbone: Backbone, plugin: Plugin | None, store: WeightStore, graph: Path, file: str) -> None:
    model = export_graph(backbone, plugin)
    for node in model.graph:
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes", "")
        node.metadata_props.clear()
        node.metadata_props[PART_KEY] = part_of(scopes.strip("[]").replace("'", "").split(", "))
    model.metadata_props.clear()
    model.producer_name, model.producer_version = "variator", variator.__version__
    for value in model.graph.initializers.values():
        value.metadata_props.clear()
    store.externalise(model, file)
    onnx_ir.save(model, graph)


def _flops(graph: Path, entries: Mapping[int, RatioEntry]) -> dict[str, float]:
    flops = count_flops(graph, FLOPS_LENGTH)
    whole = entries[1].flops["total"] if entries else flops["total"]
    return {"batch": 1, "sequence": FLOPS_LENGTH, **flops, "saved": round(1 - flops["total"] / whole, 6)}


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
        training=plugin.training,
    )


def _manifest(backbone: Backbone, entries: dict[int, RatioEntry], directory: Path) -> Manifest:
    packages = ("torch", "transformers", "onnx", "onnxscript")
    return Manifest(
        versions={"variator": variator.__version__, **{name: importlib.metadata.version(name) for name in packages}},
        model=backbone.id,
        family=backbone.family,
        task=backbone.task,
        pooling=backbone.pooling,
        hidden_size=backbone.config.hidden_size,
        layers=backbone.config.layers,
        vocabulary=backbone.config.vocabulary,
        parameters=sum(tensor.numel() for tensor in backbone.model.parameters()),
        max_length=backbone.max_length,
        precision="fp32",
        inputs=list(backbone.inputs),
        outputs=list(backbone.outputs),
        backbone=backbone.fingerprint,
        real=backbone.real,
        ratios=entries,
        files=list_files(directory),
    )
