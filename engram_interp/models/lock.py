"""How do two threads share one model? Whoever attaches hooks or runs a forward holds the model's lock."""

from __future__ import annotations

import threading


class ModelLock:
    """A re-entrant lock that a copied model gets afresh."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: object) -> ModelLock:
        return ModelLock()

    def __reduce__(self) -> tuple[type[ModelLock], tuple[()]]:
        return ModelLock, ()
