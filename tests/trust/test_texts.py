"""JSON of strangers, and what the machine refuses: one line with the cause, wherever it stands in the chain."""

import errno
import json
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compressft.errors import UserError, system_error, trouble
from compressft.utils.foreign import LONGEST, foreign
from compressft.utils.texts import DEEPEST, parse_json, read_json, read_object, read_text


@settings(max_examples=300)
@given(st.text(max_size=60) | st.text(alphabet='{}[]",:0123456789eE+-. tfn\\u', max_size=40))
def test_any_text_is_json_or_one_line(text):
    try:
        found = parse_json(text, "here")
    except UserError as error:
        assert "\n" not in str(error) and str(error).startswith("here: ")
    else:
        assert repr(found) == repr(json.loads(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("[" * 100_000, "is nested too deep"),
        ("[" * (DEEPEST + 5) + "]" * (DEEPEST + 5), "is nested deeper than"),
        ("1" * 5000, "a number of 5,000 digits is too long"),
        ("{oops", "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_refused(text, said):
    with pytest.raises(UserError, match=said):
        parse_json(text, "here")


def test_files(tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}')
    assert read_object(path) == {"a": 1}, "a byte order mark is no content"
    path.write_bytes(b"{}\n\xff")
    with pytest.raises(UserError, match=r"x\.json:2: is not UTF-8"):
        read_json(path)
    path.write_text("[]")
    with pytest.raises(UserError, match="wants a JSON object, holds list"):
        read_object(path)
    for bad in (tmp_path, tmp_path / "no", tmp_path / ("x" * 300), f"{tmp_path}/a\x00b"):
        with pytest.raises(UserError, match="cannot be read: ") as caught:
            read_text(bad)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EMFILE])
@pytest.mark.parametrize("how", ["itself", "cause", "context", "words"])
def test_the_cause_is_read_from_the_chain(number, how):
    refused = OSError(number, os.strerror(number), "file")
    try:
        if how == "itself":
            raise refused
        if how == "words":
            raise RuntimeError(f"Error while serializing: {os.strerror(number)} (os error {number})")
        try:
            raise refused
        except OSError as inner:
            raise RuntimeError("unexpected pos 64 vs 0") from (inner if how == "cause" else None)
    except Exception as error:
        assert system_error(error).errno == number
        assert trouble(error).count(os.strerror(number)) == 1 and "\n" not in trouble(error)


def test_a_fault_of_ours_is_no_trouble_of_the_machine():
    for error in (KeyError("x"), RuntimeError("unexpected pos 1 vs 0"), FileNotFoundError(errno.ENOENT, "no", "x")):
        assert trouble(error) is None
    assert "not enough memory" in trouble(MemoryError())
    assert "not enough memory" in trouble(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 PB"))


ERRORS = [KeyError("a"), TypeError("b\nc"), RecursionError("d"), AttributeError("e"), OSError("f"), ValueError("")]


@pytest.mark.parametrize("error", ERRORS, ids=[type(error).__name__ for error in ERRORS])
def test_whatever_a_loader_raises_is_one_line(error):
    with pytest.raises(UserError) as caught, foreign("model: 'x' could not be loaded"):
        raise error
    assert str(caught.value).startswith("model: 'x' could not be loaded: ") and "\n" not in str(caught.value)
    assert caught.value.__cause__ is error


def test_a_library_cannot_print_a_whole_file():
    with pytest.raises(UserError) as caught, foreign("x"):
        raise ValueError("y" * 10**6)
    assert len(str(caught.value)) < LONGEST + 20
