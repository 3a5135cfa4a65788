"""The bundle on disk: the manifest's fields, reading it with suspicion, writing it last.

Needs neither torch nor onnx: a serving machine opens bundles with this module alone.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from variator.errors import BundleError, InputError
from variator.files import inside, sha256_of, write_atomically
from variator.toolkit.plugin_format import PLUGIN_FORMAT, Key, PluginConfig, in_order, parse_key
from variator.toolkit.prompt import Prompt

FORMAT_VERSION = 4
READABLE = (1, 2, 3, 4)
"""Version 1 had no layout but `per-ratio`, version 2 no decoder."""

MANIFEST = "manifest.json"
PER_RATIO, SHARED = "per-ratio", "shared"
LAYOUTS = (PER_RATIO, SHARED)
"""One graph per ratio with its plugin in it, or one graph for all ratios with the plugin as inputs."""

SHARED_GRAPH = "shared.onnx"
GATE_FILE = "gate.safetensors"
"""Inputs and PyTorch outputs that every artefact made from the bundle is compared with."""

DECODER_GRAPH, DECODER_GATE_FILE = "decoder.onnx", "gate-decoder.safetensors"
"""Of a seq2seq bundle: one decoder for all ratios, and what it is compared with."""


_KINDS: dict[str, type] = {
    "str": str,
    "int": int,
    "bool": bool,
    "list[str]": list,
    "list[int]": list,
    "dict[str, str]": dict,
}


@dataclass(frozen=True)
class RatioEntry:
    """One ratio of a bundle.

    Args:
        graph: File name of its ONNX graph; the same for all ratios above 1 in a shared layout.
        plugin: File name of its plugin in a shared layout, else empty.
        head: Whether that plugin brings a task head; at ratio 1, whether all plugins bring the same.
        plugin_sha256: Of the plugin's fp32 tensors (`Plugin.digest`); empty for ratio 1.
        plugin_parameters: Number of parameters the plugin adds.
        untrained: True if the plugin is for speed measurements only.
        flops: At batch 1, 128 tokens: attention, ffn, plugin, head, total, saved (share of ratio 1's total).
        max_abs_error: Largest difference from the PyTorch reference that the gate saw.
        quality: Scores by split and metric, from the plugin's training record.
        training: That record.
        setting: What the plugin is, `PluginConfig.header`; empty for ratio 1.
    """

    graph: str
    plugin_sha256: str = ""
    plugin_parameters: int = 0
    rank: int = 0
    activation: str = ""
    untrained: bool = False
    flops: dict[str, float] = field(default_factory=dict)
    max_abs_error: float = 0.0
    quality: dict[str, float] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    plugin: str = ""
    head: bool = False
    setting: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.setting:
            PluginConfig(**self.setting)  # one that is none fails here

    @property
    def summary(self) -> str:
        """The plugin in words; for bundles that were written without `setting` its rank and activation."""
        return PluginConfig(**self.setting).summary if self.setting else f"rank {self.rank}, {self.activation}"


@dataclass(frozen=True)
class SharedProfile:
    """What the shared graph of a bundle takes.

    Args:
        plugin_format: Format version of the plugins whose operands its inputs are.
        activation: Of the plugins' bottleneck, built into the graph.
        max_ratio, max_rank, max_classes: Largest shapes an engine has to be ready for.
        head: Whether it also takes a classifier on the embedding, and has the output `logits`.
    """

    plugin_format: int
    activation: str
    max_ratio: int
    max_rank: int
    max_classes: int
    head: bool


@dataclass(frozen=True)
class DecoderEntry:
    """The decoder of a seq2seq bundle, the same for all ratios.

    Args:
        graph: File name of its ONNX graph.
        layers: How many it has.
        width: Numbers that are kept of each token, see `toolkit.decoder`.
        start: Token that every text begins with.
        ends: Tokens that end a text.
        pad: Token that fills up.
        parameters: Its own, without the embeddings that it shares with the encoder.
        flops: Of one token with 128 of the encoder and 16 before it: attention, ffn, head (the vocabulary), total;
            `first`: of the first, which reads the 128, too.
        max_abs_error: Largest difference from transformers' own decoder that the gate saw.
    """

    graph: str
    layers: int
    width: int
    start: int
    ends: list[int]
    pad: int
    parameters: int
    flops: dict[str, float]
    max_abs_error: float


@dataclass(frozen=True)
class Picture:
    """What a vision model reads, in pixels.

    Args:
        size: Of a side.
        patch: Side of a patch, which becomes one vector.
        token: Whether a class token stands before the patches.
    """

    size: int
    patch: int
    channels: int
    token: bool = False

    @property
    def patches(self) -> int:
        """How many there are."""
        return (self.size // self.patch) ** 2


@dataclass(frozen=True)
class FileEntry:
    """Size and hash of one file of the bundle."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a bundle says about itself; the fields of `manifest.json`.

    Args:
        labels: Of a classifier's classes, in order; empty for other tasks, and in bundles written before it was there.
        vocabulary: 0 for models that read pictures.
        max_length: Longest sequence in tokens; of pictures the only one, in patches.
        prompt: What a classifier that writes is asked; texts go in there.
    """

    versions: dict[str, str]
    model: str
    family: str
    task: str
    pooling: dict[str, Any]
    hidden_size: int
    layers: int
    vocabulary: int
    parameters: int
    max_length: int
    precision: str
    inputs: list[str]
    outputs: list[str]
    backbone: str
    real: bool
    ratios: dict[Key, RatioEntry]
    files: dict[str, FileEntry]
    layout: str = PER_RATIO
    shared: SharedProfile | None = None
    labels: list[str] = field(default_factory=list)
    decoder: DecoderEntry | None = None
    picture: Picture | None = None
    prompt: Prompt | None = None
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """JSON text of the manifest."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @staticmethod
    def from_json(text: str, place: str) -> Manifest:
        """Parse and check a manifest.

        Raises:
            BundleError: If it is not JSON, of an unknown version, or a field is missing or of the wrong kind.
        """
        fix = "export again with `variator export`"
        try:
            data = json.loads(text)
        except ValueError as error:
            raise BundleError(f"{place} is not JSON: {error}", fix=fix) from error
        version = data.pop("format_version", None) if isinstance(data, dict) else None
        if version not in READABLE or isinstance(version, bool):
            raise BundleError(
                f"{place} has bundle format version {version!r}",
                valid=", ".join(map(str, READABLE)),
                fix="use the version of variator that wrote it, or export again",
            )
        try:
            ratios = {parse_key(ratio): RatioEntry(**entry) for ratio, entry in data.pop("ratios").items()}
            files = {name: FileEntry(**entry) for name, entry in data.pop("files").items()}
            profile = data.pop("shared", None)
            shared = None if profile is None else SharedProfile(**profile)
            entry = data.pop("decoder", None)
            decoder = None if entry is None else DecoderEntry(**entry)
            entry = data.pop("picture", None)
            picture = None if entry is None else Picture(**entry)
            entry = data.pop("prompt", None)
            prompt = None if entry is None else Prompt(**entry)
            manifest = Manifest(
                ratios=ratios, files=files, shared=shared, decoder=decoder, picture=picture, prompt=prompt, **data
            )
        except (TypeError, ValueError, KeyError, AttributeError, InputError) as error:
            raise BundleError(f"{place} is damaged: {error}", fix=fix) from error
        beside = [part for part in (shared, decoder, picture) if part is not None]
        parts: list[Part] = [manifest, *ratios.values(), *beside]
        wrong = [problem for part in parts for problem in _wrong_kinds(part)] or _wrong_layout(manifest)
        if wrong:
            raise BundleError(f"{place} is damaged: {'; '.join(wrong)}", fix=fix)
        if shared is not None and shared.plugin_format != PLUGIN_FORMAT:
            raise BundleError(
                f"the shared graph of {place} takes plugins of format version {shared.plugin_format}",
                valid=str(PLUGIN_FORMAT),
                fix="use the version of variator that wrote it, or export again",
            )
        return manifest


Part = Manifest | RatioEntry | SharedProfile | DecoderEntry | Picture


def _wrong_kinds(part: Part) -> list[str]:
    """Fields that hold something else than they are declared to."""
    return [
        f"{entry.name} is {getattr(part, entry.name)!r}"
        for entry in dataclasses.fields(part)
        if entry.type in _KINDS
        and (
            not isinstance(getattr(part, entry.name), _KINDS[str(entry.type)])
            or (entry.type == "int" and isinstance(getattr(part, entry.name), bool))
        )
    ]


def _wrong_layout(manifest: Manifest) -> list[str]:
    """What contradicts the layout: every ratio needs its graph and, where that is shared, its plugin."""
    if manifest.layout not in LAYOUTS:
        return [f"layout is {manifest.layout!r}, not one of {', '.join(LAYOUTS)}"]
    if (manifest.layout == SHARED) != (manifest.shared is not None):
        return [f"layout {manifest.layout} {'lacks' if manifest.layout == SHARED else 'has'} a shared profile"]
    wrong = [] if 1 in manifest.ratios else ["ratio 1 is not listed"]
    sizes = ("hidden_size", "layers", "max_length", *(() if manifest.picture else ("vocabulary",)))
    wrong += [f"{name} is {getattr(manifest, name)}" for name in sizes if getattr(manifest, name) < 1]
    seen = manifest.picture
    if seen is not None and (min(seen.size, seen.patch, seen.channels) < 1 or seen.size % seen.patch):
        wrong.append(f"pictures of {seen.size} in patches of {seen.patch}")
    elif seen is not None and seen.patches + seen.token != manifest.max_length:
        wrong.append(f"{seen.patches} patches where max_length is {manifest.max_length}")
    for ratio, entry in manifest.ratios.items():
        through_shared = manifest.layout == SHARED and ratio != 1
        if bool(entry.plugin) != through_shared or (entry.graph == SHARED_GRAPH) != through_shared:
            wrong.append(f"ratio {ratio} has graph {entry.graph!r} and plugin {entry.plugin!r}")
        if entry.head and (manifest.shared is None or not manifest.shared.head or len(manifest.ratios) == 1):
            wrong.append(f"ratio {ratio} has a head")
    named = {name for entry in manifest.ratios.values() for name in (entry.graph, entry.plugin) if name}
    named |= {SHARED_GRAPH} if manifest.layout == SHARED else set()
    named |= {manifest.decoder.graph, DECODER_GATE_FILE} if manifest.decoder else set()
    if (manifest.decoder is not None) != (manifest.task == "seq2seq"):
        wrong.append(f"task {manifest.task} {'has' if manifest.decoder else 'lacks'} a decoder")
    wrong += _wrong_decoder(manifest.decoder, manifest.vocabulary) if manifest.decoder is not None else []
    if (manifest.inputs == ["pixel_values"]) != (manifest.picture is not None):
        wrong.append(f"inputs are {', '.join(map(str, manifest.inputs))}")
    return [*wrong, *(f"{name!r} is not listed" for name in sorted(named - manifest.files.keys()))]


def _wrong_decoder(decoder: DecoderEntry, vocabulary: int) -> list[str]:
    wrong = [] if decoder.graph == DECODER_GRAPH else [f"the decoder's graph is {decoder.graph!r}"]
    if min(decoder.width, decoder.layers) < 1:
        wrong.append(f"the decoder has {decoder.layers} layers of {decoder.width}")
    special = [decoder.start, decoder.pad, *decoder.ends]
    if not decoder.ends or not all(type(one) is int and 0 <= one < vocabulary for one in special):
        wrong.append(f"the decoder's special tokens are {special}")
    return wrong


@dataclass(frozen=True)
class Bundle:
    """An exported model on disk."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: Path | str) -> Bundle:
        """Open a bundle: parse its manifest and compare every listed file's size. Hashes: see `verify`.

        Raises:
            BundleError: If it is not a bundle, or a file is missing, of another size, or outside of it.
        """
        path = Path(path)
        place = path / MANIFEST
        try:
            text = place.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise BundleError(
                f"{path} is not a bundle: cannot read {MANIFEST} ({error})",
                valid="a directory written by `variator export`",
            ) from error
        bundle = Bundle(path, Manifest.from_json(text, str(place)))
        for name, entry in bundle.manifest.files.items():
            file = inside(path, name)
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                found = "missing" if size is None else f"{size} bytes long"
                raise BundleError(
                    f"{file} is {found}", valid=f"{entry.bytes} bytes", fix="copy the bundle again, or export again"
                )
        return bundle

    def verify(self, *names: str) -> None:
        """Hash the named files, or all, and compare with the manifest.

        Raises:
            BundleError: If one differs.
        """
        for name in names or self.manifest.files:
            if sha256_of(inside(self.path, name)) != self.manifest.files[name].sha256:
                raise BundleError(
                    f"{self.path / name} has changed since it was exported (sha256 differs)",
                    fix="copy the bundle again, or export again",
                )

    @property
    def ratios(self) -> list[Key]:
        """The ratios it holds, ascending, then other settings by name."""
        return in_order(self.manifest.ratios)

    @property
    def untrained(self) -> bool:
        """Whether any plugin in it was never trained."""
        return any(entry.untrained for entry in self.manifest.ratios.values())

    def ratio(self, ratio: Key) -> RatioEntry:
        """The entry of a ratio.

        Raises:
            InputError: If the bundle has none; lists those it has.
        """
        if isinstance(ratio, bool) or ratio not in self.manifest.ratios:
            raise InputError(
                f"ratio {ratio!r} is not in {self.path}",
                valid=", ".join(map(str, self.ratios)),
                fix="export the model again with all the ratios you need, into a new bundle",
            )
        return self.manifest.ratios[ratio]

    def graph(self, ratio: Key) -> Path:
        """Path of a ratio's ONNX graph."""
        return inside(self.path, self.ratio(ratio).graph)

    @property
    def graphs(self) -> list[Path]:
        """Paths of all its graphs, ratio 1 first; a shared one even if no ratio uses it yet; a decoder."""
        beside = [SHARED_GRAPH] if self.manifest.layout == SHARED else []
        beside += [self.manifest.decoder.graph] if self.manifest.decoder else []
        found = [*(self.graph(ratio) for ratio in self.ratios), *(inside(self.path, name) for name in beside)]
        return list(dict.fromkeys(found))


def write_manifest(directory: Path, manifest: Manifest) -> Bundle:
    """Write the manifest last and read it back."""
    write_atomically(directory / MANIFEST, manifest.to_json())
    bundle = Bundle.open(directory)
    bundle.verify()
    return bundle


def list_files(directory: Path, *names: str) -> dict[str, FileEntry]:
    """Every file in a flat directory but the manifest, or those named, with size and hash."""
    return {
        path.name: FileEntry(path.stat().st_size, sha256_of(path))
        for path in sorted(directory.iterdir())
        if path.is_file() and path.name != MANIFEST and (not names or path.name in names)
    }
