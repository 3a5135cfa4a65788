"""Measure the ways in which a shared bundle could have been served, which its design was chosen by.

    python tools/shared_choices.py PER_RATIO_BUNDLE SHARED_BUNDLE RATIO BATCHxLENGTH OUT.json

Ratio 1: by a graph of its own beside the shared one (what is built); through the shared graph with a neutral plugin;
with an `If` around every site; with an `If` around two whole graphs. A compressed ratio in ONNX Runtime: plugin as
OrtValues (what is built) or as an adapter file. Latency is over the per-ratio engine: turns of two runs, of which the
second counts. Memory is the proportional set size that ratio 1 and RATIO together add to a fresh process. Both bundles
have to be built; the other ways are loaded from plain graphs, in ONNX Runtime without the file of packed weights.

    python tools/shared_choices.py table OUT.json

prints the table of docs/layouts.md.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from variator import machine
from variator.bench.latency import race_twice
from variator.bench.layouts import pairs
from variator.bench.memory import pss_bytes
from variator.bench.run import built_engines
from variator.engines import onnxruntime as ort_backend
from variator.engines import openvino as ov_backend
from variator.engines.runtime import Runtime
from variator.exporters.gate import full_feed
from variator.toolkit.bundle import Bundle
from variator.toolkit.stack import RATIO_INPUT, Inputs, inputs_of, neutral_inputs

WAYS = ("own graph beside", "neutral plugin", "If around sites", "If around graphs")
Run = Callable[[Inputs], object]


def with_condition(graph: onnx.GraphProto) -> None:
    """Put `is_one`, whether the ratio is 1, in front of a graph's nodes."""
    nodes = [
        helper.make_node("Shape", [RATIO_INPUT], ["ratio_shape"], start=1, end=2),
        helper.make_node("Squeeze", ["ratio_shape"], ["ratio_scalar"]),
        helper.make_node("Equal", ["ratio_scalar", "scalar_one"], ["is_one"]),
    ]
    rest = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *rest])
    graph.initializer.append(helper.make_tensor("scalar_one", TensorProto.INT64, [], [1]))


def around_sites(shared: Path, target: Path) -> Path:
    """The shared graph with compress and expand of every layer each in an `If`; at ratio 1 they hand on their input."""
    model = onnx.load(shared)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)

    def reach(start: str, step: Callable[[str], list[str]]) -> set[str]:
        found, left = set(), [start]
        while left:
            for name in step(left.pop()):
                if name not in found:
                    found.add(name)
                    left.append(name)
        return found

    def after(name: str) -> set[str]:
        return reach(name, lambda n: [out for user in users.get(n, []) for out in user.output])

    def before(name: str) -> set[str]:
        return reach(name, lambda n: list(makers[n].input) if n in makers else [])

    norms = [node for node in graph.node if node.op_type == "LayerNormalization"]
    products = {node.input[1]: node for node in graph.node if node.op_type == "MatMul"}
    groups: list[tuple[set[str], str, str]] = []
    for index, (norm, last) in enumerate(zip(norms[1::2], norms[2::2], strict=True)):
        x = norm.output[0]
        weight = next(name for name in products if f"layers.{index}.ffn.inner" in name)
        entry = products[weight].input[0]
        outer = products[next(name for name in products if f"layers.{index}.ffn.outer" in name)]
        y = users[outer.output[0]][0].output[0]
        out = next(name for name in makers[last.input[0]].input if name != x)
        merge = after(x) & (before(entry) | {entry})
        spread = (after(x) & (before(out) | {out})) - merge - before(y) - {y}
        groups += [(merge, x, entry), (spread, y, out)]
    for number, (names, source, result) in enumerate(groups):
        inside = [node for node in graph.node if node.output[0] in names]
        shape = helper.make_tensor_value_info
        copy = helper.make_node("Identity", [source], [f"{result}_one"])
        then = helper.make_graph([copy], "one", [], [shape(f"{result}_one", TensorProto.FLOAT, ["b", "n", "d"])])
        body = helper.make_graph(inside, "many", [], [shape(result, TensorProto.FLOAT, ["b", "n", "d"])])
        branch = helper.make_node("If", ["is_one"], [f"if_{number}"], then_branch=then, else_branch=body)
        place = next(index for index, node in enumerate(graph.node) if node.output[0] == result)
        graph.node.insert(place + 1, branch)
        for node in graph.node:
            if node is not branch and node.output[0] not in names:
                node.input[:] = [f"if_{number}" if name == result else name for name in node.input]
        kept = [node for node in graph.node if node.output[0] not in names]
        copies = []
        for node in kept:
            clone = onnx.NodeProto()
            clone.CopyFrom(node)
            copies.append(clone)
        del graph.node[:]
        graph.node.extend(copies)
    with_condition(graph)
    return save(model, target)


def around_graphs(one: Path, shared: Path, target: Path) -> Path:
    """One graph that is an `If` around the ratio-1 graph and the shared graph, over one set of initializers."""
    parts = {"one": onnx.load(one), "many": onnx.load(shared)}
    known: dict[bytes, str] = {}
    initializers: list[onnx.TensorProto] = []
    for prefix, model in parts.items():
        inputs = {value.name for value in model.graph.input}
        renamed = {}
        for tensor in model.graph.initializer:
            content = tensor.raw_data + str((list(tensor.dims), tensor.data_type)).encode()
            if content not in known:
                known[content] = f"{prefix}/{tensor.name}"
                initializers.append(onnx.TensorProto())
                initializers[-1].CopyFrom(tensor)
                initializers[-1].name = known[content]
            renamed[tensor.name] = known[content]
        for node in model.graph.node:
            node.input[:] = [n if n in inputs or not n else renamed.get(n, f"{prefix}/{n}") for n in node.input]
            node.output[:] = [f"{prefix}/{n}" for n in node.output]
        for value in model.graph.output:
            value.name = f"{prefix}/{value.name}"
    bodies = {
        prefix: helper.make_graph(list(model.graph.node), prefix, [], list(model.graph.output))
        for prefix, model in parts.items()
    }
    outputs = []
    for value in parts["many"].graph.output:
        outputs.append(onnx.ValueInfoProto())
        outputs[-1].CopyFrom(value)
        outputs[-1].name = value.name.removeprefix("many/")
    names = [value.name for value in outputs]
    branch = helper.make_node("If", ["is_one"], names, then_branch=bodies["one"], else_branch=bodies["many"])
    graph = helper.make_graph([branch], "joined", list(parts["many"].graph.input), outputs, initializers)
    with_condition(graph)
    opsets = list(parts["many"].opset_import)
    return save(helper.make_model(graph, opset_imports=opsets, ir_version=parts["many"].ir_version), target)


def save(model: onnx.ModelProto, target: Path) -> Path:
    """Write a graph with its tensors in one file beside it."""
    onnx.save(model, target, save_as_external_data=True, location=f"{target.name}.data", size_threshold=1024)
    return target


def ways(shared: Path, one: Path, scratch: Path) -> dict[str, Path]:
    """The graph that runs all ratios, by way; that of the first is the built engine's matter."""
    graphs = (
        shared,
        shared,
        around_sites(shared, scratch / "sites.onnx"),
        around_graphs(one, shared, scratch / "graphs.onnx"),
    )
    return dict(zip(WAYS, graphs, strict=True))


def runner(engine: str, precision: str, graph: Path) -> Callable[[Inputs], Run]:
    """Load a graph; the result takes what stays and gives what runs a feed. All with the same settings."""
    if engine == "onnxruntime":
        import onnxruntime

        options = ort_backend._options(machine.cores())
        options.enable_mem_pattern = options.enable_mem_reuse = False
        session = onnxruntime.InferenceSession(
            graph, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(ort_backend.SLOW_FUSIONS)
        )
        return lambda held: ort_backend.OnnxRuntimeEngine(session, precision).hold(held).run
    settings = ov_backend._settings(precision, machine.cores())
    model = ov_backend._core().read_model(graph)
    ov_backend._narrow(model, settings)
    compiled = ov_backend._core().compile_model(model, "CPU", settings)
    return lambda held: ov_backend.OpenVinoEngine(compiled, precision).hold(held).run


def loaders(engine: str, precision: str, way: str, graph: Path, bundle: Bundle, ratio: int) -> dict[int, Run]:
    """How ratio 1 and `ratio` run in one way."""
    if way == WAYS[0]:
        runtime = Runtime.open(bundle, engine, precision)
        return {k: runtime.load(k).run for k in (1, ratio)}
    load = runner(engine, precision, graph)
    return {k: load(inputs) for k, inputs in held(bundle, ratio).items()}


def memory(
    engine: str, precision: str, way: str, graph: Path, bundle: Bundle, ratio: int, shape: tuple[int, int]
) -> int:
    """Bytes that ratio 1 and `ratio` add to this process."""
    feed = full_feed(bundle.manifest, shape)
    empty = pss_bytes()
    runs = loaders(engine, precision, way, graph, bundle, ratio)
    for run in runs.values():
        for _ in range(3):
            run(feed)
    taken = pss_bytes() - empty
    del runs  # not before: they are what is measured
    return taken


def held(bundle: Bundle, ratio: int) -> dict[int, Inputs]:
    """What the graphs take at ratio 1 and at `ratio`."""
    return {1: neutral_inputs(bundle), ratio: inputs_of(bundle, ratio)}


def adapter(bundle: Bundle, shared: Path, ratio: int, scratch: Path) -> Run:
    """The shared graph with its plugin from one of ONNX Runtime's adapter files."""
    import onnxruntime

    model = onnx.load(shared)  # an adapter replaces initializers: here those of a neutral plugin
    defaults = held(bundle, ratio)[1]
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in defaults.items())
    options = ort_backend._options(machine.cores())
    options.enable_mem_pattern = options.enable_mem_reuse = False
    session = onnxruntime.InferenceSession(
        save(model, scratch / "overridable.onnx"), options, disabled_optimizers=list(ort_backend.SLOW_FUSIONS)
    )
    values = ort_backend._values(held(bundle, ratio)[ratio])
    path = scratch / "plugin.onnx_adapter"
    file = onnxruntime.AdapterFormat()
    file.set_adapter_version(1)
    file.set_model_version(1)
    file.set_parameters(values)
    file.export_adapter(str(path))
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(path))
    active = onnxruntime.RunOptions()
    active.add_active_adapter(loaded)
    return lambda feed, alive=loaded: session.run(None, dict(feed), active)  # type: ignore[misc]


def measure(per_ratio: Bundle, bundle: Bundle, ratio: int, shape: tuple[int, int]) -> list[dict[str, object]]:
    """One row per engine and way."""
    own, shared = bundle.graphs
    feed = full_feed(bundle.manifest, shape)
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as directory:
        graphs = ways(shared, own, Path(directory))
        both = pairs(*(built_engines(one, ())[0] for one in (per_ratio, bundle)))
        # First, while this process maps no weights: it would take its share of them.
        needed = {
            (kind, way): in_process(*kind, way, graph, bundle, ratio, shape)
            for kind in both
            for way, graph in graphs.items()
        }
        for engine, precision in both:
            with Runtime.open(per_ratio, engine, precision) as runtime:
                runs: dict[tuple[str, int], Run] = {("per-ratio", k): runtime.load(k).run for k in (1, ratio)}
                for way, graph in graphs.items():
                    found = loaders(engine, precision, way, graph, bundle, ratio)
                    runs |= {(way, k): run for k, run in found.items()}
                if engine == "onnxruntime":
                    runs["adapter file", ratio] = adapter(bundle, shared, ratio, Path(directory))
                expected = {k: np.asarray(first(runs["per-ratio", k](feed))) for k in (1, ratio)}
                for (way, k), run in runs.items():
                    np.testing.assert_allclose(first(run(feed)), expected[k], atol=5e-2, err_msg=f"{way} {k}")
                _, timings = race_twice({key: partial(run, feed) for key, run in runs.items()}, runs=25, budget_s=120)
            for (way, k), timing in timings.items():
                row: dict[str, object] = {"engine": engine, "precision": precision, "way": way, "ratio": k}
                row["relative"] = round(timing.p50_ms / timings["per-ratio", k].p50_ms, 4)
                row |= {"p50_ms": round(timing.p50_ms, 3), "spread": round(timing.spread, 3), "runs": timing.runs}
                if k == 1 and way in WAYS:
                    row["both_ratios_pss_bytes"] = needed[(engine, precision), way]
                rows.append(row)
    return rows


def first(outputs: object) -> np.ndarray:
    """The first output of a run, whichever form it has."""
    return next(iter(outputs.values())) if isinstance(outputs, dict) else outputs[0]  # type: ignore[index]


def in_process(
    engine: str, precision: str, way: str, graph: Path, bundle: Bundle, ratio: int, shape: tuple[int, int]
) -> int:
    """`memory` in a fresh process."""
    parts = [engine, precision, way, str(graph), str(bundle.path), str(ratio), f"{shape[0]}x{shape[1]}"]
    done = subprocess.run([sys.executable, __file__, "memory", *parts], capture_output=True, text=True, check=True)
    return int(done.stdout)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The measurements as a Markdown table: a line per way, three columns per engine."""
    kinds = list(dict.fromkeys((row["engine"], row["precision"]) for row in rows))
    ratio = max(row["ratio"] for row in rows)
    figures = ("ratio 1", f"ratio {ratio}", "memory of both")
    columns = [f"{' '.join(kind)}: {figure}" for kind in kinds for figure in figures]
    lines = [["way", *columns], ["---", *["---:"] * len(columns)]]
    for way in dict.fromkeys(row["way"] for row in rows if row["way"] != "per-ratio"):
        cells = [way]
        for kind in kinds:
            found = {r["ratio"]: r for r in rows if r["way"] == way and (r["engine"], r["precision"]) == kind}
            cells += [f"{found[k]['relative']:.3f}" if k in found else "-" for k in (1, ratio)]
            taken = found.get(1, {}).get("both_ratios_pss_bytes")
            cells.append(f"{taken / 1e6:.0f} MB" if taken else "-")
        lines.append(cells)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def main(arguments: list[str]) -> None:
    """Measure, print and write."""
    if arguments[0] == "memory":
        engine, precision, way, graph, path, ratio, shape = arguments[1:]
        batch, length = map(int, shape.split("x"))
        print(memory(engine, precision, way, Path(graph), Bundle.open(path), int(ratio), (batch, length)))
        return
    if arguments[0] == "table":
        print(table(json.loads(Path(arguments[1]).read_text(encoding="utf-8"))["rows"]), end="")
        return
    own, path, ratio, shape, target = arguments
    batch, length = map(int, shape.split("x"))
    bundle = Bundle.open(path)
    rows = measure(Bundle.open(own), bundle, int(ratio), (batch, length))
    record = {
        "schema": "variator.shared-choices/1",
        "machine": {"cpu": machine.cpu_name(), "cores": machine.cores(), "system": machine.system()},
        "model": {"id": bundle.manifest.model, "real": bundle.manifest.real},
        "shape": [batch, length],
        "rows": rows,
    }
    Path(target).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(table(rows), end="")


if __name__ == "__main__":
    main(sys.argv[1:])
