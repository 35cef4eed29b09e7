"""One sweep of several processes: what the others find out goes to the first one, which writes all files."""

import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from sparsity.results.rows import Row
from sparsity.results.store import Sweep
from sparsity.system.processes import GLANCE, Ranks

COUNT = "results"  # the key under which results are counted


class DistantSweep(Sweep):
    """The sweep as a process sees it that writes nothing: it knows what the first one told, and sends what it finds."""

    def __init__(self, ranks: Ranks, like: "Sweep"):
        super().__init__(like.files, like.header, like.labels, like.layers)
        self.rows, self.dense = dict(like.rows), dict(like.dense)
        self._ranks = ranks

    def write_header(self) -> None:
        """Nothing: the header on disk is that of the first process."""

    def add_dense(self, checkpoint: str, predictions: np.ndarray, figures: dict[str, Any]) -> None:
        """Keep what the untouched checkpoint predicted; the first process has found the same."""
        self.dense[checkpoint] = self.compact(predictions)
        self.header["dense"][checkpoint] = figures

    def add(self, row: Row, predictions: np.ndarray, zeros: dict[str, int]) -> None:
        """Send a finished row."""
        self._send("add", row, self.compact(predictions), zeros)

    def merge(self, key: str, entries: dict[str, Any]) -> None:
        """Send entries for the header."""
        super().merge(key, entries)
        self._send("merge", key, entries)

    def _send(self, method: str, *arguments: Any) -> None:
        store = self._ranks.store
        # The number is taken last, so that under every number there is something.
        name = f"from {self._ranks.rank} {time.monotonic_ns()}"
        store.set(name, pickle.dumps((method, *arguments)))
        store.set(f"{COUNT}/{store.add(COUNT, 1)}", name)


class Collector:
    """A thread of the first process that writes down, as soon as they come, the results that the others send.

    `told` is called with every row that has been written. What goes wrong is raised by `wait_for` and `require_well`.
    """

    def __init__(self, ranks: Ranks, sweep: Sweep, told: Callable[[Row], None]):
        self.ranks, self.sweep, self.told = ranks, sweep, told
        self._taken, self._stop, self._error = 0, False, None
        self._thread = threading.Thread(target=self._work, name="collector", daemon=True)
        if ranks.first and ranks.size > 1:
            self._thread.start()

    def _work(self) -> None:
        try:
            while not self._stop:
                if not self._take():
                    time.sleep(GLANCE)
        except Exception as error:  # raised where the process looks next, by `require_well`
            self._error = error

    def _take(self) -> bool:
        """Write down the next result; False when there is none yet."""
        store, key = self.ranks.store, f"{COUNT}/{self._taken + 1}"
        if not store.check([key]):
            return False
        name = store.get(key).decode()
        method, *arguments = pickle.loads(store.get(name))
        for used in (key, name):
            store.delete_key(used)
        self._taken += 1
        getattr(self.sweep, method)(*arguments)
        if method == "add":
            self.told(arguments[0])
        return True

    def require_well(self) -> None:
        """Raise what went wrong in the thread."""
        if self._error:
            raise self._error

    def finish(self, complete: Callable[[], bool]) -> None:
        """Wait until all results are written, which `complete` tells."""
        while not complete():
            self.require_well()
            time.sleep(GLANCE)
        self._stop = True
        if self._thread.is_alive():
            self._thread.join()  # it may be writing the last row
        self.require_well()


def share_sweep(ranks: Ranks, open_sweep: Callable[[], Sweep]) -> Sweep:
    """The sweep that the first process opens, for all of them."""
    if ranks.size == 1:
        return open_sweep()
    sweep = open_sweep() if ranks.first else None
    told = ranks.broadcast(lambda: (sweep.files, sweep.header, sweep.labels, sweep.layers, sweep.rows, sweep.dense))
    if sweep:
        return sweep
    *parts, rows, dense = told
    like = Sweep(*parts)
    like.rows, like.dense = rows, dense
    return DistantSweep(ranks, like)
