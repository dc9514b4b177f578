"""
Configurations of Envoy, as the values that become its JSON.

Listeners take plain HTTP or mutual TLS, clusters speak plain HTTP or mutual TLS.  Whatever
speaks TLS has its certificate and its bundle from the agent.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Json = dict[str, Any]
TLS = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3."
HTTP_PROTOCOL = "envoy.extensions.upstreams.http.v3.HttpProtocolOptions"
MANAGER = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"
ROUTER = {
    "name": "envoy.filters.http.router",
    "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"
    },
}
AGENT = "spiffe_agent"


def sds(name: str, header: str = "", wait: str = "0s", **retry: str) -> Json:
    """
    A secret that the agent pushes; *header* is the value of the Workload API's header.

    Envoy waits for it as long as it takes, unless *wait* is set; its own default is 15 s.
    """
    grpc: Json = {"envoy_grpc": {"cluster_name": AGENT}}
    if header:
        grpc["initial_metadata"] = [{"key": "workload.spiffe.io", "value": header}]
    if retry:
        grpc["envoy_grpc"]["retry_policy"] = {"retry_back_off": retry}
    return {
        "name": name,
        "sds_config": {
            "resource_api_version": "V3",
            "initial_fetch_timeout": wait,
            "api_config_source": {
                "api_type": "GRPC",
                "transport_api_version": "V3",
                "grpc_services": [grpc],
            },
        },
    }


def common_tls(
    peers: Sequence[str] = (),
    *,
    svid: str = "default",
    bundle: str = "ROOTCA",
    header: str = "",
    wait: str = "0s",
    retry: Mapping[str, str] | None = None,
) -> Json:
    """The part of TLS that both sides share: our certificate, and who may be the peer."""
    names = [{"san_type": "URI", "matcher": {"exact": peer}} for peer in peers]
    return {
        "tls_params": {"tls_maximum_protocol_version": "TLSv1_3"},
        "tls_certificate_sds_secret_configs": [sds(svid, header, wait, **(retry or {}))],
        "combined_validation_context": {
            "default_validation_context": {"match_typed_subject_alt_names": names},
            "validation_context_sds_secret_config": sds(bundle, header, wait, **(retry or {})),
        },
    }


def bootstrap(node: str, agent: Path, listeners: list[Json], clusters: list[Json]) -> Json:
    """A whole configuration, but for the admin port; *agent* is the socket of its SDS."""
    return {
        "node": {"id": node, "cluster": "tests"},
        "static_resources": {
            "listeners": listeners,
            "clusters": [_agent_cluster(agent), *clusters],
        },
    }


def plain_cluster(name: str, port: int) -> Json:
    """Who is spoken to in plain HTTP."""
    return {"name": name, **_endpoint(name, _address(port))}


def tls_cluster(name: str, port: int, **tls: Any) -> Json:
    """Who is spoken to in mutual TLS; see `common_tls`."""
    context = {"@type": TLS + "UpstreamTlsContext", "common_tls_context": common_tls(**tls)}
    return {
        "name": name,
        # One request per connection: each one shakes hands anew, and shows the
        # certificates of its moment.
        "typed_extension_protocol_options": _http(
            {
                "common_http_protocol_options": {"max_requests_per_connection": 1},
                "explicit_http_config": {"http_protocol_options": {}},
            }
        ),
        "transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": context},
        **_endpoint(name, _address(port)),
    }


def plain_listener(name: str, cluster: str, log: Path) -> Json:
    """Plain HTTP in, all of it to *cluster*; says who answered there in ``x-server``."""
    return _listener(name, cluster, log, {"x-server": "%UPSTREAM_PEER_URI_SAN%"})


def tls_listener(
    name: str, cluster: str, log: Path, *, allowed: Sequence[str] = (), **tls: Any
) -> Json:
    """
    Mutual TLS in, all of it to *cluster*; says who asked in ``x-client``.

    *allowed* are the peers that its RBAC filter lets through; none: it has no such filter.
    """
    said = {
        "x-client": "%DOWNSTREAM_PEER_URI_SAN%",
        "x-client-serial": "%DOWNSTREAM_PEER_SERIAL%",
    }
    listener = _listener(name, cluster, log, said, allowed)
    context = {
        "@type": TLS + "DownstreamTlsContext",
        "require_client_certificate": True,
        "common_tls_context": common_tls(**tls),
    }
    listener["filter_chains"][0]["transport_socket"] = {
        "name": "envoy.transport_sockets.tls",
        "typed_config": context,
    }
    return listener


def rbac(allowed: Sequence[str]) -> Json:
    """The filter that lets through the peers with these IDs, and answers others with 403."""
    principals = [
        {"authenticated": {"principal_name": {"exact": spiffe_id}}} for spiffe_id in allowed
    ]
    return {
        "name": "envoy.filters.http.rbac",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.http.rbac.v3.RBAC",
            "rules": {
                "action": "ALLOW",
                "policies": {
                    "peers": {"permissions": [{"any": True}], "principals": principals}
                },
            },
        },
    }


def _listener(
    name: str,
    cluster: str,
    log: Path,
    response_headers: Mapping[str, str],
    allowed: Sequence[str] = (),
) -> Json:
    fields = {
        "code": "%RESPONSE_CODE%",
        "flags": "%RESPONSE_FLAGS%",
        "client": "%DOWNSTREAM_PEER_URI_SAN%",
        "client_serial": "%DOWNSTREAM_PEER_SERIAL%",
        "server": "%UPSTREAM_PEER_URI_SAN%",
        "tls": "%DOWNSTREAM_TLS_VERSION%",
        "failure": "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
    }
    manager = {
        "@type": f"type.googleapis.com/{MANAGER}",
        "stat_prefix": name,
        "forward_client_cert_details": "SANITIZE_SET",
        "set_current_client_cert_details": {"uri": True},
        "http_filters": [*([rbac(allowed)] if allowed else []), ROUTER],
        "access_log": [
            {
                "name": "envoy.access_loggers.file",
                "typed_config": {
                    "@type": "type.googleapis.com/"
                    "envoy.extensions.access_loggers.file.v3.FileAccessLog",
                    "path": str(log),
                    "log_format": {"json_format": fields},
                },
            }
        ],
        "route_config": {
            "response_headers_to_add": [
                {"header": {"key": key, "value": value}}
                for key, value in response_headers.items()
            ],
            "virtual_hosts": [
                {
                    "name": name,
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
                }
            ],
        },
    }
    chain: Json = {
        "filters": [
            {"name": "envoy.filters.network.http_connection_manager", "typed_config": manager}
        ]
    }
    return {
        "name": name,
        "address": _address(0),
        "stat_prefix": name,
        "filter_chains": [chain],
    }


def _agent_cluster(socket: Path) -> Json:
    return {
        "name": AGENT,
        "typed_extension_protocol_options": _http(
            {"explicit_http_config": {"http2_protocol_options": {}}}
        ),
        **_endpoint(AGENT, {"pipe": {"path": str(socket)}}),
    }


def _http(options: Json) -> Json:
    return {HTTP_PROTOCOL: {"@type": f"type.googleapis.com/{HTTP_PROTOCOL}", **options}}


def _address(port: int) -> Json:
    return {"socket_address": {"address": "127.0.0.1", "port_value": port}}


def _endpoint(cluster: str, address: Json) -> Json:
    return {
        "type": "STATIC",
        "load_assignment": {
            "cluster_name": cluster,
            "endpoints": [{"lb_endpoints": [{"endpoint": {"address": address}}]}],
        },
    }
