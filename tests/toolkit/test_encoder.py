"""The canonical encoder against transformers, and what must not change a result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import huggingface_hub
import pytest
import torch
import transformers
from torch import Tensor

from tests.conftest import CONFIGS, HEADLESS, lively, make_sentence_transformer, write_checkpoint
from variator.errors import BackboneError, InputError
from variator.exporters.graph import Compressed
from variator.toolkit.checkpoint import Backbone, load_backbone
from variator.toolkit.checkpoint_files import path_of
from variator.toolkit.families import FAMILIES, family_of
from variator.toolkit.plugin_file import Plugin

RATIOS = (1, 2, 3, 4, 8)
ENCODERS = {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel"}


def lively_plugin(backbone: Backbone, ratio: int) -> Plugin | None:
    """A plugin with no tensor at zero, so that every one of them matters."""
    return None if ratio == 1 else lively(backbone, ratio)


def padded(ids: Tensor, length: int, filler: Callable[[int], Tensor]) -> tuple[Tensor, Tensor]:
    extra = length - ids.shape[1]
    mask = torch.cat([torch.ones_like(ids), torch.zeros(1, extra, dtype=torch.int64)], dim=1)
    return torch.cat([ids, filler(extra).reshape(1, extra)], dim=1), mask


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("auto", "task"),
    [
        ("AutoModel", "hidden"),
        ("AutoModelForSequenceClassification", "classify"),
        ("AutoModelForQuestionAnswering", "qa"),
    ],
)
def test_ratio_1_is_transformers_model(kind: str, auto: str, task: str, tmp_path: Path) -> None:
    if kind.startswith("nomic") and task == "qa":
        pytest.skip("transformers has no such class")
    write_checkpoint(kind, tmp_path / "model", auto, num_labels=3 if task == "classify" else 2)
    if (kind, task) in HEADLESS:
        with pytest.raises(BackboneError, match=f"{task} is not supported"):
            load_backbone(str(tmp_path / "model"))
        return
    loaded = load_backbone(str(tmp_path / "model"))
    assert loaded.task == task
    ids = torch.randint(5, 120, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    ids[1, 6:] = loaded.original.config.pad_token_id
    feed = {"input_ids": ids, "attention_mask": mask}
    if loaded.token_types:
        feed["token_type_ids"] = torch.randint(0, 2, (2, 9)) * mask
    original = getattr(transformers, ENCODERS.get(kind.split(",")[0], auto)).from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        found, expected = loaded.model(**feed), original(**feed)
    for name, values in zip(loaded.outputs, found, strict=True):
        real = slice(None) if name == "logits" else mask.bool()
        torch.testing.assert_close(values[real], expected[name][real], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_amount_of_padding_and_its_ids_do_not_change_a_result(backbone: Backbone, ratio: int) -> None:
    module = Compressed(backbone.model, lively_plugin(backbone, ratio)).eval()
    for length in (1, 5, 8, 13):
        ids = torch.randint(5, 120, (1, length))
        alone = module(ids, torch.ones_like(ids))[0]
        for total in (length + 1, length + 3, 31):
            for filler in (torch.zeros, lambda n: torch.full((n,), 7), lambda n: torch.randint(0, 120, (n,))):
                found = module(*padded(ids, total, lambda n, f=filler: f(n).long()))[0]  # type: ignore[misc]
                torch.testing.assert_close(found, alone, rtol=0, atol=1e-6)


@pytest.mark.parametrize("ratio", RATIOS)
def test_neighbours_and_position_in_the_batch_do_not_change_a_result(backbone: Backbone, ratio: int) -> None:
    module = Compressed(backbone.model, lively_plugin(backbone, ratio)).eval()
    rows = [torch.randint(5, 120, (1, length)) for length in (11, 3, 7, 1)]
    alone = [module(row, torch.ones_like(row))[0] for row in rows]
    for order in ((0, 1, 2, 3), (3, 2, 1, 0), (2, 0), (1, 3, 0)):
        parts = [padded(rows[i], 11, lambda n: torch.zeros(n, dtype=torch.int64)) for i in order]
        found = module(torch.cat([ids for ids, _ in parts]), torch.cat([mask for _, mask in parts]))[0]
        torch.testing.assert_close(found, torch.cat([alone[i] for i in order]), rtol=0, atol=1e-6)


def test_every_ratio_gives_another_result(backbone: Backbone) -> None:
    ids = torch.randint(5, 120, (2, 16))
    results = [
        Compressed(backbone.model, lively_plugin(backbone, k)).eval()(ids, torch.ones_like(ids))[0] for k in RATIOS
    ]
    for index, first in enumerate(results):
        assert all((first - second).abs().max() > 1e-3 for second in results[index + 1 :])


def test_a_ratio_that_does_not_divide_the_limit_still_serves_the_longest_input(backbone: Backbone) -> None:
    ids = torch.randint(5, 120, (1, 160))
    for ratio in (3, 7):
        output = Compressed(backbone.model, lively_plugin(backbone, ratio)).eval()(ids, torch.ones_like(ids))[0]
        assert torch.isfinite(output).all()


@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token", "max_tokens", "mean_sqrt_len_tokens"])
def test_pooling_is_sentence_transformers_own(pooling: str, tmp_path: Path) -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    make_sentence_transformer(write_checkpoint("bert", tmp_path / "model"), pooling)
    loaded = load_backbone(str(tmp_path / "model"))
    texts = ["w1 w2 w3 a b c", "w9"]
    batch = loaded.tokenizer(texts, padding=True, return_tensors="pt")
    found = loaded.model(batch["input_ids"], batch["attention_mask"])[0]
    expected = sentence_transformers.SentenceTransformer(str(tmp_path / "model"), device="cpu").encode(texts)
    torch.testing.assert_close(found, torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_an_embedder_is_recognised_and_its_own_limit_kept(backbone: Backbone) -> None:
    assert (backbone.task, backbone.max_length, backbone.token_types) == ("embed", 150, False)


def test_the_task_can_be_overridden(checkpoint: Path) -> None:
    assert load_backbone(str(checkpoint), task="hidden").outputs == ("last_hidden_state",)
    with pytest.raises(BackboneError, match="lacks"):
        load_backbone(str(checkpoint), task="qa")
    with pytest.raises(InputError, match="unknown task"):
        load_backbone(str(checkpoint), task="translate")


def test_an_unsupported_architecture_lists_those_that_are() -> None:
    with pytest.raises(BackboneError, match="gpt2") as error:
        family_of("gpt2")
    assert all(kind in str(error.value) for family in FAMILIES for kind in family.model_types)


def test_relative_positions_and_unknown_activations_are_refused(tmp_path: Path) -> None:
    write_checkpoint("bert", tmp_path / "a", hidden_act="laplace")
    with pytest.raises(BackboneError, match="laplace"):
        load_backbone(str(tmp_path / "a"))


@pytest.mark.parametrize("model", ["./nothing-here", "/nowhere/at/all", "no-org/no-model-of-that-name"])
def test_a_checkpoint_that_is_not_there_is_one_clear_error(model: str) -> None:
    with pytest.raises(BackboneError):
        load_backbone(model)


def test_code_in_a_model_directory_is_not_run(tmp_path: Path) -> None:
    write_checkpoint("bert", tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(
        config.read_text().replace("{", '{"auto_map": {"AutoModel": "evil.Model", "AutoConfig": "evil.C"},', 1)
    )
    (tmp_path / "model" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    load_backbone(str(tmp_path / "model"))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("models.Normalize", "models.Dense", "Dense"),
        ("models.Normalize", "models.LSTM", "LSTM"),
        ("models.Pooling", "models.Normalize", "Normalize"),
    ],
)
def test_chains_of_modules_we_do_not_compute_are_refused(
    checkpoint: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:

    modules = shutil.copytree(checkpoint, tmp_path / "copy") / "modules.json"
    text = modules.read_text().replace(old, new)
    modules.write_text(text if new != "models.Dense" else text.replace("]", ', {"path": "3", "type": "models.Dense"}]'))
    with pytest.raises(BackboneError, match=message):
        load_backbone(str(tmp_path / "copy"))


def test_lowercasing_outside_the_tokenizer_is_refused(checkpoint: Path, tmp_path: Path) -> None:

    settings = shutil.copytree(checkpoint, tmp_path / "copy") / "sentence_bert_config.json"
    settings.write_text(settings.read_text().replace("false", "true"))
    with pytest.raises(BackboneError, match="do_lower_case"):
        load_backbone(str(tmp_path / "copy"))


def test_a_pooling_folder_outside_the_model_is_refused(checkpoint: Path, tmp_path: Path) -> None:

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    modules = copy / "modules.json"
    modules.write_text(modules.read_text().replace('"1_Pooling"', '"../elsewhere"'))
    with pytest.raises(BackboneError, match="outside"):
        load_backbone(str(copy))


REVISION = "0123456789abcdef0123456789abcdef01234567"


def test_a_file_is_absent_only_where_the_hub_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "models--acme--tiny"
    (repository / "snapshots" / REVISION).mkdir(parents=True)
    (repository / "snapshots" / REVISION / "modules.json").write_text("[]")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(404)
            self.send_header("X-Error-Code", "EntryNotFound")
            self.send_header("X-Repo-Commit", REVISION)
            self.end_headers()

        def log_message(self, *what: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        url = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its tries to reach somebody
        with pytest.warns(UserWarning, match=r"prompt\.json of 'acme/tiny' is not in the cache"):
            assert path_of("acme/tiny", "prompt.json") is None
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        Thread(target=server.serve_forever).start()
        try:
            assert path_of("acme/tiny", "prompt.json") is None
        finally:
            server.shutdown()
    assert path_of("acme/tiny", "modules.json") is not None, "not reachable, but cached"
    with pytest.raises(BackboneError, match=r"cannot find out whether(.|\n)*go online once"):
        path_of("acme/tiny", "sentence_bert_config.json")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert path_of("acme/tiny", "prompt.json") is None, "the hub has said so before"
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert path_of("acme/tiny", "prompt.json") is None


def test_a_hub_id_is_loaded_from_the_hub_libraries_cache(checkpoint: Path, tmp_path: Path) -> None:
    """As after a download: the cache's own layout, a fresh process, no network."""
    repository = tmp_path / "hub" / "models--acme--tiny"
    shutil.copytree(checkpoint, repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    show = "print(b.id, b.task, b.max_length, b.fingerprint)"
    code = f"from variator import load_backbone; b = load_backbone('acme/tiny'); {show}"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["acme/tiny", "embed", "150", load_backbone(str(checkpoint)).fingerprint]
