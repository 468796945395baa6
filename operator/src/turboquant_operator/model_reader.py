"""Reads public models beside the reconciles: a hub that is slow or silent must not hold up other objects."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from turboquant_operator.api.spec import Model
from turboquant_operator.model_source import read_public_model
from turboquant_operator.planner.facts import Document
from turboquant_operator.planner.outcome import NoPlan, unknown

PATIENCE_SECONDS = 2.0
"""How long a pass waits for a model: most are read by then, and the object's status does not flicker."""

KEPT_SECONDS = 30.0
"""How long an answer stands. A failed reading is not repeated at every event of the object."""

THREADS = 4

ReadPublicModel = Callable[[Model], Document | NoPlan]


class ModelReader:
    """Readings that go on or have just ended, one for all objects that ask for the same model."""

    def __init__(self, read: ReadPublicModel = read_public_model) -> None:
        self._read = read
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="model-reader")
        self._readings: dict[Model, asyncio.Future[Document | NoPlan]] = {}

    async def read(self, model: Model, wake: Callable[[], None]) -> Document | NoPlan:
        """The model's document, or why there is none. If it takes long, `wake` is called when it is there."""
        reading = self._readings.get(model)
        if reading is None:
            loop = asyncio.get_running_loop()
            reading = loop.run_in_executor(self._threads, self._read, model)
            reading.add_done_callback(lambda _: loop.call_later(KEPT_SECONDS, self._readings.pop, model))
            self._readings[model] = reading
        # Not wait_for, which would cancel the reading for whoever else waits for it.
        await asyncio.wait({reading}, timeout=PATIENCE_SECONDS)
        if reading.done():
            return reading.result()
        reading.add_done_callback(lambda _: wake())
        return unknown("ReadingModel", f"The configuration of {model.uri} is being read.")
