"""
Join tokens: a secret that is used once (SPIRE API 8.1, SEC-50).

A token reads ``<public id>.<secret>``.  The public id stands in the agent's SPIFFE ID; of
the secret only a hash is kept, and it appears nowhere.
"""

import re
import secrets
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from issuer.attestation.protocol import AttestedNode, Challenge
from issuer.store.store import Repositories
from spiffe_core.agent import agent_id
from spiffe_core.errors import MalformedError
from spiffe_core.spiffeid import TrustDomain

_FORM = re.compile(r"([A-Za-z0-9_-]{1,64})\.([A-Za-z0-9_-]{22,256})")  # 22: 128 bits
MAX_BYTES: Final = 400


class JoinTokenError(MalformedError):
    """A token is not of our form; never quotes it."""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A join token; its repr holds the public half alone."""

    public_id: str
    secret: str

    def __repr__(self) -> str:
        return f"JoinToken({self.public_id!r})"

    @property
    def text(self) -> str:
        """The whole token, for whoever is to use it."""
        return f"{self.public_id}.{self.secret}"

    @classmethod
    def random(cls) -> Self:
        """Return a token with 256 random bits of secret."""
        return cls(secrets.token_hex(8), secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> Self:
        """
        Parse a whole token.

        Raises:
            JoinTokenError: not of the form.
        """
        found = _FORM.fullmatch(text) if len(text) <= MAX_BYTES else None
        if found is None:
            raise JoinTokenError(
                "a join token reads <public id>.<secret>, the secret with at least 22 "
                "characters of A-Z a-z 0-9 _ -"
            )
        return cls(found[1], found[2])


@dataclass(frozen=True)
class JoinTokenAttestor:
    """Attests an agent by a join token; not repeatable."""

    type: ClassVar[str] = "join_token"
    trust_domain: TrustDomain

    async def attest(
        self, payload: bytes, *, public_key: bytes, challenge: Challenge
    ) -> AttestedNode:
        """See `NodeAttestor`; the token is used up with the node's row."""
        del challenge
        try:
            token = JoinToken.parse(payload.decode("ascii"))
        except UnicodeDecodeError as error:
            raise JoinTokenError("a join token is ASCII text") from error

        def check(repos: Repositories) -> None:
            repos.tokens.check(token.public_id, token.secret, public_key)

        def consume(repos: Repositories) -> None:
            repos.tokens.consume(token.public_id, token.secret, public_key)

        return AttestedNode(
            agent_id(self.trust_domain, self.type, token.public_id),
            frozenset(),
            can_reattest=False,
            check=check,
            consume=consume,
        )
