"""A plugin as inputs of a shared graph: every operand stacked over the layers, with the task head beside them.

The contract between `exporters` (which makes the inputs), `engines` (which hold them on the device) and the numeric
gate. Needs numpy only. Ratio and rank are read from the shapes, so one graph serves them all. The stacks are fp16,
as plugin files are: half the memory, and the graph widens a layer's part when it uses it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from variator.errors import PluginError
from variator.toolkit.bundle import Bundle, Manifest, SharedProfile
from variator.toolkit.plugin_file import Head, Plugin, half, heads_agree, load_plugin
from variator.toolkit.plugin_format import Key, layer_operands

Inputs = dict[str, npt.NDArray[Any]]

LOGITS = "logits"
"""Output of the head."""

HEAD_INPUTS = ("head.weight", "head.bias")
"""[d, classes] and [classes], fp32: the classifier on the embedding."""

PLUGIN_INPUTS: dict[str, tuple[str, ...]] = {
    "plugin.ffn.score.weight": ("layers", "group", "ratio"),
    "plugin.ffn.score.bias": ("layers", "ratio"),
    "plugin.ffn.down_group.weight": ("layers", "hidden", "rank"),
    "plugin.ffn.down_token.weight": ("layers", "hidden", "rank"),
    "plugin.ffn.down.bias": ("layers", "rank"),
    "plugin.ffn.up.weight": ("layers", "rank", "hidden"),
    "plugin.ffn.up.bias": ("layers", "hidden"),
}
"""`plugin.<site>.<operand>` and the names of its dimensions; group = ratio x hidden. See `plugin_format.operands`."""


RATIO_INPUT = "plugin.ffn.score.bias"
"""The input whose second dimension is the ratio."""


def shapes(layers: int, hidden: int, ratio: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the plugin inputs."""
    sizes = {"layers": layers, "hidden": hidden, "ratio": ratio, "rank": rank, "group": ratio * hidden}
    return {name: tuple(sizes[dimension] for dimension in dims) for name, dims in PLUGIN_INPUTS.items()}


def stack(plugin: Plugin) -> Inputs:
    """The plugin inputs of one plugin: fp16, by name.

    Raises:
        PluginError: If a value does not fit fp16.
    """
    layers = [layer_operands(plugin.tensors, layer) for layer in range(plugin.layers)]
    inputs: Inputs = {}
    for name in PLUGIN_INPUTS:
        _, site, operand = name.split(".", 2)
        inputs[name] = half(np.stack([layer[site][operand] for layer in layers]), operand, plugin.config.key)
    return inputs


def neutral(layers: int, hidden: int) -> Inputs:
    """Plugin inputs of ratio 1, rank 1, all zero: with them a shared graph computes the backbone itself."""
    return {name: np.zeros(shape, np.float16) for name, shape in shapes(layers, hidden, 1, 1).items()}


def head_inputs(head: Head | None, hidden: int) -> Inputs:
    """The head inputs, as copies; without a head one class of zeros, whose logits nobody reads."""
    weight = np.zeros((1, hidden)) if head is None else head.weight
    bias = np.zeros(1) if head is None else head.bias
    # Copies: a runtime keeps them without copying, and the caller's arrays are his to change.
    copies = (np.array(value, np.float32, order="C") for value in (weight.T, bias))
    return dict(zip(HEAD_INPUTS, copies, strict=True))


def graph_inputs(shared: SharedProfile | None, hidden: int, plugin: Plugin | None, head: Head | None) -> Inputs:
    """What a graph takes beside the tokens, without a plugin that of ratio 1; nothing if its plugin is compiled in."""
    if shared is None:
        return {}
    return (stack(plugin) if plugin else {}) | (head_inputs(head, hidden) if shared.head else {})


def inputs_of(bundle: Bundle, ratio: Key, head: Head | None = None) -> Inputs:
    """What a ratio's graph takes beside the tokens: its plugin from the bundle, and a head. Empty for `per-ratio`.

    Args:
        head: In place of the plugin's own.

    Raises:
        BundleError, PluginError: If the plugin file has changed, is damaged or does not fit.
    """
    manifest = bundle.manifest
    plugin = bundle_plugin(bundle, ratio)
    if head is None and bundle.ratio(ratio).head:
        head = plugin.head if plugin else _common_head(bundle)
    return graph_inputs(manifest.shared, manifest.hidden_size, plugin, head)


def _common_head(bundle: Bundle) -> Head | None:
    """The head that all plugins of a bundle bring, as its manifest says: that of ratio 1."""
    found = (bundle_plugin(bundle, ratio) for ratio in bundle.ratios)
    plugins = [plugin for plugin in found if plugin]
    if not plugins or not heads_agree(plugins):
        raise PluginError(f"the plugins of {bundle.path} do not bring the same head", fix="export again")
    return plugins[0].head


def neutral_inputs(bundle: Bundle, head: Head | None = None) -> Inputs:
    """What the shared graph of a bundle takes to compute ratio 1."""
    m = bundle.manifest
    return neutral(m.layers, m.hidden_size) | graph_inputs(m.shared, m.hidden_size, None, head)


def bundle_plugin(bundle: Bundle, ratio: Key) -> Plugin | None:
    """The plugin file of a shared bundle, checked like any that is plugged in; None for ratio 1."""
    name = bundle.ratio(ratio).plugin
    if not name:
        return None
    bundle.verify(name)
    plugin = load_plugin(bundle.path / name)
    if plugin.config.key != ratio:
        raise PluginError(
            f"{bundle.path / name} holds ratio {plugin.config.key}", valid=f"ratio {ratio}", fix="export again"
        )
    if (plugin.head is not None) != bundle.ratio(ratio).head:
        raise PluginError(
            f"{bundle.path / name} brings {'a' if plugin.head else 'no'} head, the manifest says otherwise",
            fix="export again",
        )
    check_fits(plugin, bundle.manifest, str(bundle.path / name))
    return plugin


def check_fits(plugin: Plugin, manifest: Manifest, where: str) -> None:
    """Whether a bundle's shared graph can run a plugin.

    Args:
        where: What the plugin is called in the error.

    Raises:
        PluginError: If it is for another backbone, damaged, or beyond what the graph was made for.
    """
    shared = manifest.shared
    if shared is None:
        raise PluginError(
            f"{where}: the plugins of {manifest.model} are compiled into its graphs (layout {manifest.layout})",
            valid="a bundle with layout shared",
            fix="export again with --layout shared",
        )
    sizes = (manifest.layers, manifest.hidden_size)
    plugin.check_backbone(manifest.backbone, manifest.model, manifest.family, sizes)
    plugin.check_tensors(where)
    plugin.check_plain(where)
    _check_limit(where, "rank", plugin.config.rank, shared.max_rank)
    _check_limit(where, "ratio", plugin.config.ratio, shared.max_ratio)
    if plugin.config.activation != shared.activation:
        raise PluginError(
            f"{where} has activation {plugin.config.activation}",
            valid=f"{shared.activation}, which is built into the shared graph",
            fix=f"train it with --activation {shared.activation}, or export it into a bundle of its own",
        )
    if plugin.head is not None:
        check_head(plugin.head, manifest, where)


def check_head(head: Head, manifest: Manifest, where: str) -> None:
    """Raise `PluginError` unless the shared graph takes this head."""
    if manifest.shared is None or not manifest.shared.head:
        raise PluginError(
            f"{where} brings a head, and the shared graph of task {manifest.task} takes none",
            valid="a head on a bundle of task embed",
        )
    if head.weight.shape[1] != manifest.hidden_size:
        raise PluginError(f"{where}: the head reads {head.weight.shape[1]} values", valid=f"{manifest.hidden_size}")
    _check_limit(where, "number of classes", len(head.bias), manifest.shared.max_classes)


def _check_limit(where: str, what: str, found: int, most: int) -> None:
    if found > most:
        raise PluginError(
            f"{where}: {what} {found} is beyond the profile of the shared graph",
            valid=f"1 to {most}",
            fix="export a bundle of its own with this plugin, or train a smaller one",
        )
