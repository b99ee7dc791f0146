"""The id that one request has everywhere: in its answer, in traces, in logs. The caller's own, else a new one."""

import random

from lepton_common.http11 import Request

# What an answer says of its own request only.
OF_ONE_REQUEST = frozenset((b"x-request-id", b"traceparent", b"server-timing"))

_MOST_BYTES = 256
_CONTROLS = bytes((*range(32), 127))


def request_id(request: Request) -> bytes:
    """The caller's id; where there is none, or one that is too long or no text, a new one at each call."""
    own = request.headers.get(b"x-request-id")
    if own and len(own) <= _MOST_BYTES and own.translate(None, _CONTROLS) == own:
        return own
    return b"%032x" % random.getrandbits(128)


def id_line(request: Request) -> bytes:
    """The header line of the answer."""
    return b"x-request-id: %b\r\n" % request_id(request)
