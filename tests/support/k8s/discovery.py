"""What an API server says about itself: versions, groups, resources, its token issuer."""

from typing import Any

from tests.support.k8s.resources import SUBRESOURCES, Catalogue

Body = dict[str, Any]


def openid(issuer: str, base_url: str, algorithm: str) -> Body:
    """`/.well-known/openid-configuration`."""
    return {
        "issuer": issuer,
        "jwks_uri": f"{base_url}/openid/v1/jwks",
        "response_types_supported": ["id_token"],
        "subject_types_supported": ["public"],
        "id_token_signing_alg_values_supported": [algorithm],
    }


def page(path: str, catalogue: Catalogue, version: str) -> Body | None:
    """A page of discovery, or None when there is no such page."""
    parts = [part for part in path.split("/") if part]
    groups = sorted({(one.group, one.version) for one in catalogue if one.group})
    match parts:
        case ["version"]:
            return _version(version)
        case ["api"]:
            addresses = [{"clientCIDR": "0.0.0.0/0", "serverAddress": "127.0.0.1:443"}]
            return {
                "kind": "APIVersions",
                "versions": ["v1"],
                "serverAddressByClientCIDRs": addresses,
            }
        case ["apis"]:
            listed = [_group(*one) for one in groups]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        case ["apis", group] if found := [one for one in groups if one[0] == group]:
            return {"kind": "APIGroup", "apiVersion": "v1"} | _group(*found[0])
        case ["api", "v1"]:
            return _resources(catalogue, "", "v1")
        case ["apis", group, which] if (group, which) in groups:
            return _resources(catalogue, group, which)
    return None


def _version(version: str) -> Body:
    major, minor, *_ = version.removeprefix("v").split(".")
    return {
        "major": major,
        "minor": minor,
        "gitVersion": version,
        "gitCommit": "0000000000000000000000000000000000000000",
        "gitTreeState": "clean",
        "buildDate": "2021-01-13T13:20:00Z",
        "goVersion": "go1.19.8",
        "compiler": "gc",
        "platform": "linux/amd64",
    }


def _group(group: str, version: str) -> Body:
    known = {"groupVersion": f"{group}/{version}", "version": version}
    return {"name": group, "versions": [known], "preferredVersion": known}


def _resources(catalogue: Catalogue, group: str, version: str) -> Body:
    listed: list[Body] = []
    for one in catalogue:
        if (one.group, one.version) != (group, version):
            continue
        entry = {
            "singularName": one.kind.lower(),
            "namespaced": one.namespaced,
            "kind": one.kind,
        }
        entry |= {"verbs": list(one.verbs), "name": one.plural}
        if one.short:
            entry["shortNames"] = list(one.short)
        listed.append(entry)
        for sub in SUBRESOURCES.get((group, one.plural), ()):
            kind = "TokenRequest" if sub == "token" else one.kind
            listed.append(
                {
                    "name": f"{one.plural}/{sub}",
                    "singularName": "",
                    "namespaced": one.namespaced,
                    "kind": kind,
                    "verbs": ["create"] if sub == "token" else ["get", "patch", "update"],
                }
            )
    where = f"{group}/{version}" if group else version
    return {"kind": "APIResourceList", "groupVersion": where, "resources": listed}
