"""The one base error of the package: every error says what is wrong, what would be valid, and the fix.

Raised everywhere; printed as one block by `variator.cli`, which turns it into exit status 1.
"""

from __future__ import annotations


class VariatorError(Exception):
    """A failure that the user can act on.

    Args:
        what: What is wrong, with the offending value.
        valid: What would have been accepted.
        fix: What to do about it, a command where there is one.
    """

    def __init__(self, what: str, *, valid: str = "", fix: str = "") -> None:
        self.what, self.valid, self.fix = what, valid, fix
        lines = [what]
        if valid:
            lines.append(f"valid: {valid}")
        if fix:
            lines.append(f"fix: {fix}")
        super().__init__("\n".join(lines))


class InputError(VariatorError):
    """An argument, option or request that cannot be served."""


class PluginError(VariatorError):
    """A plugin file that is damaged or belongs to another backbone."""


class BackboneError(VariatorError):
    """A checkpoint that cannot be loaded or whose architecture is not supported."""


class BundleError(VariatorError):
    """A bundle on disk that is damaged, incomplete or of an unknown version."""


class GateError(VariatorError):
    """An artefact whose numbers differ from the PyTorch reference."""


class EngineError(VariatorError):
    """An engine that is missing, stale, unavailable or refused a request."""


class CorpusError(VariatorError):
    """A text file that cannot be read as a corpus."""


class DeadlineExceeded(VariatorError):  # noqa: N818 - the field's name for it
    """A request that cannot be answered in time, or was not."""


class Overloaded(VariatorError):  # noqa: N818 - the field's name for it
    """A request that was refused because too many are waiting."""
