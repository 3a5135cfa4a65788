"""The models of Triton's Python backend that `variator triton` writes; their `model.py` only names a class from here.

`VariatorModel` embeds the runtime. Triton hands over requests and is let go at once; the runtime's own queue sees all
that waits, chooses the ratio by it, and each answer is sent when it is there. A model that blocked until its requests
are answered would leave the queue in Triton, where no policy sees it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any

import numpy as np
import numpy.typing as npt

from variator.engines.reader import Reader, padded_length
from variator.engines.runtime import Result
from variator.engines.serving import ServeSettings
from variator.errors import EngineError, VariatorError
from variator.serving.service import Opened, OpenSettings
from variator.serving.triton_metrics import TritonMetrics
from variator.serving.triton_request import (
    RATIO,
    error_code,
    read_inputs,
    read_parameters,
)
from variator.toolkit.bundle import MANIFEST, Bundle, Manifest
from variator.toolkit.plugin_format import parse_key

BUNDLE = "bundle"
"""Directory in a version's directory."""


class VariatorModel:
    """The runtime as a Triton model: texts or token ids in, the task's outputs and the ratio that served them out."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle beside this model, load all ratios, start the queue.

        Raises:
            VariatorError: If the engine does not fit this machine or has no table of its latency. Triton reports it as
                the reason why the model is not loaded.
        """
        self._backend = _backend()
        settings = _parameters(args)
        self._ratio = parse_key(settings["ratio"])
        self._patience_ms = float(settings["patience_ms"])
        self._metrics = TritonMetrics(self._backend, {"model": args["model_name"], "version": args["model_version"]})
        serving = ServeSettings(float(settings["slo_ms"]), int(settings["max_queue"]), int(settings["max_rows"]))
        how = OpenSettings(
            settings["engine"], settings["precision"], int(settings["threads"]), settings["policy"], serving
        )
        try:
            self._opened = Opened(_place(args), how, [self._metrics])
        except BaseException:
            self._metrics.close()
            raise
        self._answers: SimpleQueue[tuple[Any, Sequence[str], Future[Result]] | None] = SimpleQueue()
        self._answering = Thread(target=self._answer_all, name="variator-answers", daemon=True)
        self._answering.start()

    def execute(self, requests: Sequence[Any]) -> None:
        """Queue requests; their answers are sent from another thread."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                future = self._submit(request)
            except Exception as error:  # noqa: BLE001 - whatever is wrong with one request is its own answer
                self._send_error(sender, error)
                continue
            future.add_done_callback(partial(self._answered, sender, request.requested_output_names()))

    def _answered(self, sender: Any, wanted: Sequence[str], done: Future[Result]) -> None:
        """Sent at once where nothing waits, else by another thread: the worker has the next batch to run."""
        if self._opened.server.scheduler.requests or not self._answers.empty():
            self._answers.put((sender, wanted, done))
        else:
            self._reply(sender, wanted, done)

    def finalize(self) -> None:
        """Answer what waits and give everything back."""
        try:
            self._opened.runtime.close()
        finally:
            self._answers.put(None)
            self._answering.join()
            self._metrics.close()

    def _submit(self, request: Any) -> Future[Result]:
        asked = read_parameters(request.parameters(), request.timeout(), self._ratio, self._patience_ms)
        inputs = read_inputs(_tensors(request))
        return self._opened.server.submit(inputs, **asked.options(self._opened.server.ratios))

    def _answer_all(self) -> None:
        """Beside the worker, which computes the next batch meanwhile."""
        while (answer := self._answers.get()) is not None:
            self._reply(*answer)

    def _reply(self, sender: Any, wanted: Sequence[str], done: Future[Result]) -> None:
        try:
            response = self._response(done.result(), wanted)
        except Exception as error:  # noqa: BLE001 - an error is the answer
            self._send_error(sender, error)
            return
        self._send(sender, response)

    def _response(self, result: Result, wanted: Sequence[str]) -> Any:
        tensor = self._backend.Tensor
        found = {name: np.ascontiguousarray(values) for name, values in result.outputs.items() if name in wanted}
        if RATIO in wanted:
            found[RATIO] = np.full((len(result.lengths), 1), str(result.ratio).encode(), object)
        return self._backend.InferenceResponse([tensor(name, values) for name, values in found.items()])

    def _send_error(self, sender: Any, error: Exception) -> None:
        self._send(sender, self._backend.InferenceResponse(error=_triton_error(self._backend, error)))

    def _send(self, sender: Any, response: Any) -> None:
        try:
            sender.send(response, flags=self._backend.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
        except Exception as error:  # noqa: BLE001 - who asked is gone; the others still wait for their answers
            print(f"variator: an answer could not be sent: {error}", file=sys.stderr, flush=True)


class TokensModel:
    """Texts in, a graph's inputs out: the front of models that take token ids, and have no Python in them."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the manifest and the tokenizer."""
        self._backend = _backend()
        place = _place(args)
        manifest = Manifest.from_json((place / MANIFEST).read_text(encoding="utf-8"), str(place))
        self._limit = manifest.max_length
        self._reader = Reader(Bundle(place, manifest))

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Tokenise each request; rows are padded to few lengths, so that the next model finds equal shapes to batch."""
        return [self._one(request) for request in requests]

    def _one(self, request: Any) -> Any:
        try:
            asked = read_parameters(request.parameters())
            rows = self._reader.tokenise(read_inputs(_tensors(request)), asked.truncate)
            feed = self._reader.feed(rows, padded_length(max(len(row.ids) for row in rows), self._limit))
        except Exception as error:  # noqa: BLE001 - one request's trouble is its own answer
            return self._backend.InferenceResponse(error=_triton_error(self._backend, error))
        return self._backend.InferenceResponse([self._backend.Tensor(name, values) for name, values in feed.items()])


def _backend() -> Any:
    """Triton's Python module, once it is known to hand arrays over as they are.

    Raises:
        EngineError: If it does not: stubs compiled for numpy 1 give other values with numpy 2, and say nothing.
    """
    import triton_python_backend_utils as backend

    values = np.arange(5)
    sent = backend.Tensor.from_dlpack("probe", backend.Tensor("probe", values).to_dlpack()).as_numpy()
    if not np.array_equal(values, sent):
        raise EngineError(
            f"Triton's Python backend hands over other values than it gets: it does not fit numpy {np.__version__}",
            valid="numpy 1 for Triton's stubs that were compiled for it",
            fix="pip install 'numpy<2' in the environment of the model",
        )
    return backend


def _parameters(args: dict[str, str]) -> dict[str, str]:
    given = json.loads(args["model_config"])["parameters"]
    return {name: str(value["string_value"]) for name, value in given.items()}


def _place(args: dict[str, str]) -> Path:
    return Path(args["model_repository"]) / args["model_version"] / BUNDLE


def _tensors(request: Any) -> dict[str, npt.NDArray[Any]]:
    """The inputs that a request brings, as arrays over Triton's memory."""
    return {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}


def _triton_error(backend: Any, error: Exception) -> Any:
    if not isinstance(error, VariatorError):
        error = EngineError(f"serving failed: {type(error).__name__}: {error}")
    return backend.TritonError(str(error), getattr(backend.TritonError, error_code(error)))
