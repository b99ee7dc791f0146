"""HPACK's decoder (RFC 7541): one peer's header blocks as fields.

Behind a proxy every request has a block of its own, as each names its own id and time: decoding is part of every call's
cost. The tables are `hpack`'s; its decoder takes four times as long.
"""

from collections import deque

from hpack.huffman_constants import REQUEST_CODES, REQUEST_CODES_LENGTH
from hpack.table import HeaderTable

Field = tuple[bytes, bytes]

# The empty one is nobody's: indexes begin at 1.
_STATIC: tuple[Field, ...] = ((b"", b""), *((bytes(name), bytes(value)) for name, value in HeaderTable.STATIC_TABLE))
_TABLE_BYTES = 4096
_ENTRY_BYTES = 32
_MAX_INTEGER_BYTES = 5
_END = 256  # Huffman's symbol for the end, which nobody may send
_MAX_PADDING_BITS = 7


class Undecodable(Exception):
    """A block that is no HPACK. The text does not repeat what was sent."""


class Decoder:
    """One connection's state. `changes` counts what every later block's meaning depends on: entries and sizes."""

    __slots__ = ("_capacity", "_entries", "_max_bytes", "_size", "changes")

    def __init__(self, max_bytes: int) -> None:
        """`max_bytes`: what the fields of a block may have together."""
        self._max_bytes = max_bytes
        self._entries: deque[Field] = deque()  # the newest first
        self._size = 0
        self._capacity = _TABLE_BYTES
        self.changes = 0

    def decode(self, block: bytes) -> tuple[list[Field], int]:
        """The fields in their order, and their bytes, counted as entries of the table are.

        Raises Undecodable; then the state is not the peer's any more.
        """
        fields: list[Field] = []
        size = offset = 0
        try:
            while offset < len(block):
                first = block[offset]
                if first & 0x80:
                    index = first & 0x7F
                    offset += 1
                    if index == 0x7F:
                        index, offset = _integer(block, offset, index)
                    field = self._indexed(index)
                elif first & 0x60 == 0x20:
                    if fields:
                        raise Undecodable("a new size of the table behind a field")
                    offset = self._resize(block, offset)
                    continue
                else:
                    field, offset = self._literal(block, offset)
                size += len(field[0]) + len(field[1]) + _ENTRY_BYTES
                if size > self._max_bytes:
                    raise Undecodable(f"more than {self._max_bytes} bytes of fields")
                fields.append(field)
        except IndexError:
            raise Undecodable("cut off") from None
        return fields, size

    def _indexed(self, index: int) -> Field:
        if 0 < index < len(_STATIC):
            return _STATIC[index]
        if 0 <= index - len(_STATIC) < len(self._entries):
            return self._entries[index - len(_STATIC)]
        raise Undecodable("an index of no entry")

    def _literal(self, block: bytes, offset: int) -> tuple[Field, int]:
        is_kept = block[offset] & 0x40
        most = 0x3F if is_kept else 0x0F
        index = block[offset] & most
        offset += 1
        if index == most:
            index, offset = _integer(block, offset, index)
        if index:
            name = self._indexed(index)[0]
        else:
            name, offset = _string(block, offset)
        value, offset = _string(block, offset)
        if is_kept:
            self._add((name, value))
        return (name, value), offset

    def _add(self, field: Field) -> None:
        self.changes += 1
        self._entries.appendleft(field)
        self._size += len(field[0]) + len(field[1]) + _ENTRY_BYTES
        self._evict()

    def _evict(self) -> None:
        while self._size > self._capacity:
            name, value = self._entries.pop()
            self._size -= len(name) + len(value) + _ENTRY_BYTES

    def _resize(self, block: bytes, offset: int) -> int:
        size = block[offset] & 0x1F
        offset += 1
        if size == 0x1F:
            size, offset = _integer(block, offset, size)
        if size > _TABLE_BYTES:
            raise Undecodable("a table larger than allowed")
        self.changes += 1
        self._capacity = size
        self._evict()
        return offset


def _integer(block: bytes, offset: int, prefix: int) -> tuple[int, int]:
    """The number that begins with a full prefix, and where it ends."""
    number, shift = prefix, 0
    for end in range(offset, offset + _MAX_INTEGER_BYTES):
        number += (block[end] & 0x7F) << shift
        if block[end] < 0x80:
            return number, end + 1
        shift += 7
    raise Undecodable("a number that is too long")


def _string(block: bytes, offset: int) -> tuple[bytes, int]:
    first = block[offset]
    size = first & 0x7F
    offset += 1
    if size == 0x7F:
        size, offset = _integer(block, offset, size)
    end = offset + size
    if end > len(block):
        raise Undecodable("cut off")
    text = block[offset:end]
    return (_unpacked(text) if first & 0x80 else text), end


# --- Huffman's code, a byte at a time ---------------------------------------------------------------------------------


class _Node(dict[int, tuple[bytes, "_Node"]]):
    """Where one is in the tree after some bits. By the next byte, once it was met: the symbols it ends, and the node
    behind it."""

    __slots__ = ("branches", "is_padding")

    def __init__(self) -> None:
        self.branches: list[_Node | int | None] = [None, None]  # a symbol at the leaves
        self.is_padding = False  # A text may end here.

    def __missing__(self, byte: int) -> tuple[bytes, "_Node"]:
        node, symbols = self, bytearray()
        for shift in range(7, -1, -1):
            branch = node.branches[byte >> shift & 1]
            if isinstance(branch, _Node):
                node = branch
                continue
            if branch is None or branch == _END:
                raise Undecodable("not Huffman's code")
            symbols.append(branch)
            node = _ROOT
        found = self[byte] = bytes(symbols), node
        return found


def _tree() -> _Node:
    root = _Node()
    for symbol, (code, length) in enumerate(zip(REQUEST_CODES, REQUEST_CODES_LENGTH, strict=True)):
        node = root
        for shift in range(length - 1, 0, -1):
            branch = node.branches[code >> shift & 1]
            if branch is None:
                branch = node.branches[code >> shift & 1] = _Node()
            assert isinstance(branch, _Node), "no code begins another"
            node = branch
        node.branches[code & 1] = symbol
    node = root
    for _ in range(_MAX_PADDING_BITS + 1):
        node.is_padding = True
        following = node.branches[1]
        assert isinstance(following, _Node), "the end's code is the longest, all ones"
        node = following
    return root


_ROOT = _tree()


def _unpacked(text: bytes) -> bytes:
    node = _ROOT
    pieces = []
    for byte in text:
        piece, node = node[byte]
        pieces.append(piece)
    if not node.is_padding:
        raise Undecodable("Huffman's code, cut off")
    return b"".join(pieces)
