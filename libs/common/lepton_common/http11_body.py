"""The bodies that the HTTP/1.1 server has in memory: the one that a peer sends, and the room for those of all peers."""

from typing import cast

from lepton_common.http11_request import Request

# Heads, and bodies up to this, are what any peer may cost: they are not counted.
SMALL_BYTES = 64 << 10
JOIN_BYTES = 16 << 10  # below, copying is cheaper than one more buffer

_RETRY_AFTER = b"retry-after: 1\r\n"


class Refused(Exception):
    """What is being read is not a request that this server takes. `headers` are more of the answer's."""

    def __init__(self, status: int, message: str, headers: bytes = b"") -> None:
        super().__init__(message)
        self.status = status
        self.headers = headers


class Room:
    """The memory for the bodies of all peers, from when their bytes come until they are answered.

    A body takes what came of it, once that is more than SMALL_BYTES, and is refused when it does not fit. So announcing
    a body takes room from nobody, small requests get in however much others send, and the memory is bounded: the room,
    and SMALL_BYTES for every request beside. Bodies count as they come: one with a Content-Encoding takes more once the
    handler decompresses it, which is not counted. Who really sends all that fits keeps other large bodies out until
    they are answered, or their time is up.
    """

    __slots__ = ("_headers", "free", "refused")

    def __init__(self, size_bytes: int, headers: bytes = b"") -> None:
        """`headers` are more lines of the answer to a body that is refused."""
        self.free = size_bytes
        self.refused = 0
        self._headers = _RETRY_AFTER + headers

    def check(self, size: int) -> None:
        """Raises Refused when there is no room for so many bytes now. None of it is taken."""
        if size > self.free:
            self.refused += 1
            raise Refused(503, f"body: {size} bytes, more than there is room for now", self._headers)

    def take(self, size: int) -> None:
        """So much less is free. Raises Refused, as `check`."""
        self.check(size)
        self.free -= size

    def give_back(self, request: Request) -> None:
        """The request is over: the room that its body took is free."""
        if len(request.body) > SMALL_BYTES:
            self.free += len(request.body)


class Body:
    """What came of the body that a peer sends. One object for all of its requests, one after the other."""

    __slots__ = ("_chunks", "_room", "_taken", "size")

    def __init__(self, room: Room) -> None:
        self.size = 0
        self._room = room
        self._taken = 0  # of the room
        self._chunks: list[bytes | bytearray] = []  # the first is bytes

    def add(self, data: bytes) -> None:
        """So much more came. Raises Refused when there is no room for it."""
        self.size += len(data)
        if self.size > SMALL_BYTES:
            self._room.take(self.size - self._taken)
            self._taken = self.size
        chunks = self._chunks
        # A chunk of one byte as an object of its own would take forty times the room.
        if not chunks or len(data) >= JOIN_BYTES:
            chunks.append(data)
        elif isinstance(last := chunks[-1], bytearray):
            last += data
        else:
            chunks.append(bytearray(data))

    def whole(self) -> bytes:
        """All that came. From here on its room is the request's, to be given back."""
        chunks = self._chunks
        self._forget()
        return cast(bytes, chunks[0]) if len(chunks) == 1 else b"".join(chunks)

    def drop(self) -> None:
        """The rest is not wanted, or will not come: the room is free."""
        self._room.free += self._taken
        self._forget()

    def _forget(self) -> None:
        self._chunks = []
        self.size = self._taken = 0
