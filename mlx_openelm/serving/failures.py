"""Errors as OpenAI's clients expect them: a status, and a body that names the parameter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from ..errors import OpenELMError, RequestError, rename_flags
from ..generation.options import GenerationOptions

# The options that messages of `RequestError` name, and the keys of requests where these are called otherwise.
_OPTIONS = {field.name for field in fields(GenerationOptions)}
_KEYS = {"temp": "temperature", "json_schema": "response_format", "json_object": "response_format"}

_encode = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
    500: "server_error",
    503: "server_error",
}


class APIError(Exception):
    """A request that is answered with an error.

    Args:
        message: a sentence for the user, without paths of this machine.
        status: of HTTP.
        param: the key of the request that is wrong.
        code: OpenAI's code for this error.
        headers: of the answer.
    """

    def __init__(
        self,
        message: str,
        status: int = 400,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.message, self.status, self.param, self.code = message, status, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error body."""
        kind = _TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def unavailable() -> APIError:
    """The error of requests while the engine is not running."""
    message = "The engine is not running; try again in a few seconds."
    return APIError(message, 503, code="engine_unavailable", headers={"Retry-After": "2"})


def as_api_error(error: BaseException) -> APIError:
    """What a failure is answered with; what is wrong with an option names its key, not a flag or Python's argument.

    Messages of unexpected errors stay here: they may hold paths or what another request sent.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, RequestError):
        code = "context_length_exceeded" if "too long" in str(error) else None
        name = _option(error.written.partition(" ")[0].rstrip(":"))
        param = _KEYS.get(name, name) if name in _OPTIONS else None
        return APIError(rename_flags(error.written, _for_clients), 400, param=param, code=code)
    if isinstance(error, OpenELMError):
        return APIError(rename_flags(error.written, _for_clients), 500)
    return APIError("The server failed while it worked on this request.", 500, code=type(error).__name__)


def _option(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _for_clients(flag: str) -> str:
    """What clients call an option: by its key, or as the server's flag if requests cannot give it."""
    name = _option(flag)
    if name not in _OPTIONS:
        return f"the server's {flag}"
    return "temperature" if name == "temp" else name


def to_json(values: Any) -> bytes:
    """JSON in UTF-8; half of a surrogate pair, which UTF-8 does not have, becomes a question mark."""
    return _encode(values).encode("utf-8", "replace")
