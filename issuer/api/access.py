"""
Who may call what: one table, default deny (SEC-30, SPIRE API 2.2).

A method that is served and not in the table stops the server at start.
"""

from collections.abc import Iterable
from typing import Final

from spiffe_core.errors import InternalError
from spiffe_core.permission import CallerKind

_L, _A, _G, _D = CallerKind.LOCAL, CallerKind.ADMIN, CallerKind.AGENT, CallerKind.DOWNSTREAM
_OPERATORS: Final = frozenset({_L, _A})
_AGENTS: Final = frozenset({_G})
_DOWNSTREAM: Final = frozenset({_D})
_LOCAL: Final = frozenset({_L})
_ANYBODY: Final = frozenset({CallerKind.ANY})


def _methods(
    service: str, allowed: frozenset[CallerKind], names: str
) -> dict[str, frozenset[CallerKind]]:
    return {f"/{service}/{name}": allowed for name in names.split()}


ACCESS: Final[dict[str, frozenset[CallerKind]]] = {
    **_methods(
        "spire.api.server.entry.v1.Entry", _OPERATORS,
        "CountEntries ListEntries GetEntry BatchCreateEntry BatchUpdateEntry BatchDeleteEntry",
    ),
    **_methods(
        "spire.api.server.entry.v1.Entry", _AGENTS, "GetAuthorizedEntries SyncAuthorizedEntries"
    ),
    **_methods(
        "spire.api.server.agent.v1.Agent", _OPERATORS,
        "CountAgents ListAgents GetAgent DeleteAgent BanAgent CreateJoinToken",
    ),
    **_methods("spire.api.server.agent.v1.Agent", _ANYBODY, "AttestAgent"),
    **_methods("spire.api.server.agent.v1.Agent", _AGENTS, "RenewAgent PostStatus"),
    **_methods(
        "spire.api.server.svid.v1.SVID", _OPERATORS, "MintX509SVID MintJWTSVID MintWITSVID"
    ),
    **_methods(
        "spire.api.server.svid.v1.SVID", _AGENTS, "BatchNewX509SVID NewJWTSVID BatchNewWITSVID"
    ),
    **_methods("spire.api.server.svid.v1.SVID", _DOWNSTREAM, "NewDownstreamX509CA"),
    **_methods("spire.api.server.bundle.v1.Bundle", _ANYBODY, "GetBundle"),
    **_methods(
        "spire.api.server.bundle.v1.Bundle", _OPERATORS | _AGENTS, "GetFederatedBundle"
    ),
    **_methods(
        "spire.api.server.bundle.v1.Bundle", _OPERATORS,
        "CountBundles AppendBundle ListFederatedBundles BatchCreateFederatedBundle "
        "BatchUpdateFederatedBundle BatchSetFederatedBundle BatchDeleteFederatedBundle",
    ),
    **_methods(
        "spire.api.server.bundle.v1.Bundle", _DOWNSTREAM,
        "PublishJWTAuthority PublishWITAuthority",
    ),
    **_methods(
        "spire.api.server.trustdomain.v1.TrustDomain", _OPERATORS,
        "ListFederationRelationships GetFederationRelationship "
        "BatchCreateFederationRelationship BatchUpdateFederationRelationship "
        "BatchDeleteFederationRelationship RefreshBundle",
    ),
    **_methods(
        "spire.api.server.localauthority.v1.LocalAuthority", _OPERATORS,
        "GetJWTAuthorityState PrepareJWTAuthority ActivateJWTAuthority TaintJWTAuthority "
        "RevokeJWTAuthority GetX509AuthorityState PrepareX509Authority ActivateX509Authority "
        "TaintX509Authority TaintX509UpstreamAuthority RevokeX509Authority "
        "RevokeX509UpstreamAuthority GetWITAuthorityState PrepareWITAuthority "
        "ActivateWITAuthority TaintWITAuthority RevokeWITAuthority",
    ),
    **_methods("grpc.health.v1.Health", _LOCAL, "Check Watch"),
    **_methods("spiffe_issuer.v1.AgentWatch", _AGENTS, "Watch"),
    **_methods("spiffe_issuer.v1.PodSvid", _AGENTS, "BatchNewX509SVID NewJWTSVID"),
    **_methods("spiffe_issuer.v1.Explain", _OPERATORS, "ExplainSelectors"),
    **_methods("spiffe_issuer.v1.PodExplain", _OPERATORS, "ExplainPod"),
}  # fmt: skip


def check_complete(served: Iterable[str]) -> None:
    """
    See that every method that is served is in the table.

    Raises:
        InternalError: names one that is not.
    """
    for method in served:
        if method not in ACCESS:
            raise InternalError(f"{method} is served and nobody said who may call it")
