"""Errors as OpenAI's clients know them."""

from __future__ import annotations

from typing import Any

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """What is wrong with a request, and the HTTP status that says so."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """The JSON of the answer."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _TYPES.get(self.status, default)
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class Refused(BaseException):
    """Carries an `ApiError` through mlx-lm's handler, which turns every `Exception` into a 404."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error
