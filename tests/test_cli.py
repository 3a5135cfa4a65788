"""The command line, as a user meets it: exit statuses, one block per error; in a process where that matters."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from unittest import mock

import pytest
import torch

from tests.conftest import hear_ctrl_c, lively
from tests.tasks.toys import write_tasks
from tests.toolkit.test_authors import released
from variator import cli
from variator.bench.record import Record
from variator.toolkit.bundle import Bundle
from variator.toolkit.checkpoint import Backbone
from variator.toolkit.plugin_file import save_plugin


def variator(*arguments: object, debug: bool = False) -> subprocess.CompletedProcess[str]:
    """Through the entry point, in this process: a new one takes seconds to import everything."""
    settings = {"VARIATOR_DEBUG": "1" if debug else "0", "COLUMNS": "200", "NO_COLOR": "1"}
    command = ["variator", *map(str, arguments)]
    out, err, status = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.dict(os.environ, settings),
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        except Exception:  # noqa: BLE001 - what the interpreter would show
            traceback.print_exc()
            status = 1
    return subprocess.CompletedProcess(command, status, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> str:
    done = variator(*arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_whole_way_from_a_checkpoint_to_a_report(checkpoint: Path, tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(f"w{i} a b w{i % 7} c" for i in range(200)))
    plugins, bundle = tmp_path / "plugins", tmp_path / "bundle"
    train = (
        "train",
        checkpoint,
        "--ratio",
        2,
        "--ratio",
        4,
        "--corpus",
        corpus,
        "--local-steps",
        20,
        "--steps",
        5,
        "--rank",
        4,
        "-o",
        plugins,
    )
    assert "next: variator export" in succeed(*train)
    assert "already holds" in variator(*train).stderr
    trained = json.loads(succeed(*train, "--overwrite", "--json"))
    assert [plugin["ratio"] for plugin in trained["plugins"]] == [2, 4]

    out = succeed("export", checkpoint, "--ratio", 2, "--ratio", 4, "--plugin", plugins, "-o", bundle, "--name", "tiny")
    assert "tiny: bert" in out and "UNTRAINED" not in out and "rank 4, gelu" in out
    succeed("build", bundle, "--engine", "onnxruntime")
    assert json.loads(succeed("build", bundle, "--engine", "onnxruntime", "--json"))["precision"] == "fp32"
    assert "onnxruntime fp32: built" in succeed("inspect", bundle)
    auto = json.loads(succeed("run", bundle, "--text", "w1 w2", "--ratio", "auto", "--slo-ms", 60000, "--json"))
    assert auto["ratio"] in (1, 2, 4) and len(auto["outputs"]["embedding"][0]) == 32
    page, record = tmp_path / "replay.html", tmp_path / "replay.json"
    workload = ("--rate", 40, "--seconds", 1, "--slo-ms", 2000, "--json", record, "--html", page)
    assert "drain" in succeed("replay", bundle, *workload)
    assert json.loads(record.read_text())["schema"] == "variator.replay/1" and "<svg" in page.read_text()
    assert json.loads(succeed("inspect", bundle, "--json"))["model"] == "tiny"

    assert "ratio 4, engine onnxruntime fp32" in succeed("run", bundle, "--text", "w1 w2", "--ratio", 4)
    result = json.loads(succeed("run", bundle, "--text", "w1 w2", "--text", "a", "--ratio", 2, "--json"))
    assert result["ratio"] == 2 and [len(row) for row in result["outputs"]["embedding"]] == [32, 32]

    files = tmp_path / "record.json", tmp_path / "report.html"
    table = succeed("bench", bundle, "--shapes", "1x8", "--runs", 5, "--json", files[0], "--html", files[1])
    assert "onnxruntime" in table and Record.load(files[0]).model.id == "tiny"
    assert "<svg" in files[1].read_text()


def test_the_shared_layout_and_a_plugin_from_a_file(
    checkpoint: Path, backbone: Backbone, bundle: Bundle, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"
    plugin = save_plugin(lively(backbone, 8, classes=3), tmp_path / "plugins")
    command = ("export", checkpoint, "--ratio", 2, "--ratio", 4, "--untrained", "--rank", 4, "--layout", "shared")
    assert "layout shared: ratio-1.onnx, shared.onnx" in succeed(*command, "-o", shared)
    assert "layout per-ratio" in succeed("inspect", bundle.path)
    succeed("build", shared, "--engine", "onnxruntime", "--no-calibrate")
    request = ("run", shared, "--text", "w1 w2", "--ratio", 8)
    result = json.loads(succeed(*request, "--plugin", plugin, "--json"))
    assert result["ratio"] == 8 and {name: len(rows[0]) for name, rows in result["outputs"].items()} == {
        "embedding": 32,
        "logits": 3,
    }
    for arguments, message in (
        (request, "ratio 8 is not in"),
        ((*request[:-1], 4, "--plugin", plugin), "'default' has no ratio 4"),
        ((*request, "--plugin", shared / "gate.safetensors"), "not a plugin"),
        ((*command[:-1], "both", "-o", tmp_path / "no"), "unknown layout 'both'"),
        (("bench", shared, "--against", shared), "both have layout shared"),
    ):
        done = variator(*arguments)
        assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_untrained_work_is_marked_everywhere(checkpoint: Path, tmp_path: Path) -> None:
    out = succeed("export", checkpoint, "--ratio", 2, "--untrained", "--rank", 4, "-o", tmp_path / "bundle")
    assert "UNTRAINED" in out
    succeed("build", tmp_path / "bundle", "--engine", "onnxruntime", "--no-calibrate")
    assert "UNTRAINED" in succeed("bench", tmp_path / "bundle", "--shapes", "1x8", "--runs", 5, "--no-memory")


def test_help_reads_like_a_guide() -> None:
    out = succeed("--help")
    positions = [out.index(word) for word in ("variator export", "variator build", "variator run", "variator bench")]
    assert positions == sorted(positions)
    for command in ("export", "build", "run", "bench", "replay", "inspect", "train"):
        assert "--help" in succeed(command, "--help")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("export", "{checkpoint}", "--ratio", 4, "-o", "{out}"), "no plugin of ratio 4"),
        (("export", "{checkpoint}", "--ratio", 1000, "-o", "{out}"), "ratio 1000 is not usable"),
        (("export", "{checkpoint}", "--ratio", 0, "-o", "{out}"), "ratio 0 is not usable"),
        (("export", "/no/such/model", "--ratio", 4, "-o", "{out}"), "no directory"),
        (("build", "{out}"), "is not a bundle"),
        (("run", "{bundle}", "--text", "w1"), "variator build"),
        (("run", "{bundle}", "--text", "w1", "--engine", "abacus"), "unknown engine"),
        (("inspect", "{out}"), "is not a bundle"),
        (("bench", "{bundle}", "--shapes", "8 by 8"), "cannot read shapes"),
        (("train", "{checkpoint}", "--ratio", 4, "--corpus", "/no/file.txt", "-o", "{out}"), "cannot read"),
    ],
)
def test_a_failure_is_one_block_and_status_1(
    arguments: tuple[object, ...], message: str, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    places = {"{checkpoint}": checkpoint, "{bundle}": bundle.path, "{out}": tmp_path / "out"}
    done = variator(*(places.get(str(argument), argument) for argument in arguments))
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == "" and not (tmp_path / "out").exists()


def test_a_traceback_is_there_for_those_who_ask(tmp_path: Path) -> None:
    done = variator("inspect", tmp_path, debug=True)
    assert done.returncode == 1 and "Traceback" in done.stderr


@pytest.mark.parametrize(
    "arguments", [("export",), ("fly",), ("export", "m", "--ratio", 3.5, "-o", "x"), ("build", "b", "--color")]
)
def test_wrong_usage_is_status_2(arguments: tuple[object, ...]) -> None:
    assert variator(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "train ratios, presets, or a schedule"),
        (("--ratio", "4", "--budget", "0.5"), "train ratios, presets, or a schedule"),
        (("--ratio", "4", "--task", "sst2"), "on plain text or on a task"),
        (("--ratio", "4", "--data", "."), "--data is for a --task"),
        (("--ratio", "4", "--task-weight", "2"), "--task-weight is for a --task"),
        (("--budget", "0.5", "--local-steps", "9"), "--budget"),
        (("--budget", "0.5", "--steps", "0"), "made good by distillation"),
    ],
)
def test_options_of_train_that_contradict_each_other_are_refused(
    tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    (tmp_path / "words.txt").write_text("w1 w2 w3")
    done = variator("train", "random:tiny", "--corpus", tmp_path / "words.txt", "-o", tmp_path / "out", *options)
    assert done.returncode == 1 and message in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "options", "message"),
    [
        ("checkpoint", ("--precision", "bf16"), "scored in PyTorch"),
        ("bundle", ("--kind", "embed"), "knows what it is for"),
        ("bundle", ("--record", "--plugin", "."), "--record is for plugin files"),
    ],
)
def test_options_of_eval_without_effect_are_refused(
    place: str, options: tuple[str, ...], message: str, checkpoint: Path, bundle: Bundle, tmp_path: Path
) -> None:
    row = json.dumps({"sentence1": "w1 w2", "sentence2": "w1", "label": 3})
    (tmp_path / "dev.jsonl").write_text("\n".join([row] * 3))
    where = {"checkpoint": checkpoint, "bundle": bundle.path}[place]
    done = variator("eval", where, "--task", "stsb", "--data", tmp_path / "dev.jsonl", *options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def interrupt_after(command: list[str], seconds: float) -> subprocess.CompletedProcess[str]:
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hear_ctrl_c)
    try:
        time.sleep(seconds)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return subprocess.CompletedProcess(command, process.returncode, "", stderr)


def test_ctrl_c_saves_and_the_same_command_goes_on(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text("\n".join(f"w{i} a b w{i % 7} c" for i in range(200)))
    command = [sys.executable, "-m", "variator", "train", str(checkpoint), "--ratio", "2", "--rank", "4"]
    command += [
        "--corpus",
        str(tmp_path / "corpus.txt"),
        "--tokens",
        "64",
        "--local-steps",
        "0",
        "--steps",
        "1000000",
        "-o",
        str(tmp_path / "out"),
    ]
    stopped = []
    for seconds in (6, 12, 24, 48, 96):  # a slow machine may still be loading torch
        done = interrupt_after(command, seconds)
        # Where the signal meets a library's start-up code, Python ends the process by the signal itself.
        assert done.returncode in (1, -signal.SIGINT) and "Traceback" not in done.stderr
        if found := re.search(
            r"stopped after step (\d+) of the distillation stage's 1000000; the state is saved", done.stderr
        ):
            stopped.append(int(found[1]))
        if len(stopped) == 2:
            break
    assert len(stopped) == 2 and stopped[1] > stopped[0] > 0


def test_ctrl_c_before_there_is_anything_to_save_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Bundle, "open", interrupted)
    monkeypatch.setattr(sys, "argv", ["variator", "inspect", "anything"])
    said = io.StringIO()
    with contextlib.redirect_stderr(said), pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == 1 and "interrupted" in said.getvalue()


def test_serving_and_plugging_import_neither_torch_nor_transformers(
    bundle: Bundle, shared_bundle: Bundle, tmp_path: Path
) -> None:
    path = shutil.copytree(bundle.path, tmp_path / "bundle")
    succeed("build", path, "--engine", "onnxruntime", "--no-calibrate")
    other = str(shared_bundle.path)
    code = (
        "import sys, variator\n"
        f"with variator.Runtime.open({str(path)!r}) as r: r.infer(['w1'], ratio=4)\n"
        "print({'openvino'} & set(sys.modules))\n"
        f"with variator.Runtime.open({other!r}, 'onnxruntime') as r:\n"
        f"  r.plug('x', {other!r}, head=variator.Head([[1.0] * 32], [0.0])); r.infer(['w1'], ratio=4, plugin='x')\n"
        "print({'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["set()", "set()"]


def test_the_help_keeps_its_lines() -> None:
    lines = [line.strip() for line in succeed("--help").splitlines()]
    for command in ("export", "build", "run", "bench", "replay", "train", "eval", "finetune"):
        assert any(line.startswith(f"variator {command}") for line in lines)


def test_a_place_that_cannot_be_written_is_said_before_hours_are_spent(checkpoint: Path, tmp_path: Path) -> None:
    for option in ("--json", "--picture"):
        done = variator("quality", checkpoint, "-o", tmp_path / "work", option, tmp_path / "none" / "file")
        assert done.returncode == 1 and "mkdir -p" in done.stderr and not (tmp_path / "work").exists()


def test_finetune_and_import_have_a_machine_readable_record(checkpoint: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path / "data", 20, 20)
    torch.save(released(), tmp_path / "checkpoint.pkl")
    found = json.loads(succeed("import", tmp_path / "checkpoint.pkl", "-o", tmp_path / "plugins", "--json"))
    assert Path(found["file"]).exists() and found["plugin"] == {"ratio": 4, "rank": 64, "activation": "tanh"}
    options = ("--task", "rte", "--data", tmp_path / "data", "--epochs", "0.5", "--json")
    found = json.loads(succeed("finetune", checkpoint, "-o", tmp_path / "tuned", *options))
    assert found["split"] == "rte train (sample: 20 of 2,490)" and found["settings"]["epochs"] == 0.5
