"""The API server's refusals: HTTP status, reason and the `Status` object a client reads."""

from __future__ import annotations

from tests.kube.schema import Object

REASONS = {
    400: "BadRequest",
    401: "Unauthorized",
    403: "Forbidden",
    404: "NotFound",
    409: "Conflict",
    410: "Expired",
    413: "RequestEntityTooLarge",
    415: "UnsupportedMediaType",
    422: "Invalid",
    429: "TooManyRequests",
    500: "InternalError",
    503: "ServiceUnavailable",
    504: "Timeout",
}
MESSAGES = {
    401: "Unauthorized",
    429: "Too many requests, please try again later.",
    500: "an error on the server has prevented the request from succeeding",
    503: "the server is currently unable to handle the request",
    504: "the server was unable to return a response in the time allotted, but may still be processing the request",
}


class ApiError(Exception):
    """A request the server refuses."""

    def __init__(self, status: int, message: str = "", *, reason: str = "", details: Object | None = None) -> None:
        super().__init__(message or MESSAGES.get(status, "refused"))
        self.status = status
        self.reason = reason or REASONS.get(status, "Unknown")
        self.details = details or {}

    def body(self) -> Object:
        """The `Status` object sent to the client."""
        body: Object = {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure"}
        body |= {"message": str(self), "reason": self.reason, "code": self.status}
        if self.status == 429:
            self.details = {**self.details, "retryAfterSeconds": 1}
        return body | {"details": self.details} if self.details else body


def not_found(full_name: str, name: str) -> ApiError:
    """There is no such object."""
    group = full_name.partition(".")[2]
    details = {"name": name, "kind": full_name.partition(".")[0]} | ({"group": group} if group else {})
    return ApiError(404, f'{full_name} "{name}" not found', details=details)


def invalid(kind: str, group: str, name: str, causes: list[str]) -> ApiError:
    """The object breaks rules of its kind."""
    listed = causes[0] if len(causes) == 1 else "[" + ", ".join(causes) + "]"
    qualified = f"{kind}.{group}" if group else kind
    details: Object = {"name": name, "group": group, "kind": kind}
    details["causes"] = [{"message": cause.partition(": ")[2], "field": cause.partition(": ")[0]} for cause in causes]
    return ApiError(422, f'{qualified} "{name}" is invalid: {listed}', details=details)
