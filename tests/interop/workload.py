"""
A workload that uses py-spiffe as it is, in a process of its own: a line in, a line out.

Run as a program, as a workload is one; that both can live in one process is tested beside.
"""

import json
import queue
import sys
import time

from spiffe import JwtSource, WorkloadApiClient, X509Source

UPDATES: "queue.Queue[object]" = queue.Queue()


def svid_facts(svid):
    """What one X509-SVID says."""
    return {
        "id": str(svid.spiffe_id),
        "serial": str(svid.leaf.serial_number),
        "key": type(svid.private_key).__name__,
        "chain": len(svid.cert_chain),
        "hint": getattr(svid, "hint", None),
    }


def bundle_facts(bundles):
    """How many authorities each domain has."""
    found = {}
    for bundle in bundles:
        authorities = getattr(bundle, "x509_authorities", None) or bundle.jwt_authorities
        found[str(bundle.trust_domain)] = len(authorities)
    return found


def context_facts(context):
    """What one X.509 context says."""
    return {
        "svids": [svid_facts(one) for one in context.x509_svids],
        "default": str(context.default_svid.spiffe_id),
        "bundles": bundle_facts(context.x509_bundle_set.bundles),
    }


class Workload:
    """Every command is a method."""

    def __init__(self):
        self.client = WorkloadApiClient()
        self.sources = []

    def x509_svid(self):
        return svid_facts(self.client.fetch_x509_svid())

    def x509_svids(self):
        return [svid_facts(one) for one in self.client.fetch_x509_svids()]

    def x509_context(self):
        return context_facts(self.client.fetch_x509_context())

    def x509_bundles(self):
        return bundle_facts(self.client.fetch_x509_bundles().bundles)

    def jwt_svid(self, audience, subject=None):
        from spiffe import SpiffeId

        wanted = SpiffeId(subject) if subject else None
        svid = self.client.fetch_jwt_svid(audience=set(audience), subject=wanted)
        return {
            "id": str(svid.spiffe_id),
            "audience": sorted(svid.audience),
            "token": svid.token,
        }

    def jwt_svids(self, audience):
        return [
            str(one.spiffe_id) for one in self.client.fetch_jwt_svids(audience=set(audience))
        ]

    def jwt_bundles(self):
        return bundle_facts(self.client.fetch_jwt_bundles().bundles)

    def validate(self, token, audience):
        return str(self.client.validate_jwt_svid(token=token, audience=audience).spiffe_id)

    def validate_by_bundle(self, token, audience):
        from spiffe import JwtSvid, SpiffeId

        (bundle,) = (
            one for one in self.client.fetch_jwt_bundles().bundles
            if str(one.trust_domain) == "example.org"
        )  # fmt: skip
        svid = JwtSvid.parse_and_validate(token, bundle, {audience})
        return str(SpiffeId(str(svid.spiffe_id)))

    def watch(self):
        """Contexts as they come, each an update."""
        self.client.stream_x509_contexts(
            lambda context: UPDATES.put(context_facts(context)),
            lambda error: UPDATES.put({"error": str(error)}),
        )
        return "watching"

    def x509_source(self):
        """A source that stays fresh by itself; its updates are told."""
        source = X509Source()
        self.sources.append(source)
        source.subscribe_for_updates(
            lambda: UPDATES.put(svid_facts(source.get_x509_context().default_svid))
        )
        return svid_facts(source.get_x509_context().default_svid)

    def jwt_source(self, audience):
        source = JwtSource()
        self.sources.append(source)
        return {
            "id": str(source.fetch_svid(audience=set(audience)).spiffe_id),
            "bundles": bundle_facts(source.bundles),
        }

    def source_svid(self):
        return svid_facts(self.sources[0].get_x509_context().default_svid)

    def source_closed(self):
        return [source.is_closed() for source in self.sources]

    def update(self, within=10):
        """The next update."""
        try:
            return UPDATES.get(timeout=within)
        except queue.Empty:
            return None


def main():
    """Answer commands until standard input ends."""
    workload = None
    for line in sys.stdin:
        name, arguments = json.loads(line)
        started = time.monotonic()
        try:
            workload = workload or Workload()
            answer = {"answer": getattr(workload, name)(**arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["seconds"] = time.monotonic() - started
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
