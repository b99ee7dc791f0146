"""Every error the client raises: the platform's own kinds (`lepton_common.errors`), told apart by HTTP status.

LeptonError
├── Invalid               what was sent is wrong; the message names it
│   ├── TooLarge          more bytes than the platform takes
│   └── Unsupported       well formed, but nothing Lepton does
├── Unauthenticated       no key, an unknown key, an expired key
├── Forbidden             a valid key without the scope
├── NotFound              no such thing for this tenant
├── Conflict              the state does not allow it
├── RolloutFailed         a version did not reach live traffic; the one before it serves on
└── Unavailable           the same call may succeed later (retryable)
    ├── Unreachable       nothing answers at the platform's URL
    ├── Limited           this caller or model is over its limit
    └── DeadlineExceeded  the time for the call ran out
"""

import math
import re


class LeptonError(Exception):
    """Base of all. `hint` says what to do next, `status` is the HTTP status when the platform answered."""

    retryable = False
    default_hint = ""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint
        self.status = status
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return f"{self.message}\n{self.hint}" if self.hint else self.message


class Invalid(LeptonError): ...


class TooLarge(Invalid): ...


class Unsupported(Invalid): ...


class Unauthenticated(LeptonError):
    default_hint = "Set LEPTON_API_KEY to a valid key, or start your own platform with `lepton up`."


class Forbidden(LeptonError):
    default_hint = "Use a key that has the scope: `lepton keys create NAME --scope SCOPE` makes one."


class NotFound(LeptonError): ...


class Conflict(LeptonError): ...


class RolloutFailed(LeptonError):
    default_hint = "`lepton rollout explain MODEL` tells what happened; `lepton logs worker` shows more."


class Unavailable(LeptonError):
    retryable = True
    default_hint = "Try again in a moment; `lepton status` shows how the platform is."


class Unreachable(Unavailable):
    default_hint = "Start it with `lepton up`, or set LEPTON_URL to a platform that runs."


class Limited(Unavailable):
    default_hint = "Send fewer requests at once, or try again in a moment."


class DeadlineExceeded(Unavailable):
    default_hint = "Allow more time, or send fewer rows at once."


_KINDS: dict[int, type[LeptonError]] = {
    401: Unauthenticated,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    413: TooLarge,
    429: Limited,
    501: Unsupported,
    502: Unavailable,
    503: Unavailable,
    504: DeadlineExceeded,
}


# By what a 404 says that there is none of; nothing is said of the rest.
_LISTED_BY = {
    "model": "lepton models",
    "version": "lepton versions MODEL",
    "rollout": "lepton rollouts",
    "trace": "lepton trace",
    "tenant": "lepton tenants list",
}


def error_of(status: int, message: str, retry_after_s: float | None = None) -> LeptonError:
    """The error for an HTTP status from 400 on: unlisted ones are Invalid below 500 and plain LeptonError above."""
    kind = _KINDS.get(status, Invalid if status < 500 else LeptonError)
    hint = None
    if kind is NotFound:
        hint = _hint_of_missing(message)
    elif retry_after_s is not None and retry_after_s > 60:
        hours, minutes = divmod(math.ceil(retry_after_s / 60), 60)
        hint = f"Try again in {hours} h {minutes} min."
    return kind(message, hint=hint, status=status, retry_after_s=retry_after_s)


def _hint_of_missing(message: str) -> str:
    """What lists the things of which one is missing: "model 'm' has no version 3", "model 'm' is not served"."""
    missing = re.search(r"\bno (\w+)", message) or re.match(r"(\w+) .*is not", message)
    command = _LISTED_BY.get(missing[1]) if missing else None
    return f"`{command}` lists what there is." if command else ""
