"""What is counted as a value, and what an ordinary text is away from the bound."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from function.json_bound import JSON_VALUES_MAX, has_too_many_values
from tests.orders import data

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def values_of(document: object) -> int:
    """Values and names of a document, itself included."""
    if isinstance(document, dict):
        return 1 + sum(1 + values_of(each) for each in document.values())
    if isinstance(document, list):
        return 1 + sum(values_of(each) for each in document)
    return 1


@given(json_values)
def test_no_text_within_the_bound_has_more_values(document: object) -> None:
    text = json.dumps(document).encode()
    marks = sum(text.count(mark) for mark in (b",", b":", b"[", b"{"))

    assert values_of(document) <= marks + 1


@pytest.mark.parametrize("value", [b"{}", b"[]", b"1", b'""'])
def test_bound_is_exact_for_values_without_marks_in_them(value: bytes) -> None:
    least = b"[" + b",".join([b"1"] * JSON_VALUES_MAX) + b"]"
    assert not has_too_many_values(least)

    assert has_too_many_values(b"[" + b",".join([value] * (JSON_VALUES_MAX + 1)) + b"]")


def test_order_is_far_below_the_bound() -> None:
    text = json.dumps(data() | {"metadata": {str(n): "," * 9 for n in range(100)}})

    assert not has_too_many_values(text.encode())
