"""
What etcd and the watch cache are to an API server: objects, one version, a log of changes.

All of it is synchronous: a change reaches every watcher before the next line of the test runs.
"""

import copy
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.support.k8s.resources import Resource
from tests.support.k8s.status import gone

Key = tuple[str, str, str, str]
"""Group, plural, namespace, name."""

Body = dict[str, Any]


@dataclass(frozen=True)
class Change:
    """One line of the log: *before* is None for a new object, *after* for one that went."""

    version: int
    resource: Resource
    key: Key
    before: Body | None
    after: Body | None


class Store:
    """Objects of all kinds; bodies are never changed once they are in."""

    def __init__(self, first_version: int = 100, history: int = 20_000) -> None:
        self.version = first_version
        self.compacted = first_version
        self._history = history
        self._kinds: dict[tuple[str, str], dict[Key, Body]] = {}
        self._log: list[Change] = []
        self._watchers: dict[int, Callable[[Change], None]] = {}
        self._numbers = itertools.count()

    def get(self, key: Key) -> Body | None:
        """The object as it is, or None."""
        return self._kinds.get(key[:2], {}).get(key)

    def put(self, resource: Resource, key: Key, body: Body) -> Body:
        """Create or replace; return what is kept, with its new version."""
        kept = copy.deepcopy(body)
        self.version += 1
        kept["metadata"]["resourceVersion"] = str(self.version)
        before = self.get(key)
        self._kinds.setdefault(key[:2], {})[key] = kept
        self._publish(Change(self.version, resource, key, before, kept))
        return kept

    def remove(self, resource: Resource, key: Key) -> Body:
        """Take an object out; return what it was."""
        before = self._kinds[key[:2]].pop(key)
        self.version += 1
        self._publish(Change(self.version, resource, key, before, None))
        return before

    def bump(self) -> int:
        """A change of something that nobody here watches, such as a lease."""
        self.version += 1
        return self.version

    def _publish(self, change: Change) -> None:
        self._log.append(change)
        if len(self._log) > 2 * self._history:
            self.compact(self._log[-self._history].version)
        for tell in list(self._watchers.values()):
            tell(change)

    def compact(self, version: int | None = None) -> int:
        """Forget how things were before *version*, or before now."""
        self.compacted = self.version if version is None else version
        self._log = [change for change in self._log if change.version > self.compacted]
        return self.compacted

    def objects(
        self, resource: Resource, namespace: str = "", at: int | None = None
    ) -> list[Body]:
        """
        All objects of a kind in the order of their keys; as they were *at* a version.

        Raises:
            ApiError: 410, that version is compacted.
        """
        kind = (resource.group, resource.plural)
        found = dict(self._kinds.get(kind, {}))
        if at is not None and at < self.version:
            for change in reversed(self.changes_after(at)):
                if change.key[:2] != kind:
                    continue
                if change.before is None:
                    found.pop(change.key, None)
                else:
                    found[change.key] = change.before
        keys = sorted(key for key in found if namespace in ("", key[2]))
        return [found[key] for key in keys]

    def changes_after(self, version: int) -> list[Change]:
        """
        The log after *version*.

        Raises:
            ApiError: 410, that version is compacted.
        """
        if version < self.compacted:
            raise gone(f"too old resource version: {version} ({self.compacted})")
        at = len(self._log)
        while at and self._log[at - 1].version > version:
            at -= 1
        return self._log[at:]

    def subscribe(self, tell: Callable[[Change], None]) -> Callable[[], None]:
        """Call *tell* for each change from now on, until the function returned is called."""
        number = next(self._numbers)
        self._watchers[number] = tell

        def end() -> None:
            self._watchers.pop(number, None)

        return end
