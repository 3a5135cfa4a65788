"""The verb `triton`: a bundle with its built engines -> a model repository of Triton Inference Server.

Nothing is guessed: platforms, shapes, profiles and precisions are those of the engines' records and graphs. Each model
has its version in a directory whose number is a hash of what is in it, complete before any configuration names it; so
a server that loads the model again goes over to it while the old one still answers.
"""

from __future__ import annotations

import filecmp
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator.engines.backends import BACKENDS, check_name
from variator.engines.base import CpuBackend
from variator.engines.built import (
    ENGINE_FILE,
    LATENCY_FILE,
    BuiltEngine,
    asked_for,
    engine_directories,
    fastest,
    graphs_hash,
    read_record,
)
from variator.engines.latency import LatencyTable
from variator.engines.profiles import Shape, parse_profiles
from variator.errors import EngineError, InputError
from variator.exporters.triton_config import (
    MARK,
    WARM_LENGTH,
    Model,
    Tensor,
    TritonSettings,
    config_of,
    ensemble_of,
    most_rows_of_all,
    output_of,
    protobuf,
    ratio_output,
    read_config,
    runtime_inputs,
    text_inputs,
    text_of,
    warm_up_files,
)
from variator.files import (
    alone,
    directory_written_whole,
    disk_errors,
    inside,
    sha256_of,
    sha256_of_json,
    write_atomically,
)
from variator.serving.triton_model import BUNDLE
from variator.toolkit.bundle import MANIFEST, SHARED, Bundle
from variator.toolkit.plugin_format import Key

RUNTIME, TOKENS = "variator", "variator-tokens"
"""Names of the model that embeds the runtime, and of the one that only tokenises."""

TEXT_SUFFIX = "-text"
"""Of the ensemble that puts the front before an engine."""

CONFIG, CPU_CONFIG = "config.pbtxt", "configs/cpu.pbtxt"
"""What Triton reads, and what it reads with `--model-config-name=cpu`."""

PLATFORMS = {
    "tensorrt": "tensorrt_plan",
    "onnxruntime": "onnxruntime_onnx",
    "onnxruntime-cuda": "onnxruntime_onnx",
}
"""Engines that Triton has a backend for; all others run in `RUNTIME` alone."""

FILES = {"tensorrt_plan": "model.plan", "onnxruntime_onnx": "model.onnx"}
PYTHON = """from variator.serving.triton_model import {name} as TritonPythonModel

__all__ = ["TritonPythonModel"]
"""
VERSION_DIGITS = 12
"""Of the hash, in a version's number: it fits wherever a number is read as a double."""


@dataclass(frozen=True)
class TritonRepository:
    """What was written.

    Args:
        version: Of every model.
        models: By name: platform, engine, precision and ratio.
        left_out: Why an engine or a model of it is not there.
        kept: Models in the repository that were not written now.
    """

    path: Path
    version: int
    models: dict[str, dict[str, str]]
    left_out: dict[str, str]
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Written:
    """A model as it goes to disk.

    Args:
        configs: By file name.
        version_files: In the version's directory: where each comes from, or a text.
    """

    model: Model
    configs: Mapping[str, Any]
    about: dict[str, str]
    version_files: Mapping[str, Path | str]
    warm_up: Mapping[str, bytes]


def triton(
    bundle: Bundle | Path | str,
    output: Path,
    engine: str = "auto",
    precision: str | None = None,
    settings: TritonSettings = TritonSettings(),  # noqa: B008 - frozen
) -> TritonRepository:
    """Write a model repository, or a new version into one that is there.

    The version that was served before stays beside the new one, to go back to; older ones go.

    Args:
        engine: Whose built engines to serve; `auto` takes all. int8 and fp8 only where something names them.

    Raises:
        BundleError, EngineError, InputError: If the bundle or an engine is damaged, or none fits.
        VariatorError: If the disk refuses; what was there before stays as it was.
    """
    bundle = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    protobuf()
    _check_task(bundle)
    settings.check(bundle.ratios)
    bundle.verify()
    engines, left_out = _engines(bundle, engine, precision)
    version = _version(bundle, engines)
    written = _models(bundle, engines, settings, version, left_out)
    if not written:
        raise EngineError(
            f"nothing of {bundle.path} can be served by Triton: {_reasons(left_out)}",
            valid="an engine that was built and checked",
            fix=f"variator build {bundle.path}",
        )
    output = output.absolute()
    with alone(output):
        _check_ours(output, [one.model.name for one in written])
        new = not output.exists()
        place = output if new else output.with_name(f".{output.name}.next")
        with directory_written_whole(place, replace=not new) as partial:
            for one in written:
                _write_model(one, partial / one.model.name, version)
            _verify(partial / RUNTIME / str(version) / BUNDLE)
        if not new:
            _publish(place, output, version)
    names = [one.model.name for one in written]
    kept = sorted(path.name for path in output.iterdir() if path.is_dir() and path.name not in names)
    return TritonRepository(output, version, {one.model.name: one.about for one in written}, left_out, kept)


def _check_task(bundle: Bundle) -> None:
    manifest = bundle.manifest
    if manifest.decoder is not None or manifest.picture is not None:
        what = "a decoder" if manifest.decoder else "pictures"
        raise InputError(f"Triton models of a bundle with {what}", valid="encoders of texts")


def _engines(bundle: Bundle, engine: str, precision: str | None) -> tuple[list[BuiltEngine], dict[str, str]]:
    """Built engines that belong to this export, whole and checked; and why others are left out."""
    check_name(engine)
    found, left_out = [], {}
    for directory, name, built_in in engine_directories(bundle):
        if not asked_for(name, built_in, engine, precision):
            continue
        try:
            built = BuiltEngine(directory, read_record(directory))
            built.verify()
        except EngineError as damage:
            left_out[f"{name} {built_in}"] = damage.what
            continue
        if built.record.parts.get("graphs") != graphs_hash(bundle):
            left_out[f"{name} {built_in}"] = "it was built from another export"
        elif not built.record.gated:
            left_out[f"{name} {built_in}"] = "it was built ahead of time and not checked; `variator build` does that"
        else:
            found.append(built)
    if not found:
        asked = f"--engine {engine}" + (f" --precision {precision}" if precision else "")
        raise EngineError(
            f"no engine is built for {bundle.path} that fits {asked}" + (f": {_reasons(left_out)}" if left_out else ""),
            fix=f"variator build {bundle.path} {asked}",
        )
    return found, left_out


def _reasons(left_out: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {why}" for name, why in left_out.items())


def _version(bundle: Bundle, engines: Sequence[BuiltEngine]) -> int:
    """A positive number for what is served: the bundle, its engines and how fast they are."""
    files = [bundle.path / MANIFEST]
    for built in engines:
        files += [built.directory / ENGINE_FILE, built.directory / LATENCY_FILE]
    parts = {str(path.relative_to(bundle.path)): sha256_of(path) for path in files if path.exists()}
    return int(sha256_of_json(parts)[:VERSION_DIGITS], 16) or 1


def _models(
    bundle: Bundle,
    engines: Sequence[BuiltEngine],
    settings: TritonSettings,
    version: int,
    left_out: dict[str, str],
) -> list[_Written]:
    """All models; adds to `left_out`."""
    runtime = _runtime_model(bundle, engines, settings, version, left_out)
    front = _front_model(bundle, settings, version)
    written = [runtime] if runtime is not None else []
    fronted = False
    for built in engines:
        for ratio in bundle.ratios:
            name = f"{built.record.backend}-{built.record.precision}-ratio-{ratio}"
            why = _why_not_native(bundle, built, ratio)
            if not why:
                try:
                    one = _engine_model(bundle, built, ratio, name, settings, version)
                except EngineError as error:
                    why = error.what
            if why:
                left_out[name] = why
                continue
            written += [one, _ensemble(front.model, one, version)]
            fronted = True
    return [*written, front] if fronted else written


def _why_not_native(bundle: Bundle, built: BuiltEngine, ratio: Key) -> str:
    """Why a ratio is no Triton model of its own; empty if it is."""
    if built.record.backend not in PLATFORMS:
        return f"Triton runs no {built.record.backend}; {RUNTIME} does"
    if bundle.manifest.layout == SHARED and (ratio != 1 or (bundle.manifest.shared and bundle.manifest.shared.head)):
        return f"its plugin is an input of the shared graph; {RUNTIME} brings it along"
    return ""


def _runtime_model(
    bundle: Bundle,
    engines: Sequence[BuiltEngine],
    settings: TritonSettings,
    version: int,
    left_out: dict[str, str],
) -> _Written | None:
    """The model that embeds the runtime, if the latency of an engine is known."""
    known = [built for built in engines if _has_table(built)]
    if not known:
        left_out[RUNTIME] = f"no latency was measured: variator bench {bundle.path} --calibrate"
        return None
    on_cpu = [built for built in known if isinstance(BACKENDS[built.record.backend], CpuBackend)]
    on_gpu = [built for built in known if built not in on_cpu]
    chosen = fastest(on_gpu or on_cpu)
    variants = {CONFIG: chosen} | ({CPU_CONFIG: fastest(on_cpu)} if on_cpu else {})
    models = {name: _runtime_variant(bundle, built, settings) for name, built in variants.items()}
    configs = {name: config_of(model, settings, version) for name, model in models.items()}
    files: dict[str, Path | str] = {"model.py": PYTHON.format(name="VariatorModel")}
    files |= _bundle_files(bundle, list({id(one): one for one in variants.values()}.values()))
    about = {"platform": "python", "engine": chosen.record.backend, "precision": chosen.record.precision}
    model = models[CONFIG]
    return _Written(model, configs, {**about, "ratio": str(settings.ratio)}, files, warm_up_files(model))


def _runtime_variant(bundle: Bundle, built: BuiltEngine, settings: TritonSettings) -> Model:
    outputs = [output_of(name, bundle.manifest) for name in bundle.manifest.outputs]
    parameters = {
        "engine": built.record.backend,
        "precision": built.record.precision,
        "ratio": str(settings.ratio),
        "slo_ms": str(settings.slo_ms),
        "patience_ms": str(settings.patience_ms),
        "max_queue": str(settings.max_queue),
        "max_rows": str(settings.max_rows),
        "threads": str(settings.threads),
        "policy": settings.policy,
    }
    inputs = runtime_inputs()
    return Model(
        RUNTIME,
        "",
        inputs,
        (*outputs, ratio_output()),
        settings.max_rows,
        not isinstance(BACKENDS[built.record.backend], CpuBackend),
        optional=tuple(tensor.name for tensor in inputs),
        parameters=tuple(parameters.items()),
    )


def _has_table(built: BuiltEngine) -> bool:
    try:
        table = LatencyTable.from_json((built.directory / LATENCY_FILE).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, EngineError):
        return False
    return table.key == built.record.key


def _front_model(bundle: Bundle, settings: TritonSettings, version: int) -> _Written:
    """The model that only tokenises."""
    outputs = tuple(Tensor(name, "INT64", (-1,)) for name in bundle.manifest.inputs)
    inputs = text_inputs()
    model = Model(TOKENS, "", inputs, outputs, settings.max_rows, False, optional=(inputs[1].name,))
    files: dict[str, Path | str] = {"model.py": PYTHON.format(name="TokensModel")}
    files |= {f"{BUNDLE}/{name}": inside(bundle.path, name) for name in (MANIFEST, "tokenizer.json")}
    config = config_of(model, settings, version)
    configs = {CONFIG: config, CPU_CONFIG: config}
    return _Written(model, configs, {"platform": "python"}, files, warm_up_files(model))


def _ensemble(front: Model, engine: _Written, version: int) -> _Written:
    name = engine.model.name + TEXT_SUFFIX
    config = ensemble_of(name, front, engine.model, version)
    model = Model(name, "ensemble", front.inputs, engine.model.outputs, config.max_batch_size, False)
    configs = dict.fromkeys(engine.configs, config)
    return _Written(model, configs, {**engine.about, "platform": "ensemble"}, {".keep": ""}, {})


def _engine_model(
    bundle: Bundle, built: BuiltEngine, ratio: Key, name: str, settings: TritonSettings, version: int
) -> _Written:
    """A ratio of an engine as a model of Triton's own backends."""
    record, graph = built.record, bundle.graph(ratio)
    platform = PLATFORMS[record.backend]
    gpu = not isinstance(BACKENDS[record.backend], CpuBackend)
    artefacts = BACKENDS[record.backend].artefacts(graph.name, record.files)
    first = artefacts[0]
    # A plan has the inputs and outputs of the graph that it was made from.
    inputs, outputs = _tensors(graph if platform == "tensorrt_plan" else built.directory / first, bundle)
    profiles = (
        parse_profiles([record.choices["profiles"]], bundle.manifest.max_length) if "profiles" in record.choices else ()
    )
    max_batch = most_rows_of_all(profiles) if profiles else settings.max_rows
    shapes = {Shape(min(p.optimum.batch, max_batch), p.optimum.length) for p in profiles}
    model = Model(
        name,
        platform,
        inputs,
        outputs,
        max_batch,
        gpu,
        profiles,
        tuple(sorted(shapes)) or (Shape(1, min(WARM_LENGTH, bundle.manifest.max_length)),),
        parameters=_backend_parameters(record.backend, settings),
        optimised=record.backend == "onnxruntime",
    )
    files: dict[str, Path | str] = {FILES[platform]: inside(built.directory, first)}
    files |= {other: inside(built.directory, other) for other in artefacts[1:]}
    config = config_of(model, settings, version)
    about = {"platform": platform, "engine": record.backend, "precision": record.precision, "ratio": str(ratio)}
    configs = {CONFIG: config} | ({} if gpu else {CPU_CONFIG: config})
    return _Written(model, configs, about, files, warm_up_files(model))


def _backend_parameters(backend: str, settings: TritonSettings) -> tuple[tuple[str, str], ...]:
    """What our own sessions are made with, as far as Triton's ONNX Runtime takes it."""
    if backend == "onnxruntime":
        return ("intra_op_thread_count", str(settings.threads)), ("enable_mem_pattern", "0")
    return (("arena_extend_strategy", "1"),) if backend == "onnxruntime-cuda" else ()


def _tensors(graph: Path, bundle: Bundle) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Inputs and outputs of a graph, as they are in its file.

    Raises:
        EngineError: If it has others than the bundle says, or of a kind that is not served.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False).graph
    kinds = {onnx.TensorProto.INT64: "INT64", onnx.TensorProto.FLOAT: "FP32"}
    inputs, outputs = (
        tuple(
            Tensor(
                value.name,
                kinds.get(value.type.tensor_type.elem_type, "?"),
                tuple(size.dim_value or -1 for size in value.type.tensor_type.shape.dim)[1:],
            )
            for value in values
        )
        for values in (model.input, model.output)
    )
    manifest = bundle.manifest
    names = [tensor.name for tensor in (*inputs, *outputs)]
    if names != [*manifest.inputs, *manifest.outputs] or any(one.kind == "?" for one in (*inputs, *outputs)):
        raise EngineError(
            f"{graph.name} has {', '.join(names)}", valid=", ".join([*manifest.inputs, *manifest.outputs])
        )
    # Graphs that were optimised may have lost sizes; the bundle knows those of its outputs.
    return inputs, tuple(output_of(one.name, manifest) if -1 in one.dims else one for one in outputs)


def _bundle_files(bundle: Bundle, engines: Sequence[BuiltEngine]) -> dict[str, Path]:
    """The files of a bundle with some of its engines."""
    names = [MANIFEST, *bundle.manifest.files]
    for built in engines:
        own = (ENGINE_FILE, LATENCY_FILE, *built.record.files)
        names += [f"engines/{built.directory.name}/{name}" for name in own]
    return {f"{BUNDLE}/{name}": inside(bundle.path, name) for name in names}


def _check_ours(output: Path, names: Sequence[str]) -> None:
    """Raise `InputError` if a model of one of these names is somebody else's."""
    for name in names:
        place = output / name
        if place.exists() and _served(place) is None:
            raise InputError(f"{place} is there and was not written by `variator triton`", fix="another -o")


def _served(place: Path) -> int | None:
    """The version that a model of ours serves."""
    try:
        config = read_config((place / CONFIG).read_text(encoding="utf-8"), str(place / CONFIG))
    except (OSError, UnicodeDecodeError, InputError):
        return None
    ours = MARK in config.parameters
    return int(config.version_policy.specific.versions[0]) if ours else None


def _write_model(written: _Written, directory: Path, version: int) -> None:
    """A model with its one version, into a directory that nobody sees yet."""
    for name, source in written.version_files.items():
        target = directory / str(version) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(source, str):
            target.write_text(source, encoding="utf-8")
        else:
            _link(source, target)
    for name, config in written.configs.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text_of(config), encoding="utf-8")
    for name, data in written.warm_up.items():
        (directory / "warmup").mkdir(exist_ok=True)
        (directory / "warmup" / name).write_bytes(data)


def _link(source: Path, target: Path) -> None:
    """The same file under another name where that is possible, else a copy; never a link that leads out."""
    source = source.resolve()
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def _verify(place: Path) -> None:
    """Read a written bundle back."""
    if not place.exists():
        return
    bundle = Bundle.open(place)
    bundle.verify()
    for directory, _, _ in engine_directories(bundle):
        BuiltEngine(directory, read_record(directory)).verify()


def _publish(new: Path, output: Path, version: int) -> None:
    """Move what is complete into a repository that may be served meanwhile: configurations last.

    Raises:
        VariatorError: If the disk refuses; configurations that were not replaced yet still name whole versions.
    """
    with disk_errors(output):
        for model in sorted(new.iterdir()):
            target = output / model.name
            if not target.exists():
                model.rename(target)
                continue
            before, place = _served(target), target / str(version)
            if place.exists() and not _alike(model / str(version), place):
                _remove(place)
            if not place.exists():
                (model / str(version)).rename(place)
            for part in sorted(
                path for path in model.rglob("*") if path.is_file() and path.parent.name != str(version)
            ):
                if str(version) not in part.relative_to(model).parts and part.name != CONFIG:
                    (target / part.relative_to(model)).parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(target / part.relative_to(model), part.read_bytes())
            if not (model / CPU_CONFIG).exists():
                (target / CPU_CONFIG).unlink(missing_ok=True)
            write_atomically(target / CONFIG, (model / CONFIG).read_bytes())
            if before != version:  # else the one before is still the one to go back to
                _forget(target, {version, before})
        shutil.rmtree(new, ignore_errors=True)


def _forget(model: Path, keep: set[int | None]) -> None:
    """Remove versions that are neither served nor were served last."""
    for path in model.iterdir():
        if path.is_dir() and path.name.isdecimal() and int(path.name) not in keep:
            _remove(path)


def _remove(version: Path) -> None:
    """A version, which is never there in part."""
    gone = version.with_name(f".{version.name}.gone")
    shutil.rmtree(gone, ignore_errors=True)
    version.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def _alike(one: Path, other: Path) -> bool:
    """Whether a directory has the files of another, byte by byte."""
    files, others = ({path.relative_to(place) for path in place.rglob("*") if path.is_file()} for place in (one, other))
    return files <= others and all(
        (one / name).samefile(other / name) or filecmp.cmp(one / name, other / name, shallow=False) for name in files
    )
