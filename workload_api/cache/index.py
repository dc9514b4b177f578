"""From selectors to entries, each filed under its rarest selector (architecture A12)."""

from collections import defaultdict
from collections.abc import Iterable, Iterator

from spiffe_core.entry import RegistrationEntry
from spiffe_core.selector import Selector, SelectorSet


class SelectorIndex:
    """Entries by id, and the few that a set of selectors could match."""

    def __init__(self) -> None:
        self._entries: dict[str, RegistrationEntry] = {}
        self._filed: dict[str, Selector] = {}
        self._postings: defaultdict[Selector, dict[str, RegistrationEntry]] = defaultdict(dict)

    def put(self, entry: RegistrationEntry) -> None:
        """Add or replace an entry."""
        self.drop(entry.id)
        # Every entry that matches holds this selector too, so looking under it is enough.
        under = min(sorted(entry.selectors), key=lambda one: len(self._postings.get(one, ())))
        self._entries[entry.id] = entry
        self._filed[entry.id] = under
        self._postings[under][entry.id] = entry

    def drop(self, entry_id: str) -> None:
        """Remove an entry; one that is not there is fine."""
        if self._entries.pop(entry_id, None) is None:
            return
        under = self._filed.pop(entry_id)
        del self._postings[under][entry_id]
        if not self._postings[under]:
            del self._postings[under]

    def clear(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._filed.clear()
        self._postings.clear()

    def get(self, entry_id: str) -> RegistrationEntry | None:
        """Return an entry, or None."""
        return self._entries.get(entry_id)

    def candidates(self, selectors: SelectorSet) -> Iterator[RegistrationEntry]:
        """Yield a superset of the entries that *selectors* match."""
        for selector in selectors:
            yield from self._postings.get(selector, {}).values()

    def all(self) -> Iterable[RegistrationEntry]:
        """Return every entry."""
        return self._entries.values()

    def __len__(self) -> int:
        return len(self._entries)
