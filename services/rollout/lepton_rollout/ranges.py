"""Ranges of whole numbers as regular expressions, for a mesh that can compare a header's text but no number. Pure."""


def range_regex(low: int, high: int) -> str:
    """Matches, as a whole, the numbers from `low` to `high` (0 ≤ low ≤ high), without leading zeros, and no others."""
    parts: list[str] = []
    while low <= high:
        # The largest run from here of which every last digit, or pair, or triple of digits, is included.
        free = 0
        while low % 10 ** (free + 1) == 0 and low + 10 ** (free + 1) - 1 <= high and low > 0:
            free += 1
        size = 10**free
        last_digit = low // size % 10
        steps = min(9 - last_digit, (high - low + 1) // size - 1)
        fixed = str(low // size)[:-1]
        digit = str(last_digit) if steps == 0 else f"[{last_digit}-{last_digit + steps}]"
        parts.append(fixed + digit + "[0-9]" * free)
        low += size * (steps + 1)
    return "|".join(parts)
