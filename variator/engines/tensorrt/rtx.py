"""What TensorRT-RTX alone has: kernels made when they are needed, and CUDA graphs that it captures by itself."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

from variator.errors import VariatorError
from variator.files import write_atomically


class JustInTime:
    """How the contexts of one plan make and keep their kernels.

    All kernels of a shape are made before its first run is answered, never swapped in the middle of serving. What was
    made is kept in a file, so that the next process finds it.
    """

    def __init__(self, library: ModuleType, engine: Any, file: Path) -> None:
        self._file, self._before = file, b""
        self.config = engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(library.ExecutionContextAllocationStrategy.USER_MANAGED)
        self.config.cuda_graph_strategy = library.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
        self.config.dynamic_shapes_kernel_specialization_strategy = (
            library.DynamicShapesKernelSpecializationStrategy.EAGER
        )
        self._cache = self.config.create_runtime_cache()
        if file.exists():
            self._before = file.read_bytes()
            self._cache.deserialize(self._before)  # refuses what is of another driver; it is made anew then
        self.config.set_runtime_cache(self._cache)

    def save(self) -> None:
        """Keep what was made, where that can be written."""
        made = bytes(self._cache.serialize())
        if made != self._before:
            try:
                write_atomically(self._file, made)
            except VariatorError:
                return  # a read-only bundle: the next process makes them again
