"""A record of every request, so that a test can say what was asked and how often."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Call:
    """One request and how it ended; *status* 0 is one that got no answer."""

    user: str
    verb: str
    group: str = ""
    plural: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    status: int = 0

    @property
    def grant(self) -> tuple[str, str, str]:
        """The RBAC rule it needs: verb, group, resource (with its subresource)."""
        what = f"{self.plural}/{self.subresource}" if self.subresource else self.plural
        return self.verb, self.group, what or self.path


@dataclass
class Calls:
    """All calls in the order of their answers; a watch is there once it began."""

    made: list[Call] = field(default_factory=list)

    def add(self, call: Call) -> None:
        """Note one."""
        self.made.append(call)

    def of(self, **wanted: object) -> list[Call]:
        """Those whose fields are these: ``of(verb="list", plural="pods", status=200)``."""
        return [
            call
            for call in self.made
            if all(getattr(call, key) == value for key, value in wanted.items())
        ]

    def count(self, **wanted: object) -> int:
        """How many there were."""
        return len(self.of(**wanted))

    def grants(self, user: str | None = None) -> set[tuple[str, str, str]]:
        """What RBAC had to allow, of resources and paths alike."""
        return {call.grant for call in self.made if user in (None, call.user)}

    def clear(self) -> None:
        """Forget all."""
        self.made.clear()
