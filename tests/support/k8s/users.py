"""Who asks: what a credential proves to an API server."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class User:
    """A user as the API server knows it after authentication."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: dict[str, list[str]] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        """As TokenReview shows it."""
        made: dict[str, Any] = {"username": self.name}
        if self.uid:
            made["uid"] = self.uid
        if self.groups:
            made["groups"] = list(self.groups)
        if self.extra:
            made["extra"] = self.extra
        return made


ANONYMOUS = User("system:anonymous", ("system:unauthenticated",))
AUTHENTICATED = "system:authenticated"
MASTERS = "system:masters"


def person(name: str, *groups: str) -> User:
    """A user of a certificate, in the group of everybody who is authenticated."""
    return User(name, (*groups, AUTHENTICATED))


def account_name(namespace: str, name: str) -> str:
    """The user name of a service account."""
    return f"system:serviceaccount:{namespace}:{name}"
