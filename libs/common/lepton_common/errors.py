"""Every error Lepton raises on purpose.

    LeptonError
    ├── Invalid           the caller's input is wrong; the message names the input
    │   ├── TooLarge      more bytes or elements than allowed
    │   ├── Unsupported   a well-formed request for something Lepton does not do
    │   └── UnsupportedEncoding   a body in a Content-Encoding that is not read
    ├── Denied            who calls may not; `key_id` says who that is, where a key was known
    │   ├── Unauthenticated   no key, an unknown key, an expired key
    │   └── Forbidden     a valid key without the scope, or for other models
    ├── NotFound          no such thing for this tenant
    ├── Conflict          the state does not allow it
    └── Unavailable       try again later (retryable)
        ├── Overloaded    the server as a whole is too busy: queue full
        ├── Limited       this caller or model is over its limit
        └── DeadlineExceeded   the caller's time ran out

The message is for the caller: no paths, keys or stack traces. `web.py` and `oip.py` map kinds to status codes.
"""


class LeptonError(Exception):
    """Base of all. `retryable` says whether the same call may succeed later without anyone changing anything."""

    retryable = False

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.retry_after_s = retry_after_s


class Invalid(LeptonError): ...


class TooLarge(Invalid): ...


class Unsupported(Invalid): ...


class UnsupportedEncoding(Invalid): ...


class Denied(LeptonError):
    """`tenant` and `key_id` are for the audit, not for the caller."""

    def __init__(self, message: str, *, tenant: str = "", key_id: str = "") -> None:
        super().__init__(message)
        self.tenant = tenant
        self.key_id = key_id


class Unauthenticated(Denied): ...


class Forbidden(Denied): ...


class NotFound(LeptonError): ...


class Conflict(LeptonError): ...


class Unavailable(LeptonError):
    retryable = True


class Overloaded(Unavailable): ...


class Limited(Unavailable): ...


class DeadlineExceeded(Unavailable): ...


# One table for every front door: problem JSON (`web.py`) and OIP errors (`oip.py`) answer with the same status.
# The first matching kind wins, so the narrower ones stand first.
_STATUS: tuple[tuple[type[LeptonError], int], ...] = (
    (TooLarge, 413),
    (Unsupported, 501),
    (UnsupportedEncoding, 415),
    (Invalid, 400),
    (Unauthenticated, 401),
    (Forbidden, 403),
    (NotFound, 404),
    (Conflict, 409),
    (Limited, 429),
    (DeadlineExceeded, 504),
    (Unavailable, 503),
)


def status_of(error: LeptonError) -> int:
    """The HTTP status of an error's kind; 500 for one this table does not know."""
    return next((status for kind, status in _STATUS if isinstance(error, kind)), 500)
