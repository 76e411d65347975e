"""Copies of some of a cluster's objects that keep themselves current, with one watch each instead of polling.

A watch that ends, expires or breaks is begun again, from where it was or from a new list; what was seen last stays
readable meanwhile. Nothing here interprets the objects.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

from launcher.cluster import Cluster, ExpiredError, Kind, Object, Watch
from launcher.errors import LaunchError

WATCH_SECONDS = 300.0
"""How long one watch lasts; the server ends longer ones itself."""
PAUSE_SECONDS = (0.5, 30.0)
"""First and longest pause after a failure; it doubles in between."""


class Mirror:
    """The objects of one kind that match, by uid. `trim` keeps of each what is wanted, so that many stay small."""

    def __init__(
        self, cluster: Cluster, kind: Kind, *, labels: str = "", fields: str = "",
        trim: Callable[[Object], Object] = lambda item: item, changed: threading.Condition | None = None,
    ) -> None:  # fmt: skip
        self._cluster = cluster
        self._kind = kind
        self._labels = labels
        self._fields = fields
        self._trim = trim
        self._changed = changed or threading.Condition()
        self._objects: dict[str, Object] = {}
        self._closed = threading.Event()
        self._listed = threading.Event()
        self._watch: Watch | None = None
        self._chance = random.Random()
        self.trouble: LaunchError | None = None
        """Why the copies may be old, or None while the server answers."""
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"mirror {kind.plural}")
        self._thread.start()

    def objects(self) -> tuple[Object, ...]:
        """The objects as they were last seen."""
        with self._changed:
            return tuple(self._objects.values())

    def ready(self, seconds: float) -> bool:
        """Waits for the first list; whether it came."""
        return self._listed.wait(seconds)

    def close(self) -> None:
        """Ends the watch; returns at once, and the thread ends soon after."""
        self._closed.set()
        if self._watch is not None:
            self._watch.close()

    def _run(self) -> None:
        pause, version = PAUSE_SECONDS[0], ""
        while not self._closed.is_set():
            try:
                if not version:
                    version = self._list()
                self._watch = self._cluster.watch(
                    self._kind, version, labels=self._labels, fields=self._fields, seconds=WATCH_SECONDS
                )
                if self._closed.is_set():  # whoever closed this may not have seen the watch
                    self._watch.close()
                for kind, item in self._watch:
                    version = item["metadata"]["resourceVersion"]
                    pause = PAUSE_SECONDS[0]
                    self._take(kind, item)
                pause, self.trouble = PAUSE_SECONDS[0], None
                # A server that ends each watch at once must not be asked in a tight loop.
                self._closed.wait(self._chance.uniform(0.05, 0.2))
            except ExpiredError:
                # So must not one that has forgotten what it has just told.
                version = ""
                self._closed.wait(pause * self._chance.uniform(0.1, 0.2))
                pause = min(2 * pause, PAUSE_SECONDS[1])
            except LaunchError as error:
                if self._closed.is_set():
                    return
                version = ""  # the next list also tells that the server is back
                with self._changed:
                    self.trouble = error
                    self._changed.notify_all()
                self._closed.wait(pause * self._chance.uniform(0.5, 1.0))
                pause = min(2 * pause, PAUSE_SECONDS[1])

    def _list(self) -> str:
        found, version = self._cluster.snapshot(self._kind, labels=self._labels, fields=self._fields)
        with self._changed:
            self._objects = {item["metadata"]["uid"]: self._trim(item) for item in found}
            self.trouble = None
            self._changed.notify_all()
        self._listed.set()
        return version

    def _take(self, kind: str, item: Object) -> None:
        if kind == "BOOKMARK":
            return
        with self._changed:
            self.trouble = None
            if kind == "DELETED":
                self._objects.pop(item["metadata"]["uid"], None)
            else:
                self._objects[item["metadata"]["uid"]] = self._trim(item)
            self._changed.notify_all()
