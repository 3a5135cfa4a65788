"""The command line: each command parses, calls one verb of the library, prints. No logic."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

import variator
from variator.errors import EngineError, InputError, VariatorError
from variator.toolkit.plugin_format import NAME, Key, parse_key

if TYPE_CHECKING:
    from variator.engines.seq2seq import Generation

GUIDE = """Make a frozen Transformer encoder faster with small plugins, and choose how much per request.

A plugin merges every k hidden vectors in front of a layer's feed-forward network and expands them behind it. k is
the ratio: 1 is the model itself, 2, 4 and 8 save more. The usual way:

\b
  variator export MODEL --ratio 2 --ratio 4 -o bundle    one graph per ratio, one backbone
  variator build  bundle                                 engines for this machine
  variator run    bundle --text "hello" --ratio 4        try it
  variator bench  bundle --html report.html              what it saves and costs
  variator replay bundle --trace gamma:16 --slo-ms 350   what it holds under load, at the ratio of the moment
  variator serve  bundle --slo-ms 350                    over HTTP

No plugin for your model yet? Train one first, minutes on a CPU, and export with --plugin plugins:

\b
  variator train  MODEL --ratio 4 --corpus texts.txt -o plugins
  variator eval   MODEL --task stsb --ratio 4 --plugin plugins

For a task with labels (mnli, qnli, qqp, rte, sst2, mrpc, squad): a backbone, then plugins adapted to both:

\b
  variator finetune MODEL --task sst2 -o tuned
  variator train    tuned --task sst2 --ratio 4 --from plugins -o adapted
"""

app = typer.Typer(
    help=GUIDE, no_args_is_help=True, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False
)
errors = Console(stderr=True)


def _version(asked: bool) -> None:
    if asked:
        print(variator.__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


BundleArgument = Annotated[Path, typer.Argument(help="Directory written by `variator export`.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one machine-readable record instead.")]
EngineOption = Annotated[str, typer.Option(help="auto, onnxruntime, openvino, tensorrt or tensorrt-rtx.")]
PrecisionOption = Annotated[
    str | None, typer.Option(help="fp32, fp16, bf16 or int8; the best without int8 by default.")
]
ThreadsOption = Annotated[int, typer.Option(help="Processor threads; 0 means all.", min=0)]
TaskOption = Annotated[str | None, typer.Option(help="embed, classify, qa or hidden; detected by default.")]
DatasetOption = Annotated[
    str | None, typer.Option("--task", help="mnli, qnli, qqp, rte, sst2, mrpc, squad or stsb: adapt to its labels.")
]
DataOption = Annotated[
    Path | None, typer.Option(help="Directory with TASK/train*.jsonl(.gz) and dev*; else the hub's `datasets`.")
]
NameOption = Annotated[str | None, typer.Option(help="What to call the model; its directory or hub id by default.")]
ModelArgument = Annotated[
    str, typer.Argument(help="Directory, hub id, or random:bert-base (tiny, minilm, bert-large) for a toy.")
]


@contextmanager
def stages() -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being done; silent elsewhere."""
    if not errors.is_terminal:
        yield lambda stage: None
        return
    with errors.status("") as status:
        yield lambda stage: status.update(stage)


@contextmanager
def bars() -> Iterator[tuple[Callable[[str], None], Callable[[str, float], None]]]:
    """Show on a terminal what is being done and, where it is known, how far it is; silent elsewhere."""
    if not errors.is_terminal:
        yield lambda stage: None, lambda what, share: None
        return
    from rich.progress import Progress

    with Progress(*Progress.get_default_columns()[:3], console=errors, transient=True) as progress:
        bar = progress.add_task("", total=None)

        def on_stage(stage: str) -> None:
            progress.update(bar, description=stage, total=None)

        def on_progress(what: str, share: float) -> None:
            progress.update(bar, description=what, total=1.0, completed=share)

        yield on_stage, on_progress


@app.command(short_help="ONNX graphs over one backbone, checked against PyTorch.")
def export(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The bundle's directory.")],
    ratio: Annotated[
        list[str],
        typer.Option(help="Hidden vectors merged into one, or a setting's name; repeat for several. 1 is always in."),
    ],
    plugin: Annotated[Path | None, typer.Option(help="Directory of trained plugins; else those that ship.")] = None,
    task: TaskOption = None,
    name: NameOption = None,
    untrained: Annotated[
        bool, typer.Option("--untrained", help="Make up missing plugins: speed only, marked.")
    ] = False,
    rank: Annotated[int, typer.Option(help="Rank of made-up plugins.", min=1)] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing bundle.")] = False,
    layout: Annotated[
        str, typer.Option(help="per-ratio: one graph each; shared: one graph for all ratios, plugins swapped live.")
    ] = "per-ratio",
    precision: Annotated[
        str, typer.Option(help="That the graphs are written in: fp32 for every engine; fp16, bf16 for GPUs alone.")
    ] = "fp32",
    low_memory: Annotated[
        bool, typer.Option("--low-memory", help="For a model larger than memory: weights one by one; can be resumed.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Export a model at ratio 1 and others: ONNX graphs over one backbone, each checked against PyTorch."""
    from variator.exporters.export import ExportSettings
    from variator.exporters.export import export as verb

    settings = ExportSettings(keys(ratio), plugin, untrained, rank, overwrite, layout, precision, low_memory)
    with stages() as on_stage:
        bundle = verb(model, output, settings, task, name, on_stage)
    if as_json:
        _print_json(asdict(bundle.manifest))
    else:
        _show_bundle(bundle.path)


@app.command(short_help="Build an engine for this machine.")
def build(
    bundle: BundleArgument,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 0,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Build even if an unchanged engine is there.")] = False,
    profile: Annotated[
        list[str] | None,
        typer.Option(help="Shapes to compile for, MIN:OPT:MAX of rows x tokens: 1x1:8x64:32x128; repeat. For GPUs."),
    ] = None,
    compute_capability: Annotated[
        list[str] | None, typer.Option(help="GPU to compile for without having it: 8.9. For tensorrt-rtx.")
    ] = None,
    calibrate: Annotated[
        bool, typer.Option(help="Measure how long runs take here, for --ratio auto and `replay`; a minute or two.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Build an engine for this machine, checked against PyTorch; an unchanged one is reused at once."""
    from variator.engines.base import BuildOptions
    from variator.engines.build import build as verb
    from variator.engines.latency import calibrated

    said: list[str] = []
    options = BuildOptions(tuple(profile or ()), tuple(compute_capability or ()))
    with bars() as (on_stage, on_progress):

        def tell(stage: str) -> None:
            said.append(stage)
            on_stage(stage)

        built = verb(bundle, engine, precision, threads, rebuild, tell, options, on_progress)
        if calibrate and built.record.gated:
            on_stage("measuring latency")
            try:
                calibrated(bundle, built, threads, on_progress)
            except EngineError as error:  # the engine itself is good
                tell(f"no latency table, so no --ratio auto: {error.what}")
    if as_json:
        _print_json({"directory": str(built.directory), **asdict(built.record)})
        return
    console = Console()
    console.print(Text("\n".join(line for line in said if not line.startswith(("compiling", "checking")))))
    if built.record.gated:
        table = Table("ratio", "latency when built, ms", "largest error")
        for ratio, milliseconds in built.record.probe_ms.items():
            table.add_row(ratio, f"{milliseconds:.1f}", f"{built.record.max_abs_error[ratio]:.2g}")
        console.print(table)
    console.print(Text(f"in {built.directory}"))


@app.command(short_help="Run texts through a built bundle.")
def run(
    bundle: BundleArgument,
    text: Annotated[list[str], typer.Option(help="A text; repeat for several.")],
    ratio: Annotated[str, typer.Option(help="A ratio that the plugin has, a setting's name, or auto.")] = "1",
    slo_ms: Annotated[float | None, typer.Option(help="With --ratio auto: time for the answer.")] = None,
    plugin: Annotated[
        Path | None, typer.Option(help="Plugin file or directory instead of the bundle's own (layout shared).")
    ] = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 0,
    truncate: Annotated[bool, typer.Option("--truncate", help="Cut texts beyond the model's limit.")] = False,
    candidate: Annotated[
        list[str] | None, typer.Option(help="With a decoder: score this word as what fills <extra_id_0>; repeat.")
    ] = None,
    beams: Annotated[int, typer.Option(help="With a decoder: texts in the race at once.", min=1)] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="With a decoder: length of an answer.", min=1)] = 64,
    as_json: JsonOption = False,
) -> None:
    """Run texts through a built bundle; one with a decoder writes an answer to each."""
    from variator.engines.generation import GenerateSettings
    from variator.engines.runtime import DEFAULT, Runtime

    with Runtime.open(bundle, engine, precision, threads) as runtime:
        if plugin is not None:
            runtime.plug(DEFAULT, plugin)
        key = keys([ratio])[0]
        if runtime.bundle.manifest.decoder is not None and not candidate:
            if slo_ms is not None:
                raise InputError("--slo-ms with a decoder", valid="--slo-ms for encoders, with --ratio auto")
            written = runtime.generate(
                text, ratio=key, truncate=truncate, settings=GenerateSettings(max_new_tokens, beams)
            )
            _show_written(written, text, runtime.picked, as_json)
            return
        if candidate:
            if slo_ms is not None or beams != 1:
                raise InputError("--candidate with --slo-ms or --beams", valid="--candidate alone")
            result = runtime.score(text, candidate, ratio=key, truncate=truncate)
        else:
            result = runtime.infer(text, ratio=key, truncate=truncate, slo_ms=slo_ms)
        picked = runtime.picked
    if as_json:
        record = asdict(result) | {"outputs": {name: values.tolist() for name, values in result.outputs.items()}}
        _print_json(record | {"picked": picked})
        return
    console = Console()
    console.print(Text(f"ratio {result.ratio}, engine {picked}"))
    quality = f", quality {result.expected_quality:.4f} of ratio 1" if result.expected_quality is not None else ""
    times = f"tokenise {result.tokenise_ms:.1f} ms, queue {result.queue_ms:.1f} ms, compute {result.compute_ms:.1f} ms"
    console.print(Text(times + quality))
    for name, values in result.outputs.items():
        for row, value in zip(text, values, strict=True):
            head = ", ".join(f"{number:.4f}" for number in value.ravel()[:6])
            console.print(Text(f"{name} {tuple(value.shape)} [{head}{', …' if value.size > 6 else ''}]  {row[:60]}"))


def _show_written(written: Generation, texts: list[str], picked: str, as_json: bool) -> None:
    if as_json:
        _print_json(asdict(written) | {"picked": picked})
        return
    console = Console()
    console.print(Text(f"ratio {written.ratio}, engine {picked}"))
    console.print(
        Text(
            f"tokenise {written.tokenise_ms:.1f} ms, queue {written.queue_ms:.1f} ms, "
            f"encode {written.encode_ms:.1f} ms, decode {written.decode_ms:.1f} ms in {written.steps} steps"
        )
    )
    for text, answer, ended in zip(texts, written.texts, written.finished, strict=True):
        console.print(Text(f"{answer}{'' if ended else ' … (cut: --max-new-tokens)'}  <- {text[:60]}"))


@app.command(short_help="Measure speed, FLOPs, memory and quality.")
def bench(
    bundle: BundleArgument,
    engine: Annotated[list[str] | None, typer.Option(help="Built engines to measure; all by default.")] = None,
    shapes: Annotated[
        str | None, typer.Option(help="Batch x length, comma-separated; by default 1x32,1x128,8x128,32x64.")
    ] = None,
    ratio: Annotated[list[str] | None, typer.Option(help="Ratios or names to measure; all by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The checkpoint, to measure the plain libraries beside us.")] = None,
    stsb: Annotated[Path | None, typer.Option(help="STS-B as .jsonl(.gz), for Spearman's correlation.")] = None,
    runs: Annotated[int, typer.Option(help="Timed rounds per shape.", min=5)] = 15,
    budget: Annotated[float, typer.Option(help="Seconds per shape after which no new round starts.")] = 60.0,
    threads: ThreadsOption = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report with plots here.")] = None,
    against: Annotated[
        Path | None, typer.Option(help="The same model in the other layout, built: compare speed and memory of both.")
    ] = None,
    quality: Annotated[bool, typer.Option(help="Measure quality.")] = True,
    memory: Annotated[bool, typer.Option(help="Measure memory.")] = True,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure how long runs take here, anew, and nothing else.")
    ] = False,
    precision: PrecisionOption = None,
) -> None:
    """Measure speed, FLOPs, memory, disk and quality of all ratios; one table, one record, one report."""
    if calibrate and (json_file or html or model or against):
        raise InputError("--calibrate with other measurements", fix="run `variator bench` twice, with it and without")
    if precision and not calibrate:
        raise InputError(
            "--precision without --calibrate", valid="all that are built are measured", fix="--engine NAME"
        )
    if calibrate:
        _calibrate(bundle, engine or ["auto"], precision, threads)
        return
    from variator.bench import table
    from variator.bench.run import BenchSettings
    from variator.bench.run import bench as verb
    from variator.files import write_atomically

    _check_places(json_file, html)
    if html:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401

    settings = BenchSettings(
        tuple(engine or ()),
        parse_shapes(shapes) if shapes else (),
        keys(ratio),
        runs,
        budget,
        model,
        stsb,
        threads,
        quality,
        memory,
        against,
    )
    with stages() as on_stage:
        record = verb(bundle, settings, _command_line(), on_stage)
    table.show(record, Console())
    if json_file:
        write_atomically(json_file, record.to_json())
    if html:
        from variator.bench import report

        report.write(record, html)


def _calibrate(bundle: Path, engines: list[str], precision: str | None, threads: int) -> None:
    """Measure the latency tables of engines."""
    from variator.engines.built import LATENCY_FILE, find_built
    from variator.engines.latency import calibrated
    from variator.toolkit.bundle import Bundle

    for engine in engines:
        built, _ = find_built(Bundle.open(bundle), engine, precision)
        with bars() as (_, on_progress):
            table = calibrated(bundle, built, threads, on_progress, again=True)
        shown = Table("rows x tokens", *(f"ratio {ratio}, ms" for ratio in table.ratios), title=built.directory.name)
        for rows, length in ((1, 16), (1, 128), (8, 64), (32, 64)):
            shown.add_row(f"{rows} x {length}", *(f"{table.ms(ratio, rows, length):.1f}" for ratio in table.ratios))
        Console().print(shown, Text(f"{len(table.points)} points in {built.directory / LATENCY_FILE}"))


@app.command(short_help="Send a workload through policies, and see who holds the objective.")
def replay(
    bundle: BundleArgument,
    trace: Annotated[
        str, typer.Option(help="poisson, gamma:16 (squared variation), step, or a CSV file with time stamps.")
    ] = "poisson",
    slo_ms: Annotated[float, typer.Option(help="Time from arrival to answer.")] = 250.0,
    policy: Annotated[
        list[str] | None, typer.Option(help="drain, slackfit, thresholds or fixed(4); repeat. drain and fixed(1).")
    ] = None,
    load: Annotated[float, typer.Option(help="Requests, as a share of what ratio 1 can serve.")] = 1.0,
    rate: Annotated[float | None, typer.Option(help="Requests per second, instead of --load.")] = None,
    seconds: Annotated[float, typer.Option(help="How long.")] = 60.0,
    texts: Annotated[
        list[Path] | None, typer.Option(help="Real texts, .jsonl(.gz), for the lengths of requests; repeat.")
    ] = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 0,
    rounds: Annotated[int, typer.Option(help="Runs of every policy, in turn; the median one counts.", min=1)] = 1,
    simulate: Annotated[bool, typer.Option("--simulate", help="Also on a virtual clock, beside the replay.")] = False,
    replicas: Annotated[
        int, typer.Option(help="Simulate so many behind a balancer, once one agrees with the replay.", min=1)
    ] = 1,
    seed: Annotated[int, typer.Option(help="Of the workload.", min=0)] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write the report with plots here.")] = None,
) -> None:
    """Send the same workload through policies as it would come, and report who answers in time at which quality."""
    from variator.bench import replay_report
    from variator.bench.replay import ReplaySettings
    from variator.bench.replay import replay as verb
    from variator.files import write_atomically

    _check_places(json_file, html)
    if html:
        import matplotlib  # noqa: F401
    settings = ReplaySettings(
        trace,
        tuple(policy or ("drain", "fixed(1)")),
        slo_ms,
        rate,
        load,
        seconds,
        tuple(texts or ()),
        engine,
        precision,
        threads,
        seed,
        simulate,
        replicas,
        rounds,
    )
    with stages() as on_stage:
        record = verb(bundle, settings, _command_line(), on_stage)
    replay_report.show(record, Console())
    if json_file:
        write_atomically(json_file, record.to_json())
    if html:
        write_atomically(html, replay_report.html(record))


@app.command(short_help="Serve a bundle over HTTP, at the ratio of the moment.")
def serve(
    bundle: BundleArgument,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)] = 8000,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 0,
    slo_ms: Annotated[float, typer.Option(help="Objective of requests that bring none of their own, ms.")] = 100.0,
    policy: Annotated[str, typer.Option(help="drain, slackfit, thresholds or fixed(4).")] = "drain",
    max_queue: Annotated[int, typer.Option(help="Requests that may wait.", min=1)] = 4096,
    max_batch: Annotated[int, typer.Option(help="Inputs of a request.", min=1)] = 128,
    max_tokens: Annotated[int, typer.Option(help="Tokens of a request.", min=1)] = 65_536,
    max_body: Annotated[int, typer.Option(help="Bytes of a request.", min=1)] = 2 * 2**20,
    drain_s: Annotated[float, typer.Option(help="Seconds to refuse with 503 before the end.", min=0)] = 0.0,
) -> None:
    """Serve a bundle over HTTP: /v1/embeddings, /embed, /predict, /rerank, /metrics, and a status page at /.

    A token that clients have to bring is taken from the environment variable VARIATOR_TOKEN.
    """
    from variator.serving.http import HttpSettings
    from variator.serving.process import TOKEN, ServerSettings
    from variator.serving.process import serve as serving

    http = HttpSettings(max_body, max_batch, max_tokens, token=os.environ.get(TOKEN, ""))
    settings = ServerSettings(
        str(bundle), host, port, engine, precision, threads, policy, slo_ms, max_queue, http, drain_s
    )
    serving(settings, lambda address: errors.print(Text(f"serving {bundle} at {address}"), soft_wrap=True))


@app.command(short_help="A model repository of Triton Inference Server.")
def triton(
    bundle: BundleArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="The repository; a new version goes into one there.")],
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    ratio: Annotated[str, typer.Option(help="Of requests that name none: auto, a ratio or a setting's name.")] = "auto",
    slo_ms: Annotated[
        float, typer.Option(help="Time for an answer at ratio auto, for requests that bring none.")
    ] = 100.0,
    max_queue: Annotated[int, typer.Option(help="Requests that may wait; one more is refused.", min=1)] = 1000,
    max_rows: Annotated[int, typer.Option(help="Most rows of a request.", min=1)] = 64,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Write Triton models of the engines that are built, and one that embeds the runtime with its queue and policy."""
    from variator.exporters.triton import triton as verb
    from variator.exporters.triton_config import TritonSettings

    settings = TritonSettings(keys([ratio])[0], slo_ms, max_queue=max_queue, max_rows=max_rows, threads=threads)
    with stages() as on_stage:
        on_stage("writing the repository")
        written = verb(bundle, output, engine, precision, settings)
    if as_json:
        _print_json(asdict(written) | {"path": str(written.path)})
        return
    table = Table(
        "model", "platform", "engine", "precision", "ratio", title=f"{written.path}, version {written.version}"
    )
    for name, about in written.models.items():
        table.add_row(name, *(about.get(part, "") for part in ("platform", "engine", "precision", "ratio")))
    console = Console()
    console.print(table)
    for name, why in written.left_out.items():
        console.print(Text(f"not written: {name}: {why}"))
    if written.kept:
        console.print(Text(f"left as they were: {', '.join(written.kept)}"))


@app.command(short_help="Show what a bundle holds, checking every hash.")
def inspect(bundle: BundleArgument, as_json: JsonOption = False) -> None:
    """Show what a bundle holds and which engines are built, after checking every hash."""
    from variator.toolkit.bundle import Bundle

    opened = Bundle.open(bundle)
    opened.verify()
    if as_json:
        _print_json(asdict(opened.manifest))
    else:
        _show_bundle(bundle)


@app.command(short_help="Train plugins on plain text, or adapt them to a task.")
def train(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the plugin files.")],
    ratio: Annotated[
        list[str] | None, typer.Option(help="Ratios to train, all from one teacher pass; with --from also names.")
    ] = None,
    preset: Annotated[
        list[str] | None, typer.Option(help="A setting by name, beside or instead of ratios: paper, wide or long.")
    ] = None,
    budget: Annotated[
        float | None, typer.Option(help="Share of the FLOPs to save, 0.5: a ratio and rank for each layer is chosen.")
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(help="Texts, .txt or .jsonl, also .gz; pictures as .npy. Repeat for several."),
    ] = None,
    task: DatasetOption = None,
    data: DataOption = None,
    rank: Annotated[int | None, typer.Option(help="Width of the bottleneck; 64 by default.", min=1)] = None,
    activation: Annotated[
        str | None, typer.Option(help="Of the bottleneck: gelu by default, tanh (the paper's), gelu_tanh, relu, silu.")
    ] = None,
    keys_values: Annotated[
        int | None, typer.Option(help="Ratio of the attention's keys and values; for long inputs.")
    ] = None,
    keys_values_rank: Annotated[int | None, typer.Option(help="Rank of their correction.", min=0)] = None,
    first_alone: Annotated[
        bool, typer.Option("--first-alone", help="Keep [CLS] in a group of its own; for classifiers.")
    ] = False,
    setting: Annotated[
        str, typer.Option(help="Name of what is trained, where a ratio does not say it all: wide, long.")
    ] = "",
    start: Annotated[Path | None, typer.Option("--from", help="Directory of plugins to go on from.")] = None,
    dev: Annotated[Path | None, typer.Option(help="STS-B as .jsonl(.gz): keep the plugin that is best on it.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of distillation, end to end.", min=0)] = 3000,
    local_steps: Annotated[
        int | None, typer.Option(help="Steps of the layer-local stage before; 800, or 0 with --from.", min=0)
    ] = None,
    tokens: Annotated[int, typer.Option(help="Tokens per batch.", min=16)] = 1024,
    accumulate: Annotated[int, typer.Option(help="Batches per step (and process).", min=1)] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the distillation.")] = 2e-3,
    local_rate: Annotated[float, typer.Option(help="Peak learning rate of the layer-local stage.")] = 3e-3,
    task_weight: Annotated[
        float | None, typer.Option(help="Weight of a task's own loss beside the distillation; 1 by default.")
    ] = None,
    evaluate_every: Annotated[int, typer.Option(help="Steps between scores on --dev.", min=1)] = 250,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    precision: Annotated[str, typer.Option(help="auto, fp32 or bf16.")] = "auto",
    shard: Annotated[
        bool, typer.Option("--shard", help="Spread the backbone over the processes of `accelerate launch`.")
    ] = False,
    threads: ThreadsOption = 0,
    kind: TaskOption = None,
    name: NameOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace plugins that are there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Train plugins on plain text or on a task: layer by layer, then distilled end to end.

    Ctrl-C saves, the same command goes on. In several processes: `accelerate launch -m variator train …`.
    """
    from variator.toolkit.checkpoint import load_backbone
    from variator.training.budget import within_budget
    from variator.training.objective import Weights
    from variator.training.plan import Material, Plan
    from variator.training.settings import TrainSettings
    from variator.training.train import train as verb

    material = Material(tuple(corpus or ()), task, data, dev)
    if task_weight is not None and not task:
        raise InputError("--task-weight is for a --task", fix="leave it out")
    shape = (rank, activation, keys_values, keys_values_rank, first_alone, setting)
    plan = Plan(keys(ratio), tuple(preset or ()), budget, start, *shape, local_steps)
    before = plan.before()
    settings = TrainSettings(
        tuple(plugin.config for plugin in before) or plan.configs(),
        local_steps=plan.local,
        steps=steps,
        tokens=tokens,
        accumulate=accumulate,
        local_rate=local_rate,
        learning_rate=learning_rate,
        weights=Weights() if task_weight is None else Weights(task=task_weight),
        seed=seed,
        precision=precision,
        evaluate_every=evaluate_every,
        shard=shard,
        threads=threads,
    )
    with stages() as on_stage:
        on_stage("loading the model")
        backbone = load_backbone(model, kind, name)
        on_stage("reading the texts")
        texts, judge = material.read(backbone, seed)
    with _training_bar() as on_step:
        if budget is not None:
            settings, before = within_budget(backbone, texts, budget, setting, settings, output, on_step, overwrite)
        plugins = verb(backbone, texts, settings, output, on_step, judge, before, overwrite)
    if os.environ.get("RANK", "0") != "0":
        return  # one of several processes speaks for all
    if as_json:
        _print_json(
            {"directory": str(output), "plugins": [asdict(p.config) | {"training": p.training} for p in plugins]}
        )
        return
    table = Table("ratio", "rank", "parameters", "error (MSE / variance), mean over layers")
    for plugin in plugins:
        layers = plugin.training["layer_errors"]
        table.add_row(
            str(plugin.config.key),
            str(plugin.config.rank),
            f"{plugin.parameters:,}",
            f"{sum(layers) / len(layers):.4f}",
        )
    Console().print(table)
    Console().print(
        Text(f"in {output}; next: variator export {model} --ratio {plugins[0].config.key} --plugin {output} -o BUNDLE")
    )


@app.command(short_help="Fine-tune a backbone for a task.")
def finetune(
    model: ModelArgument,
    task: Annotated[str, typer.Option(help="mnli, qnli, qqp, rte, sst2, mrpc or squad.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the checkpoint.")],
    data: DataOption = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the training split; 2 to 8 by its size.")] = None,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate.")] = 5e-5,
    batch: Annotated[int, typer.Option(help="Rows per step.", min=1)] = 32,
    seed: Annotated[int, typer.Option(help="Of the run.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a checkpoint that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Fine-tune a backbone for a task with transformers' Trainer; an interrupted run goes on from its last epoch."""
    from variator.tasks.catalogue import task_named
    from variator.tasks.read import read_split
    from variator.training.finetune import FinetuneSettings
    from variator.training.finetune import finetune as verb

    settings = FinetuneSettings(epochs, learning_rate, batch, seed, overwrite=overwrite)
    split = read_split(task_named(task), "train", data)
    with _step_bar(f"{split.label}") as on_step:
        verb(model, split, output, settings, on_step)
    if as_json:
        _print_json({"directory": str(output), "model": model, "split": split.label, "settings": asdict(settings)})
        return
    where = f" --data {data}" if data else ""
    follow = f"variator train {output} --task {task}{where} --ratio 4 --from PLUGINS -o DIR"
    Console().print(Text(f"in {output}; next: {follow}"))


@app.command(short_help="What every ratio costs on every task: fine-tune, adapt, export, score.")
def quality(
    model: ModelArgument,
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory that keeps all parts, to go on later.")],
    task: Annotated[list[str] | None, typer.Option(help="Repeat for several; all eight by default.")] = None,
    ratio: Annotated[list[str] | None, typer.Option(help="Ratios or names beside 1; 2, 4, 8 by default.")] = None,
    data: DataOption = None,
    start: Annotated[Path | None, typer.Option("--from", help="Directory of plugins to adapt; else ours.")] = None,
    steps: Annotated[
        int, typer.Option(help="Least steps of the adaptation; a large task takes one pass.", min=1)
    ] = 1000,
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of the adaptation.")] = 1e-3,
    engine: EngineOption = "onnxruntime",
    precision: PrecisionOption = "fp32",
    seed: Annotated[int, typer.Option(help="Of everything.")] = 0,
    name: NameOption = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Write the plot here, as SVG.")] = None,
) -> None:
    """Per task: fine-tune, adapt, export, build, score. Hours on a CPU; the same command goes on where it stopped."""
    from variator.bench import tasks
    from variator.files import write_atomically
    from variator.tasks.catalogue import TASKS, task_named

    _check_places(json_file, picture)
    if picture:
        import matplotlib  # noqa: F401

    settings = tasks.QualitySettings(
        output,
        tuple(task_named(one).name for one in task or TASKS),
        keys(ratio) or (2, 4, 8),
        data,
        start,
        steps,
        learning_rate=learning_rate,
        engine=engine,
        precision=precision or "fp32",
        seed=seed,
    )
    with stages() as on_stage:
        record = tasks.quality(model, settings, _command_line(), name, on_stage)
    print(tasks.markdown(record), end="")
    if json_file:
        write_atomically(json_file, record.to_json())
    if picture:
        write_atomically(picture, tasks.plot(record))


@app.command("import", short_help="Convert a plugin that the paper's authors released.")
def import_(
    checkpoint: Annotated[Path, typer.Argument(help="Their torch state dict, CHECKPOINT.pkl; read without its code.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="Directory for the plugin file.")],
    family: Annotated[str, typer.Option(help="Family of the backbone that it was trained for.")] = "t5",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a plugin that is there.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Convert a plugin that the paper's authors released into a plugin file."""
    from variator.toolkit.authors import read_authors_checkpoint
    from variator.toolkit.plugin_file import save_plugin
    from variator.toolkit.plugin_format import file_name

    plugin = read_authors_checkpoint(checkpoint, family)
    path = output / file_name(plugin.config.key)
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists already", fix="another -o, or --overwrite")
    save_plugin(plugin, output)
    if as_json:
        _print_json({"file": str(path), "plugin": plugin.config.header(), "parameters": plugin.parameters})
        return
    sizes = (
        f"{plugin.layers} layers of {plugin.hidden_size}, rank {plugin.config.rank}, {plugin.parameters:,} parameters"
    )
    Console().print(Text(f"{path}: {sizes}"))


@app.command("eval", short_help="A task's official scores at every ratio.")
def evaluate(
    place: Annotated[str, typer.Argument(help="A bundle, or a checkpoint's directory or hub id.")],
    task: Annotated[str, typer.Option(help="mnli, qnli, qqp, rte, sst2, mrpc, squad or stsb.")],
    ratio: Annotated[
        list[str] | None, typer.Option(help="Ratios or names beside 1; all that the bundle or --plugin has by default.")
    ] = None,
    plugin: Annotated[Path | None, typer.Option(help="Directory of plugins, instead of the bundle's or ours.")] = None,
    data: DataOption = None,
    engine: EngineOption = "auto",
    precision: PrecisionOption = None,
    threads: ThreadsOption = 0,
    kind: TaskOption = None,
    record: Annotated[
        bool, typer.Option("--record", help="Write the scores into the files of --plugin; for a checkpoint.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Score a bundle's engine, or a checkpoint in PyTorch, on a task's development split."""
    from variator.bench.evaluate import CHOSEN, EvalSettings, as_rows, record_scores
    from variator.bench.evaluate import evaluate as verb
    from variator.tasks.catalogue import task_named
    from variator.tasks.read import read_split

    if record and (plugin is None or (Path(place) / "manifest.json").exists()):
        raise InputError(
            "--record is for plugin files of a checkpoint", fix="variator eval MODEL --plugin DIR --record"
        )
    split = read_split(task_named(task), "dev", data)
    with stages() as on_stage:
        settings = EvalSettings(keys(ratio), plugin, engine, precision, threads, kind)
        found = verb(place, split, settings, on_stage)
    if record and plugin is not None:
        record_scores(found, plugin)
    if as_json:
        _print_json([asdict(one) for one in found])
        return
    table = Table("ratio", "engine", "precision", *found[0].scores, "change", title=f"{found[0].model}, {split.label}")
    for row in as_rows(found):
        table.add_row(*row)
    if any(one.chosen for one in found):
        table.caption = f"{CHOSEN} this split chose the plugin while it was trained: flattered"
    Console().print(table)


def keys(ratios: list[str] | None) -> tuple[Key, ...]:
    """`["4", "long"]` -> (4, "long"); what can be neither is wrong usage."""
    for ratio in ratios or ():
        if not ratio.removeprefix("-").isdecimal() and not NAME.fullmatch(ratio):
            raise typer.BadParameter(f"{ratio!r} is neither a ratio nor the name of a setting")
    return tuple(map(parse_key, ratios or ()))


def parse_shapes(text: str) -> tuple[tuple[int, int], ...]:
    """`1x32,8x128` -> ((1, 32), (8, 128))."""
    try:
        shapes = tuple((int(batch), int(length)) for batch, length in (part.split("x") for part in text.split(",")))
    except ValueError as error:
        raise InputError(f"cannot read shapes {text!r}", valid="batch x length, such as 1x32,8x128") from error
    return shapes


@contextmanager
def _training_bar() -> Iterator[Callable[[Any], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=errors, disable=not errors.is_terminal) as bar:
        shown: dict[str, Any] = {}

        def on_step(progress: Any) -> None:
            if progress.stage not in shown:
                shown[progress.stage] = bar.add_task("", total=progress.steps)
            losses = "  ".join(f"k={ratio} {loss:.4f}" for ratio, loss in progress.loss.items())
            scores = "".join(f"  k={ratio} {score:.4f}" for ratio, score in progress.scores.items())
            speed = f"{progress.tokens_per_s:,.0f} tokens/s"
            text = f"{progress.stage}: loss {losses}{'  score' if scores else ''}{scores}  {speed}"
            bar.update(shown[progress.stage], completed=progress.step, description=text)

        yield on_step


@contextmanager
def _step_bar(text: str) -> Iterator[Callable[[int, int], None]]:
    from rich.progress import Progress

    with Progress(console=errors, disable=not errors.is_terminal) as bar:
        shown = bar.add_task(text)
        yield lambda step, steps: bar.update(shown, completed=step, total=steps)


def _show_bundle(path: Path) -> None:
    from variator.engines.built import built_summary
    from variator.toolkit.bundle import Bundle

    bundle = Bundle.open(path)
    manifest, console = bundle.manifest, Console()
    kind = "" if manifest.real else ", random weights"
    console.print(
        Text(
            f"{manifest.model}: {manifest.family}, {manifest.layers} layers of {manifest.hidden_size}, "
            f"task {manifest.task}, up to {manifest.max_length} tokens, {manifest.precision}{kind}",
            style="bold",
        )
    )
    title = "UNTRAINED PLUGINS: speed only" if bundle.untrained else None
    table = Table("ratio", "plugin", "parameters added", "FLOPs at 128 tokens", "saved", "largest error", title=title)
    for ratio in bundle.ratios:
        entry = manifest.ratios[ratio]
        kind = "none" if ratio == 1 else entry.summary
        kind = f"UNTRAINED, {kind}" if entry.untrained else kind
        table.add_row(
            str(ratio),
            kind,
            f"{entry.plugin_parameters:,} ({entry.plugin_parameters / manifest.parameters:.1%})",
            f"{entry.flops['total'] / 1e9:.2f} G",
            f"{entry.flops['saved']:.0%}",
            f"{entry.max_abs_error:.1g}",
        )
    console.print(table)
    total = sum(file.bytes for file in manifest.files.values())
    if manifest.shared is not None:
        console.print(
            Text(
                f"layout shared: {', '.join(graph.name for graph in bundle.graphs)}; takes plugins up to ratio "
                f"{manifest.shared.max_ratio} and rank {manifest.shared.max_rank} with {manifest.shared.activation}"
                + (f", heads up to {manifest.shared.max_classes} classes" if manifest.shared.head else "")
            )
        )
    else:
        console.print(Text("layout per-ratio: one graph per ratio, its plugin in it"))
    if manifest.decoder is not None:
        flops = manifest.decoder.flops
        console.print(
            Text(
                f"decoder: {manifest.decoder.layers} layers, {manifest.decoder.parameters:,} parameters: "
                f"a token behind {flops['before']:.0f} with {flops['source']:.0f} of the encoder takes "
                f"{flops['total'] / 1e9:.3f} GFLOPs; largest error {manifest.decoder.max_abs_error:.1g}"
            )
        )
    backbone = manifest.files.get("backbone.data")
    console.print(
        Text(f"{path}: {total / 1e6:.1f} MB, of which the backbone {backbone.bytes / 1e6 if backbone else 0:.1f} MB")
    )
    for line in built_summary(bundle):
        console.print(Text(line))


def _check_places(*paths: Path | None) -> None:
    """Minutes or hours of measuring must not be lost to a place that cannot be written."""
    for path in paths:
        if path and not path.absolute().parent.is_dir():
            raise InputError(
                f"there is no directory {path.parent} to write {path.name} in", fix=f"mkdir -p {path.parent}"
            )


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


def _command_line() -> str:
    return " ".join(["variator", *sys.argv[1:]])


INTERRUPTED = 130
"""With which typer ends on Ctrl-C, without a word."""


def main() -> None:
    """Entry point: exit status 0 done, 1 failed, 2 wrong usage; a traceback only with VARIATOR_DEBUG=1."""
    try:
        try:
            app()
        except SystemExit as end:
            if end.code == INTERRUPTED:
                raise KeyboardInterrupt from end
            raise
    except (Exception, KeyboardInterrupt) as error:
        if os.environ.get("VARIATOR_DEBUG") == "1":
            raise
        _show_error(error)
        sys.exit(1)


def _show_error(error: BaseException) -> None:
    """One readable block: a box on a terminal, plain lines (to copy a command from) elsewhere."""
    if isinstance(error, VariatorError):
        text = str(error)
    elif isinstance(error, KeyboardInterrupt):
        text = "interrupted"
    elif isinstance(error, ModuleNotFoundError):
        text = (
            f"{error.name} is not installed\nfix: pip install 'variator[all]' (parts: export, openvino, train, bench)"
        )
    else:
        text = (
            f"unexpected {type(error).__name__}: {error}\nfix: run again with VARIATOR_DEBUG=1 and report the traceback"
        )
    if errors.is_terminal:
        errors.print(Panel(Text(text), title="error", title_align="left", border_style="red"))
    else:
        print(f"error: {text}", file=sys.stderr)
