"""TokenRequest: a service account's token for an audience, bound to a pod that lives."""

from datetime import datetime, timedelta

from tests.support.k8s.admission import key_of
from tests.support.k8s.objects import instant
from tests.support.k8s.resources import PODS
from tests.support.k8s.status import bad_request, conflict, invalid, not_found
from tests.support.k8s.store import Body, Store
from tests.support.k8s.tokens import TokenAuthority

LEAST_SECONDS = 600
MOST_SECONDS = 1 << 32


def requested(
    store: Store, tokens: TokenAuthority, now: datetime, account: Body, body: Body
) -> Body:
    """
    The answer to a TokenRequest.

    Raises:
        ApiError: 422 for a life too short or too long; 404, 409 or 400 for the pod it names.
    """
    empty = {"audiences": None, "expirationSeconds": None, "boundObjectRef": None}
    spec = empty | (body.get("spec") or {})
    seconds = 3600 if spec["expirationSeconds"] is None else spec["expirationSeconds"]
    for wrong, why in (
        (seconds < LEAST_SECONDS, "may not specify a duration less than 10 minutes"),
        (seconds > MOST_SECONDS, "may not specify a duration larger than 2^32 seconds"),
    ):
        if wrong:
            group, field = "authentication.k8s.io", "spec.expirationSeconds"
            raise invalid(group, "TokenRequest", "", field, seconds, why)
    pod = _bound_pod(store, account, spec.get("boundObjectRef"))
    audiences = tuple(spec["audiences"] or tokens.audiences)
    lifetime = timedelta(seconds=seconds)
    claims = tokens.claims(account, pod=pod, audiences=audiences, lifetime=lifetime)
    return {
        "kind": "TokenRequest",
        "apiVersion": "authentication.k8s.io/v1",
        "metadata": {"creationTimestamp": None},
        "spec": spec | {"audiences": list(audiences), "expirationSeconds": seconds},
        "status": {
            "token": tokens.seal(claims),
            "expirationTimestamp": instant(now + lifetime),
        },
    }


def _bound_pod(store: Store, account: Body, ref: Body | None) -> Body | None:
    if ref is None:
        return None
    if ref.get("kind") != "Pod" or ref.get("apiVersion") != "v1":
        group, _, version = ref.get("apiVersion", "").rpartition("/")
        what = f"{group}/{version}, Kind={ref.get('kind')}"
        raise bad_request(f"cannot bind token to object of type {what}")
    meta = account["metadata"]
    pod = store.get(key_of(PODS, meta["namespace"], ref["name"]))
    if pod is None:
        raise not_found("", "pods", ref["name"])
    uid = ref.get("uid") or pod["metadata"]["uid"]
    if uid != pod["metadata"]["uid"]:
        why = (
            f"the UID in the bound object reference ({uid}) does not match the UID in "
            "record. The object might have been deleted and then recreated"
        )
        raise conflict("", "Pod", ref["name"], why)
    if pod["spec"]["serviceAccountName"] != meta["name"]:
        raise bad_request(
            f'cannot bind token for serviceaccount "{meta["name"]}" to pod running with '
            "different serviceaccount name."
        )
    return pod
