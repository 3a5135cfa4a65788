"""The JSON files of a checkpoint beside its configuration, from a directory or the hub libraries' cache."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

from variator.errors import BackboneError, InputError
from variator.toolkit import prompt
from variator.toolkit.prompt import Prompt

SENTENCE_TRANSFORMERS = [
    ["Transformer", "Pooling"],
    ["Transformer", "Pooling", "Normalize"],
    ["Transformer", "Pooling", "Dense"],
    ["Transformer", "Pooling", "Dense", "Normalize"],
]
"""Chains of sentence-transformers modules that `heads.EmbedHead` computes."""


def path_of(model: str, name: str) -> Path | None:
    """A file of a checkpoint by its name in there; None if it has none such.

    Args:
        model: Directory or hub id.

    Raises:
        BackboneError: If the name leads out of the directory, or the hub cannot be asked.
    """
    directory = Path(model)
    if directory.exists():
        path = directory / name
        if not path.resolve().is_relative_to(directory.resolve()):
            raise BackboneError(f"modules.json names a path outside the model directory: {name!r}")
        return path if path.exists() else None
    return _of_hub(model, name)


def _of_hub(model: str, name: str) -> Path | None:
    """Only the hub's own word, now or when the cache was filled, makes a file absent."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
    from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError

    try:
        return Path(hf_hub_download(model, name))
    except RemoteEntryNotFoundError:
        return None
    except Exception as error:  # the libraries underneath have kinds of their own for what is not reachable
        if try_to_load_from_cache(model, name) is _CACHED_NO_EXIST:
            return None
        if isinstance(error, LocalEntryNotFoundError) and is_offline_mode():
            warnings.warn(f"{name} of {model!r} is not in the cache; offline, it is taken to have none", stacklevel=2)
            return None
        raise BackboneError(
            f"cannot find out whether {model!r} has a file {name}: {str(error).strip() or type(error).__name__}",
            valid="a hub id that this machine can reach or has cached, or a directory",
            fix="go online once, or download the checkpoint to a local directory",
        ) from error


def read_json(model: str, name: str) -> Any:
    """What a JSON file of a checkpoint holds; None if it has none such.

    Raises:
        BackboneError: As `path_of`, and for a file that is not JSON.
    """
    path = path_of(model, name)
    try:
        return None if path is None else json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BackboneError(f"{name} of {model!r} is not valid JSON: {error}") from error


def read_prompt(model: str) -> Prompt | None:
    """How a checkpoint that writes is asked for a class; None if it says nothing of it.

    Raises:
        BackboneError: If the file is damaged.
    """
    data = read_json(model, prompt.FILE)
    try:
        return None if data is None else Prompt.of(data, f"{prompt.FILE} of {model!r}")
    except InputError as error:
        raise BackboneError(f"{prompt.FILE} of {model!r}: {error}") from error


def sentence_transformers(model: str) -> dict[str, Any]:
    """The files that make a checkpoint a sentence-transformers model, and its Dense weights, by name; else nothing.

    Raises:
        BackboneError: For modules that are not supported.
    """
    modules = read_json(model, "modules.json")
    if modules is None:
        return {}
    kinds = [str(module["type"]).rsplit(".", 1)[-1] for module in modules]
    if kinds not in SENTENCE_TRANSFORMERS:
        raise BackboneError(
            f"sentence-transformers modules {', '.join(kinds)} are not supported",
            valid="; ".join(", ".join(known) for known in SENTENCE_TRANSFORMERS),
        )
    if (read_json(model, "sentence_bert_config.json") or {}).get("do_lower_case"):
        raise BackboneError(
            f"{model!r} lowercases texts outside its tokenizer (do_lower_case in sentence_bert_config.json)",
            valid="do_lower_case false",
            fix="let the tokenizer lowercase, and set it to false",
        )
    files: dict[str, Any] = {
        "modules.json": modules,
        "sentence_bert_config.json": read_json(model, "sentence_bert_config.json") or {},
    }
    for module in modules:
        kind, folder = str(module["type"]).rsplit(".", 1)[-1], str(module["path"])
        if kind in ("Pooling", "Dense"):
            files[kind] = read_json(model, f"{folder}/config.json")
        if kind == "Dense":
            files["Dense weights"] = path_of(model, f"{folder}/model.safetensors")
        if kind == "Normalize":
            files[kind] = True
    return files
