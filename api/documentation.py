"""Pieces of the OpenAPI document that routes share."""

from typing import Any

from fastapi.routing import APIRoute

from api.schemas.common import ErrorOut
from tunery.files import PURPOSES

_MEANINGS = {
    400: "The request cannot be carried out as it stands; `param` names the field.",
    401: "No key, or one that opens nothing.",
    403: "The key lacks the scope that this needs.",
    404: "There is no such object in this project.",
    409: "The object's state forbids it; asking again will not help (`x-should-retry: false`).",
    413: "The body is larger than this server accepts.",
    429: "The project's quota is used up (`x-should-retry: false`).",
    503: "A server that this one stands on does not answer; `Retry-After` says when to ask again.",
}

BINARY: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The bytes; `ETag` is their sha256.",
        "content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}},
    }
}

MULTIPART = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": list(PURPOSES)},
                    },
                }
            }
        },
    }
}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Declare what may go wrong."""
    return {status: {"model": ErrorOut, "description": _MEANINGS[status]} for status in statuses}


ALWAYS = problems(401, 403, 503) | {
    "default": {"model": ErrorOut, "description": "Anything else, in the same envelope."}
}


def operation_id(route: APIRoute) -> str:
    """The function's name: it stays when a path changes, and generated clients call their methods after it."""
    return route.name
