"""How many values a JSON text may have: what bounds the memory that it becomes.

A text of 256 KiB can be 100,000 empty objects, which take a hundred times its length
in memory, and every thread may read one at a time.
"""

from typing import Final

#: An order has some 20; an answer that lists a hundred recharges some 2,000.
JSON_VALUES_MAX: Final = 10_000


def has_too_many_values(text: bytes) -> bool:
    """Whether a JSON text may have more values and names than `JSON_VALUES_MAX` (pure).

    Every one of them but the first comes after a comma, a colon or an opening bracket,
    so these are counted, which is much faster than reading the text. Those within
    strings count, too: it errs on the safe side.
    """
    marks = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))
    return marks > JSON_VALUES_MAX
