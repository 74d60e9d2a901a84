"""Pickles are read without executing them: what plain data needs is read, everything else is refused by its name."""

from __future__ import annotations

import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.data.unpickle import read_pickle
from cifar_hpc.errors import SpecError

settings.register_profile("ci", derandomize=True, deadline=None, database=None)
settings.load_profile("ci")

PATH = Path("images.pkl")
ROWS = np.arange(2 * 3072, dtype=np.int64).reshape(2, 3072).astype(np.uint8)
BATCH = {b"data": ROWS, b"labels": [3, 8], b"batch_label": b"testing", b"filenames": [b"a.png", b"b.png"], b"n": None}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def text(value: bytes) -> bytes:
    """A str of Python 2, as its pickles hold it."""
    return b"T" + struct.pack("<I", len(value)) + value


def python_2(data: bytes, shape: tuple[int, int]) -> bytes:
    """What Python 2's numpy wrote, as in CIFAR-10's own files."""
    dtype = (
        b"cnumpy\ndtype\n"
        + text(b"u1")
        + b"K\x00K\x01\x87R(K\x03"
        + text(b"|")
        + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    )
    size = b"".join(b"M" + struct.pack("<H", n) for n in shape)
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
    state = b"(K\x01" + size + b"\x86" + dtype + b"\x89" + text(data) + b"tb"
    return b"\x80\x02}q\x01" + text(b"data") + array + state + b"s" + text(b"labels") + b"]q\x02(K\x03K\x08es."


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_batch_of_any_protocol_is_read_as_pickle_reads_it(protocol: int, order: Any) -> None:
    batch = BATCH | {b"data": np.asarray(ROWS, order=order), b"wide": np.arange(4, dtype=">i4"), "f": np.float32(0.5)}
    found = read_pickle(PATH, pickle.dumps(batch, protocol))
    assert list(found) == ["data", "labels", "batch_label", "filenames", "n", "wide", "f"]
    assert np.array_equal(found["data"], ROWS) and found["data"].dtype == np.uint8
    assert np.array_equal(found["wide"], np.arange(4)) and found["f"] == 0.5
    assert (found["labels"], found["batch_label"], found["filenames"]) == ([3, 8], b"testing", [b"a.png", b"b.png"])


def test_python_2s_pickles_are_read() -> None:
    content = python_2(ROWS.tobytes(), (2, 3072))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what numpy thinks of its old way to write types
        assert np.array_equal(pickle.loads(content, encoding="latin1")["data"], ROWS)
    found = read_pickle(PATH, content)
    assert np.array_equal(found["data"], ROWS) and found["labels"] == [3, 8]


def test_numpy_1s_and_numpy_2s_names_are_the_same() -> None:
    old = pickle.dumps({"data": ROWS}, 2).replace(b"numpy._core.", b"numpy.core.")
    assert b"numpy.core." in old
    assert np.array_equal(read_pickle(PATH, old)["data"], ROWS)


def test_code_is_refused_by_its_name_and_not_executed(tmp_path: Path) -> None:
    made = tmp_path / "made"
    hostile = [
        (pickle.dumps({b"data": Call(Path.touch, made)}, 2), "getattr"),
        (pickle.dumps({b"data": Call(eval, f"open({str(made)!r}, 'w')")}, 4), "eval"),
        (b"\x80\x02cos\nsystem\n" + text(f"touch {made}".encode()) + b"\x85R.", "os.system"),
        (f"\x80\x02(S'touch {made}'\nios\nsystem\n.".encode("latin-1"), "INST of os system"),
        (b"\x80\x02(cos\nsystem\n" + text(f"touch {made}".encode()) + b"o.", "os.system"),
        (b"\x80\x02cnumpy\nload\n)\x81.", "numpy.load"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "NEWOBJ"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "calls what is no function"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "calls what is no function"),
        (b"\x80\x02}X\x01\x00\x00\x00ab.", "sets the state"),
        (b"\x80\x02\x82\x01.", "EXT1"),
        (b"\x80\x02Pname\n.", "PERSID"),
        (b"\x80\x05\x97.", "NEXT_BUFFER"),
        (pickle.dumps({"data": np.array([{}])}, 2), "other things than numbers|type"),
        (pickle.dumps({"data": np.zeros(2, "u1,u1")}, 2), "type 'V2'"),
        (pickle.dumps({"data": np.zeros(2, "M8[s]")}, 2), "type 'M8'"),
        (pickle.dumps({"data": {1, 2}}, 4), "EMPTY_SET"),
        (pickle.dumps([ROWS], 2), "no dictionary"),
        (b"\x80\x02}c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86Rs.", "rot13"),
        (b"\x80\x02}X\x01\x00\x00\x00acnumpy.core.multiarray\n_reconstruct\n)Rs.", "no content"),
        (b"\x80\x02}X\x01\x00\x00\x00aNa.", "appends to what is no list"),
    ]  # fmt: skip
    for content, words in hostile:
        with pytest.raises(SpecError, match=rf"^images\.pkl: a pickle that is not read, since .*({words})") as raised:
            read_pickle(PATH, content)
        assert "nothing in it was executed" in str(raised.value)
    assert not made.exists()


def test_what_holds_itself_many_times_over_costs_nothing() -> None:
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    assert read_pickle(PATH, pickle.dumps({"data": nested}, 2))["data"] is not None
    keyed = pickle.dumps(nested, 2)[2:-1]
    with pytest.raises(SpecError, match="other keys"):  # its hash would take for ever
        read_pickle(PATH, b"\x80\x02}" + keyed + b"Ns.")


def test_nothing_that_is_no_text_is_written_out() -> None:
    """What holds itself many times over takes for ever to write, too."""
    nested: Any = ()
    for _ in range(60):
        nested = (nested, nested)
    value = pickle.dumps(nested, 2)[2:-1]
    word = b"X\x01\x00\x00\x00a"
    for content, words in [
        (b"cnumpy\ndtype\n" + value + b"\x85R", "a type without a name"),
        (b"c_codecs\nencode\n" + word + value + b"\x86R", "encodes what is no text"),
        (b"c_codecs\nencode\n" + value + word + b"\x86R", "encodes what is no text"),
        (value + word + b"\x93", "names something otherwise than by text"),
        (word + value + b"\x93", "names something otherwise than by text"),
    ]:
        with pytest.raises(SpecError, match=words):
            read_pickle(PATH, b"\x80\x04" + content + b".")


def test_a_damaged_file_is_a_named_error() -> None:
    whole = pickle.dumps(BATCH, 2)
    for length in [0, 1, 2, 20, 200, len(whole) - 1]:
        with pytest.raises(SpecError, match=r"^images\.pkl: a (damaged )?pickle"):
            read_pickle(PATH, whole[:length])
    huge = b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x."  # claims four exabytes
    with pytest.raises(SpecError, match="damaged"):
        read_pickle(PATH, huge)


@given(st.integers(2, 5), st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), min_size=1, max_size=8))
@settings(max_examples=300)
def test_any_bytes_are_a_dictionary_or_a_named_error(protocol: int, flips: list[tuple[int, int]]) -> None:
    content = bytearray(pickle.dumps({b"data": ROWS[:, :64], "ids": np.arange(3), "l": [1, 2.5, "x"]}, protocol))
    for position, byte in flips:
        content[position % len(content)] = byte
    try:
        assert isinstance(read_pickle(PATH, bytes(content)), dict)
    except SpecError as error:
        assert len(str(error)) < 1000
