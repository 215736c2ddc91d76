"""Keys and passwords out of text that is kept: known shapes, and values beside words that say what they are."""

import re

_KEPT_SHAPES = re.compile(
    rb"(?P<keep>"
    rb"://[^\s:/@]{0,200}:(?=[^\s@/]{1,512}@)"  # a URL's user:
    rb"|\b(?:bearer|basic)\s+(?=[A-Za-z0-9._~+/=-]{8})"
    rb"|(?:secret|password|passwd|api_?-?key|access_?-?key|(?:auth|access|refresh|session|hf|hub|wandb)_?-?token)"
    rb"[\"']?\s{0,8}[=:]\s{0,8}[\"']?(?=[^\s\"',;&]{6})"
    rb"|\b(?:X-Amz-(?:Signature|Credential|Security-Token)|sig)=(?=[^\s&]{8})"
    rb")(?P<secret>(?:[^\s\"'@,;&<>]{1,4096}))",
    re.IGNORECASE,
)
_SHAPES = re.compile(
    rb"\b(?:"
    rb"ftk_[A-Za-z0-9_-]{12,256}"  # ours
    rb"|whsec_[A-Za-z0-9+/=]{16,128}"
    rb"|(?:AKIA|ASIA)[A-Z0-9]{16}"
    rb"|hf_[A-Za-z0-9]{20,128}"
    rb"|sk-[A-Za-z0-9_-]{20,256}"
    rb"|gh[pousr]_[A-Za-z0-9]{30,255}|github_pat_[A-Za-z0-9_]{30,255}|glpat-[A-Za-z0-9_-]{20,64}"
    rb"|xox[abprs]-[A-Za-z0-9-]{10,255}"
    rb"|eyJ[A-Za-z0-9_-]{8,1024}\.[A-Za-z0-9_-]{8,2048}\.[A-Za-z0-9_-]{8,1024}"
    rb")"
)
_MARK = b"[redacted]"
_LONGEST_LINE = 64 * 1024
OVERLAP = 8 * 1024
"""More than the longest secret that a pattern takes."""


def redact(text: bytes) -> bytes:
    """`text` without what looks like a secret."""
    return _SHAPES.sub(_MARK, _KEPT_SHAPES.sub(rb"\g<keep>" + _MARK, text))


class Redactor:
    """The same for a stream in pieces: a secret across the border of two is found too. Lines come out whole."""

    def __init__(self) -> None:
        self._held = b""

    def feed(self, data: bytes) -> bytes:
        """Whatever can be given out by now."""
        held = self._held + data
        cut = max(held.rfind(b"\n"), held.rfind(b"\r")) + 1
        if not cut and len(held) > _LONGEST_LINE:
            cut = _between_secrets(held, len(held) - OVERLAP)
        self._held = held[cut:]
        return redact(held[:cut])

    def rest(self) -> bytes:
        """What was held back."""
        held, self._held = self._held, b""
        return redact(held)


def _between_secrets(text: bytes, cut: int) -> int:
    for pattern in (_KEPT_SHAPES, _SHAPES):
        for found in pattern.finditer(text, max(0, cut - OVERLAP)):
            if found.start() < cut < found.end():
                cut = found.start()
    return cut or len(text)
