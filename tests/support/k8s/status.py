"""The `Status` objects that an API server answers with when it will not do as asked."""

from typing import Any


class ApiError(Exception):
    """An answer that is a `Status`."""

    def __init__(
        self,
        code: int,
        reason: str,
        message: str,
        details: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code
        self.headers = headers or {}
        self.body: dict[str, Any] = {
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": message,
            "reason": reason,
            "details": details,
            "code": code,
        }
        if details is None:
            del self.body["details"]
        if not reason:
            del self.body["reason"]


def details_of(group: str, kind: str, name: str = "", **more: Any) -> dict[str, Any]:
    """The `details` of a Status: *kind* is the plural for all but Invalid."""
    made = {"name": name, "group": group, "kind": kind} | more
    return {key: value for key, value in made.items() if value != ""}


def qualified(group: str, plural: str) -> str:
    """A resource as messages name it: ``pods``, ``tokenreviews.authentication.k8s.io``."""
    return f"{plural}.{group}" if group else plural


def unauthorized() -> ApiError:
    """No credential, or none that holds."""
    return ApiError(401, "Unauthorized", "Unauthorized")


def forbidden(group: str, plural: str, name: str, why: str) -> ApiError:
    """Known, but not allowed."""
    which = f"{qualified(group, plural)} {quoted(name)}" if name else qualified(group, plural)
    headers = {"X-Content-Type-Options": "nosniff"}
    message = f"{which} is forbidden: {why}" if plural else f"forbidden: {why}"
    details = details_of(group, plural, name) if plural else {}
    return ApiError(403, "Forbidden", message, details, headers)


def not_found(group: str, plural: str, name: str) -> ApiError:
    """No such object."""
    message = f"{qualified(group, plural)} {quoted(name)} not found"
    return ApiError(404, "NotFound", message, details_of(group, plural, name))


def no_resource() -> ApiError:
    """No such resource in a group that exists."""
    message = "the server could not find the requested resource"
    return ApiError(404, "NotFound", message, {})


def exists(group: str, plural: str, name: str) -> ApiError:
    """The name is taken."""
    message = f"{qualified(group, plural)} {quoted(name)} already exists"
    return ApiError(409, "AlreadyExists", message, details_of(group, plural, name))


def conflict(group: str, plural: str, name: str, why: str) -> ApiError:
    """The object is another by now."""
    message = (
        f"Operation cannot be fulfilled on {qualified(group, plural)} {quoted(name)}: {why}"
    )
    return ApiError(409, "Conflict", message, details_of(group, plural, name))


def bad_request(message: str) -> ApiError:
    """The request makes no sense."""
    return ApiError(400, "BadRequest", message)


def not_allowed() -> ApiError:
    """This resource knows no such method."""
    message = "the server does not allow this method on the requested resource"
    return ApiError(405, "MethodNotAllowed", message, {})


def not_acceptable(message: str = "") -> ApiError:
    """The Accept header names nothing that can be had, or not of this object."""
    if not message:
        return ApiError(406, "NotAcceptable", "406: Not Acceptable", {})
    return ApiError(406, "NotAcceptable", message)


def gone(message: str) -> ApiError:
    """The version asked for was compacted away."""
    return ApiError(410, "Expired", message)


def unsupported_media_type() -> ApiError:
    """The body is in no form that is read."""
    message = (
        "the body of the request was in an unknown format - accepted media types include: "
        "application/json, application/yaml, application/vnd.kubernetes.protobuf"
    )
    return ApiError(415, "UnsupportedMediaType", message)


def unsupported_patch() -> ApiError:
    """The patch is of no kind that is read."""
    return ApiError(415, "UnsupportedMediaType", "415: Unsupported Media Type", {})


def required(group: str, kind: str, name: str, field: str, why: str) -> ApiError:
    """One field is missing."""
    cause = f"Required value: {why}"
    message = f"{qualified(group, kind)} {quoted(name)} is invalid: {field}: {cause}"
    causes = [{"reason": "FieldValueRequired", "message": cause, "field": field}]
    return ApiError(422, "Invalid", message, details_of(group, kind, name, causes=causes))


def invalid(group: str, kind: str, name: str, field: str, value: Any, why: str) -> ApiError:
    """One field holds what it must not."""
    shown = quoted(value) if isinstance(value, str) else value
    cause = f"Invalid value: {shown}: {why}"
    message = f"{qualified(group, kind)} {quoted(name)} is invalid: {field}: {cause}"
    causes = [{"reason": "FieldValueInvalid", "message": cause, "field": field}]
    return ApiError(422, "Invalid", message, details_of(group, kind, name, causes=causes))


def quoted(text: str) -> str:
    """Text as Go's ``%q`` writes it, for what occurs in names."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
