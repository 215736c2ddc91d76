"""Organizations, projects and the keys that open them."""

import hashlib
import hmac
import secrets
import uuid
import zlib
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import text
from sqlalchemy.orm import Session

from tunery.errors import Forbidden, Unauthenticated
from tunery.models import ApiKey, Organization, Project

SCOPES = ("files:read", "files:write", "jobs:read", "jobs:write", "models:read", "adapters:read", "admin")
"""`admin` includes the others and may change what belongs to the whole deployment, such as base models."""

_BASE62 = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_PREFIX = "ftk_live_"
_LOOKUP, _SECRET, _CHECK = 12, 32, 6


@dataclass(frozen=True)
class Identity:
    """Who is calling: one key of one project."""

    organization_id: uuid.UUID
    organization: str
    project_id: uuid.UUID
    project: str
    key_id: uuid.UUID
    key_name: str
    scopes: frozenset[str]
    expires_at: datetime | None

    def require(self, scope: str) -> None:
        """Raises Forbidden unless the key carries `scope`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise Forbidden(
                f"This API key lacks the scope '{scope}'.",
                fix="Use a key that has it, or ask your project's owner for one.",
            )


def create_organization(session: Session, name: str) -> Organization:
    session.add(organization := Organization(name=name))
    session.flush()
    return organization


def create_project(session: Session, organization_id: uuid.UUID, name: str) -> Project:
    session.add(project := Project(organization_id=organization_id, name=name))
    session.flush()
    return project


def create_key(
    session: Session,
    project_id: uuid.UUID,
    name: str,
    scopes: list[str],
    pepper: str,
    expires_at: datetime | None = None,
) -> tuple[ApiKey, str]:
    """Make a key. Its text is returned this once; the database keeps an HMAC of its secret half.

    The last six letters are a checksum, so that secret scanners and we can tell a key from noise offline.
    """
    project = session.get_one(Project, project_id)
    lookup, secret = _random(_LOOKUP), _random(_SECRET)
    body = f"{_PREFIX}{lookup}_{secret}"
    key = ApiKey(
        organization_id=project.organization_id,
        project_id=project.id,
        name=name,
        lookup=lookup,
        secret_hmac=_digest(secret, pepper),
        scopes=sorted(set(scopes)),
        expires_at=expires_at,
    )
    session.add(key)
    session.flush()
    return key, body + _checksum(body)


def authenticate(session: Session, presented: str, pepper: str) -> Identity:
    """Who this key belongs to.

    One SECURITY DEFINER function finds the key by its public half, because no project is known yet.

    Raises:
        Unauthenticated: malformed, unknown, wrong secret, revoked, expired, or of an archived project.
    """
    lookup, secret = _split(presented)
    row = session.execute(text("SELECT * FROM find_api_key(:lookup)"), {"lookup": lookup}).mappings().first()
    expected = bytes(row["secret_hmac"]) if row else b"\0" * 32
    if not hmac.compare_digest(expected, _digest(secret, pepper)) or row is None:
        raise _refused("Incorrect API key provided.")
    if not row["usable"]:
        raise _refused("This API key has been revoked or has expired.")
    return Identity(
        organization_id=row["organization_id"],
        organization=row["organization"],
        project_id=row["project_id"],
        project=row["project"],
        key_id=row["id"],
        key_name=row["name"],
        scopes=frozenset(row["scopes"]),
        expires_at=row["expires_at"],
    )


def _split(presented: str) -> tuple[str, str]:
    body, check = presented[:-_CHECK], presented[-_CHECK:]
    lookup, _, secret = body.removeprefix(_PREFIX).partition("_")
    whole = body.startswith(_PREFIX) and len(lookup) == _LOOKUP and len(secret) == _SECRET and body.isascii()
    if not whole or not hmac.compare_digest(check.encode(), _checksum(body).encode()):
        raise _refused("Incorrect API key provided.")
    return lookup, secret


def _refused(message: str) -> Unauthenticated:
    return Unauthenticated(message, fix="Check the key, or make a new one; `tunery whoami` tells which key is in use.")


def _random(length: int) -> str:
    return "".join(secrets.choice(_BASE62) for _ in range(length))


def _checksum(body: str) -> str:
    number, letters = zlib.crc32(body.encode()), []
    for _ in range(_CHECK):
        number, rest = divmod(number, 62)
        letters.append(_BASE62[rest])
    return "".join(reversed(letters))


def _digest(secret: str, pepper: str) -> bytes:
    return hmac.new(pepper.encode(), secret.encode(), hashlib.sha256).digest()
