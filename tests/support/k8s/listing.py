"""Lists: which version they are of, and pages of them."""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass

from tests.support.k8s.answers import META, PARTIAL, partial
from tests.support.k8s.resources import Resource
from tests.support.k8s.status import ApiError, bad_request, gone
from tests.support.k8s.store import Body, Store

Place = tuple[str, str]
"""Namespace and name: lists are in this order."""


@dataclass(frozen=True)
class Page:
    """A part of a list as it was at one version."""

    version: int
    after: Place
    limit: int
    is_selective: bool


def version_of(query: Mapping[str, str]) -> int | None:
    """
    The `resourceVersion` of a request.

    Raises:
        ApiError: 500, it is no number.
    """
    text = query.get("resourceVersion", "")
    if not text:
        return None
    if not text.isdecimal():
        why = f'strconv.ParseUint: parsing "{text}": invalid syntax'
        message = f'resourceVersion: Invalid value: "{text}": {why}'
        raise ApiError(500, "", message)  # as the real one says it
    return int(text)


def page_of(store: Store, query: Mapping[str, str]) -> Page:
    """
    Which part of a list a request asks for.

    Raises:
        ApiError: 400, it cannot be read; 504, the version is yet to come.
    """
    size = query.get("limit") or "0"
    if not size.isdecimal():
        raise bad_request(f'strconv.ParseInt: parsing "{size}": invalid syntax')
    limit = int(size)
    is_selective = bool(query.get("labelSelector") or query.get("fieldSelector"))
    if token := query.get("continue"):
        try:
            read = json.loads(base64.urlsafe_b64decode(token))
            namespace, name = read["start"]
            return Page(int(read["rv"]), (namespace, name), limit, is_selective)
        except (ValueError, KeyError, TypeError) as error:
            raise bad_request(
                "invalid continue token: continue key is not valid: it cannot be read"
            ) from error
    wanted = version_of(query) or 0
    if wanted > store.version:
        message = f"Timeout: Too large resource version: {wanted}, current: {store.version}"
        cause = {"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}
        details = {"causes": [cause], "retryAfterSeconds": 1}
        raise ApiError(504, "Timeout", message, details, {"Retry-After": "1"})
    is_exact = query.get("resourceVersionMatch") == "Exact"
    return Page(wanted if is_exact else store.version, ("", ""), limit, is_selective)


def bodies(store: Store, resource: Resource, page: Page) -> list[Body]:
    """
    All objects as they were at the page's version.

    Raises:
        ApiError: 410, that version is compacted.
    """
    try:
        return store.objects(resource, at=page.version)
    except ApiError as error:
        if page.after != ("", ""):
            raise gone(_CONTINUE_TOO_OLD) from error
        raise gone("The resourceVersion for the provided list is too old.") from error


def listed(resource: Resource, selected: list[Body], page: Page, form: str) -> Body:
    """The list object of one page."""
    found = [one for one in selected if _place(one) > page.after]
    meta: Body = {"resourceVersion": str(page.version)}
    if page.limit and len(found) > page.limit:
        meta["continue"] = _continue(page.version, _place(found[page.limit - 1]))
        if not page.is_selective:
            meta["remainingItemCount"] = len(found) - page.limit
        found = found[: page.limit]
    if form:
        items = [partial(one) for one in found]
        return {"kind": f"{PARTIAL}List", **META, "metadata": meta, "items": items}
    kinds = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
    items = [{key: one[key] for key in one if key not in kinds} for one in found]
    return {**kinds, "metadata": meta, "items": items}


def _place(body: Body) -> Place:
    return body["metadata"].get("namespace", ""), body["metadata"]["name"]


def _continue(version: int, last: Place) -> str:
    read = {"v": "meta.k8s.io/v1", "rv": version, "start": list(last)}
    return base64.urlsafe_b64encode(json.dumps(read).encode()).decode()


_CONTINUE_TOO_OLD = (
    "The provided continue parameter is too old to display a consistent list result. You can "
    "start a new list without the continue parameter, or use the continue token in this "
    "response to retrieve the remainder of the results. Continuing with the provided token "
    "results in an inconsistent list - objects that were created, modified, or deleted "
    "between the time the first chunk was returned and now may show up in the list."
)
