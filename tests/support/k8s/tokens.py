"""
Service-account tokens: made, checked and reviewed as the API server does it.

The texts are a 1.20's as recorded; a later version's where *version* says so.
"""

import base64
import hashlib
import json
import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import jwt
from cryptography.hazmat.primitives import serialization

from tests.support.authorities import a_key
from tests.support.k8s.resources import NODES, PODS, SECRETS, SERVICE_ACCOUNTS, Resource
from tests.support.k8s.store import Body, Store
from tests.support.k8s.users import AUTHENTICATED, User, account_name
from tests.support.tokens import KEY_FOR, b64, sealed

SUCCESS_TTL = timedelta(seconds=10)
LEEWAY = timedelta(minutes=1)
LEGACY_ISSUER = "kubernetes/serviceaccount"
LEGACY = "kubernetes.io/serviceaccount/"
EXTRA = "authentication.kubernetes.io/"


class Clock(Protocol):
    """Says what time it is."""

    def now(self) -> datetime: ...


class WallClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The time."""
        return datetime.now(UTC)


@dataclass(frozen=True)
class Verdict:
    """What checking a token came to."""

    user: User | None = None
    audiences: tuple[str, ...] = ()
    error: str = ""


class Refused(Exception):
    """The token is one of ours, and it does not hold."""


def release_of(version: str) -> tuple[int, int]:
    """Major and minor of ``v1.20.2``."""
    major, minor, *_ = version.removeprefix("v").split(".")
    return int(major), int(minor)


class TokenAuthority:
    """The API server's key for service accounts, and its authenticator of bearer tokens."""

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        issuer: str,
        audiences: tuple[str, ...] | None = None,
        algorithm: str = "RS256",
        which: str = "",
        version: str = "v1.20.2",
    ) -> None:
        self._store = store
        self._clock = clock
        self.issuer = issuer
        self.audiences = audiences or (issuer,)
        self.algorithm = algorithm
        self.release = release_of(version)
        self._key = a_key(KEY_FOR[algorithm], f"service accounts {which}")
        self.static: dict[str, User] = {}
        """Tokens of people, which name no audience: `--token-auth-file`, OIDC and such."""
        self._succeeded: dict[tuple[str, tuple[str, ...]], tuple[datetime, Verdict]] = {}

    # Making tokens.

    @property
    def key_id(self) -> str:
        """The key's `kid`, as the API server derives it."""
        spki = self._key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        return b64(hashlib.sha256(spki).digest())

    def jwks(self) -> Body:
        """The key set of `/openid/v1/jwks`."""
        kinds: dict[str, Any] = {
            "RS": jwt.algorithms.RSAAlgorithm,
            "ES": jwt.algorithms.ECAlgorithm,
        }
        made = kinds[self.algorithm[:2]].to_jwk(self._key.public_key(), as_dict=True)
        made.pop("key_ops", None)
        return {"keys": [{"use": "sig", "kid": self.key_id, "alg": self.algorithm} | made]}

    def seal(self, claims: Body, *, key: Any = None, **header: Any) -> str:
        """A token of any claims, signed by the cluster unless *key* is another."""
        head = {"alg": self.algorithm, "kid": self.key_id} | header
        parts = (json.dumps(part, separators=(",", ":")) for part in (head, claims))
        return sealed(*parts, algorithm=self.algorithm, key=key or self._key)

    def claims(
        self,
        account: Body,
        *,
        pod: Body | None = None,
        audiences: tuple[str, ...] = (),
        lifetime: timedelta = timedelta(hours=1),
    ) -> Body:
        """The claims of a token for a service account, bound to *pod*."""
        now = int(self._clock.now().timestamp())
        meta = account["metadata"]
        bound: Body = {"namespace": meta["namespace"]}
        if pod is not None:
            bound["pod"] = {key: pod["metadata"][key] for key in ("name", "uid")}
            if self.release >= (1, 30) and (node := self._node_of(pod)):
                bound["node"] = {key: node["metadata"][key] for key in ("name", "uid")}
        bound["serviceaccount"] = {key: meta[key] for key in ("name", "uid")}
        made: Body = {
            "aud": list(audiences or self.audiences),
            "exp": now + int(lifetime.total_seconds()),
            "iat": now,
            "iss": self.issuer,
        }
        if self.release >= (1, 30):
            made["jti"] = str(uuid.uuid4())
        return made | {
            "kubernetes.io": bound,
            "nbf": now,
            "sub": account_name(meta["namespace"], meta["name"]),
        }

    def _node_of(self, pod: Body) -> Body | None:
        name = pod["spec"].get("nodeName", "")
        return self._store.get((NODES.group, NODES.plural, "", name)) if name else None

    def legacy(self, account: Body, secret: str) -> str:
        """A token from a Secret: no audience, no end, no pod."""
        meta = account["metadata"]
        claims = {
            "iss": LEGACY_ISSUER,
            f"{LEGACY}namespace": meta["namespace"],
            f"{LEGACY}secret.name": secret,
            f"{LEGACY}service-account.name": meta["name"],
            f"{LEGACY}service-account.uid": meta["uid"],
            "sub": account_name(meta["namespace"], meta["name"]),
        }
        return self.seal(claims)

    # Checking tokens.

    def check(self, token: str, audiences: tuple[str, ...] = ()) -> Verdict:
        """
        Authenticate *token* for *audiences*, or for the API server's own.

        A success is remembered for ten seconds: so long lives a token whose pod is deleted.
        """
        wanted = audiences or self.audiences
        now = self._clock.now()
        remembered = self._succeeded.get((token, wanted))
        if remembered is not None and now < remembered[0] + SUCCESS_TTL:
            return remembered[1]
        try:
            verdict = self._check(token, wanted, now)
        except Refused as refused:
            return Verdict(error=f"[invalid bearer token, {refused}]")
        if verdict.user is not None:
            self._succeeded[token, wanted] = (now, verdict)
        return verdict

    def _check(self, token: str, wanted: tuple[str, ...], now: datetime) -> Verdict:
        if (known := self.static.get(token)) is not None:
            common = tuple(one for one in self.audiences if one in wanted)
            return Verdict(known, common) if common else Verdict(error="invalid bearer token")
        claims = _unverified(token)
        if claims is None or claims.get("iss") not in (self.issuer, LEGACY_ISSUER):
            return Verdict(error="invalid bearer token")
        if not self._signed_by_us(token):
            name = "go-jose/go-jose" if self.release >= (1, 26) else "square/go-jose"
            raise Refused(f"{name}: error in cryptographic primitive")
        is_legacy = claims["iss"] == LEGACY_ISSUER
        meant = self.audiences if is_legacy else tuple(_listed(claims.get("aud")))
        meant = meant or self.audiences
        common = tuple(one for one in meant if one in wanted)
        if not common:
            raise Refused(
                f"token audiences {_strings(meant)} is invalid for the target audiences "
                f"{_strings(wanted)}"
            )
        user = self._legacy_user(claims) if is_legacy else self._bound_user(claims, now)
        return Verdict(user, common)

    def _signed_by_us(self, token: str) -> bool:
        options: Any = {"verify_signature": True} | dict.fromkeys(_OURS_TO_CHECK, False)
        key = self._key.public_key()
        try:
            jwt.decode_complete(token, key, algorithms=[self.algorithm], options=options)
        except jwt.PyJWTError:
            return False
        return True

    def _bound_user(self, claims: Body, now: datetime) -> User:
        ends = datetime.fromtimestamp(claims.get("exp", 0), UTC)
        begins = datetime.fromtimestamp(claims.get("nbf", 0), UTC)
        newer = self.release >= (1, 24)
        if now > ends + LEEWAY:
            raise Refused("service account token has expired" if newer else "Token has expired")
        if now < begins - LEEWAY:
            later = "service account token is not valid yet"
            raise Refused(later if newer else "Token could not be validated.")
        private = claims.get("kubernetes.io", {})
        account = private.get("serviceaccount", {})
        user = self._account_user(private.get("namespace", ""), account)
        extra: dict[str, list[str]] = {}
        if self.release >= (1, 30) and "jti" in claims:
            extra[f"{EXTRA}credential-id"] = [f"JTI={claims['jti']}"]
        if pod := private.get("pod"):
            self._must_live(PODS, private["namespace"], pod, now)
            extra[f"{EXTRA}pod-name"] = [pod["name"]]
            extra[f"{EXTRA}pod-uid"] = [pod["uid"]]
        if node := private.get("node"):
            extra[f"{EXTRA}node-name"] = [node["name"]]
            extra[f"{EXTRA}node-uid"] = [node["uid"]]
        return replace(user, extra=extra)

    def _legacy_user(self, claims: Body) -> User:
        namespace = claims.get(f"{LEGACY}namespace", "")
        secret = claims.get(f"{LEGACY}secret.name", "")
        if self._store.get((SECRETS.group, SECRETS.plural, namespace, secret)) is None:
            raise Refused("Token has been invalidated")
        account = {
            "name": claims.get(f"{LEGACY}service-account.name", ""),
            "uid": claims.get(f"{LEGACY}service-account.uid", ""),
        }
        return self._account_user(namespace, account)

    def _account_user(self, namespace: str, account: Body) -> User:
        name = account.get("name", "")
        key = (SERVICE_ACCOUNTS.group, SERVICE_ACCOUNTS.plural, namespace, name)
        found = self._store.get(key)
        if found is None:
            raise Refused(f'serviceaccounts "{name}" not found')
        if found["metadata"]["uid"] != account.get("uid"):
            raise Refused(
                f"ServiceAccount UID ({found['metadata']['uid']}) does not match claim "
                f"({account.get('uid')})"
            )
        groups = (
            "system:serviceaccounts",
            f"system:serviceaccounts:{namespace}",
            AUTHENTICATED,
        )
        return User(account_name(namespace, name), groups, found["metadata"]["uid"])

    def _must_live(self, resource: Resource, namespace: str, ref: Body, now: datetime) -> None:
        found = self._store.get((resource.group, resource.plural, namespace, ref["name"]))
        leaving = found and found["metadata"].get("deletionTimestamp")
        if found is None or (leaving and datetime.fromisoformat(leaving) < now - LEEWAY):
            newer = self.release >= (1, 24)
            raise Refused(
                "service account token has been invalidated"
                if newer
                else "Token has been invalidated"
            )
        if found["metadata"]["uid"] != ref["uid"]:
            uids = f"({found['metadata']['uid']}) does not match claim ({ref['uid']})"
            raise Refused(f"{resource.kind} UID {uids}")

    def review(self, token: str, audiences: tuple[str, ...]) -> Body:
        """The `status` of a TokenReview."""
        verdict = self.check(token, audiences)
        if verdict.user is None:
            return {"user": {}, "error": verdict.error}
        return {
            "authenticated": True,
            "user": verdict.user.body(),
            "audiences": list(verdict.audiences),
        }


_OURS_TO_CHECK = ("verify_exp", "verify_nbf", "verify_iat", "verify_aud", "verify_iss",
                  "verify_sub", "verify_jti")  # fmt: skip


def _unverified(token: str) -> Body | None:
    try:
        _, middle, _ = token.split(".")
        found = json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _listed(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [one for one in value or [] if isinstance(one, str)]


def _strings(values: tuple[str, ...]) -> str:
    return "[" + " ".join(f'"{one}"' for one in values) + "]"
