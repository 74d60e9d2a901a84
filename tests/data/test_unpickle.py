"""Pickles are read without executing them: what plain data needs is read, everything else is refused by its name."""

from __future__ import annotations

import pickle
import struct
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cifar_hpc.data.image_input import read_pickle
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
        (f"\x80\x02(S'touch {made}'\nios\nsystem\n.".encode("latin-1"), "os.system"),
        (b"\x80\x02(cos\nsystem\n" + text(f"touch {made}".encode()) + b"o.", "os.system"),
        (b"\x80\x02cnumpy\nload\n)\x81.", "numpy.load"),
        (b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nmatrix\nK\x00\x85", "numpy.matrix"),
        (b"\x80\x02cnumpy\nndarray\n)\x81.", "not a type object"),
        (b"\x80\x02cnumpy\ndtype\n)\x81X\x01\x00\x00\x00ab.", "ValueError"),
        (b"\x80\x02cnumpy\nndarray\n)R.", "not callable"),
        (b"\x80\x02X\x01\x00\x00\x00a)R.", "not callable"),
        (b"\x80\x02}X\x01\x00\x00\x00ab.", "sets the state of something other than an array"),
        (b"\x80\x02c_codecs\nencode\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.", "sets the state of something"),
        (b"\x80\x02cnumpy\ndtype\n}b.", "sets the state of something other than an array"),
        (b"\x80\x02\x82\x01.", "unregistered extension code 1"),
        (b"\x80\x02Pname\n.", "unsupported persistent id"),
        (b"\x80\x02NQ.", "unsupported persistent id"),
        (b"\x80\x05\x97.", "out-of-band"),
        (pickle.dumps({"data": np.array([{}])}, 2), "of type 'O8'"),
        (pickle.dumps({"data": np.zeros(2, "u1,u1")}, 2), "of type 'V2'"),
        (pickle.dumps({"data": np.zeros(2, "M8[s]")}, 2), "of type 'M8'"),
        (pickle.dumps({"data": {1, 2}}, 4), "a set"),
        (pickle.dumps({"data": frozenset({1, 2})}, 4), "a set"),
        (b"\x80\x02(NNd.", "a dictionary of protocol 0"),
        (pickle.dumps([ROWS], 2), "no dictionary"),
        (b"\x80\x02}c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00rot13\x86Rs.", "other than as latin1"),
        (b"\x80\x02}X\x01\x00\x00\x00aNa.", "no attribute"),
    ]  # fmt: skip
    for content, words in hostile:
        with pytest.raises(SpecError, match=rf"^images\.pkl: a pickle that cannot be read: .*({words})") as raised:
            read_pickle(PATH, content)
        assert "; nothing in it was executed. Allowed: " in str(raised.value)
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
        (b"cnumpy\ndtype\n" + value + b"\x85R", "of type 'without a name'"),
        (b"c_codecs\nencode\n" + word + value + b"\x86R", "other than as latin1"),
        (b"c_codecs\nencode\n" + value + word + b"\x86R", "other than as latin1"),
        (value + word + b"\x93", "STACK_GLOBAL requires str"),
        (word + value + b"\x93", "STACK_GLOBAL requires str"),
        (b"]" + value + b"Ns", "list indices"),
    ]:
        with pytest.raises(SpecError, match=words):
            read_pickle(PATH, b"\x80\x04" + content + b".")


def test_a_damaged_file_is_a_named_error() -> None:
    whole = pickle.dumps(BATCH, 2)
    for length in [0, 1, 2, 20, 200, len(whole) - 1]:
        with pytest.raises(SpecError, match=r"^images\.pkl: a pickle that cannot be read: "):
            read_pickle(PATH, whole[:length])


def array(shape: bytes, content: bytes = bytes(4)) -> bytes:
    """A pickled array of u1 in data, of any shape."""
    dtype = b"cnumpy\ndtype\n" + text(b"u1") + b"K\x00K\x01\x87R"
    state = b"(K\x01" + shape + dtype + b"\x89" + text(content) + b"tb"
    return b"\x80\x02}" + text(b"data") + b"cnumpy.core.multiarray\n_reconstruct\n)R" + state + b"s."


def test_an_array_is_no_larger_than_its_content() -> None:
    number = b"\x8a\x09" + (2**62).to_bytes(9, "little")
    assert read_pickle(PATH, array(b"K\x02K\x02\x86"))["data"].shape == (2, 2)
    for shape in (
        b"J\xfe\xff\xff\xffJ\xfe\xff\xff\xff\x86",  # -2 x -2 are 4 bytes, too
        b"J\xff\xff\xff\xff\x85",
        number + b"\x85",
        number + number + b"\x86",
        b"(" + 100 * b"K\x01" + b"t",
        b"\x88\x85",
        b"G\x40\x10\x00\x00\x00\x00\x00\x00\x85",
        b"K\x04",
        b"]K\x04a",
    ):
        with pytest.raises(SpecError, match=r"^images\.pkl: a pickle that cannot be read: "):
            read_pickle(PATH, array(shape))


def test_what_a_file_claims_takes_no_memory() -> None:
    claim = struct.pack("<Q", 2**31)
    hostile = [
        b"\x80\x04\x8e" + struct.pack("<Q", 2**62) + b"x.",  # four exabytes
        *(b"\x80\x05" + operation + claim + b"x." for operation in (b"\x8d", b"\x8e", b"\x95", b"\x96")),
        b"\x80\x02Nr\x00\x00\x00\x80.",  # a memo index
        b"\x80\x02Np2147483648\n.",
        b"\x80\x02\x8b\x00\x00\x00\x7f\x01.",
    ]
    tracemalloc.start()
    try:
        for content in hostile:
            with pytest.raises(SpecError, match=r"^images\.pkl: a pickle that cannot be read: "):
                read_pickle(PATH, content)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


def test_values_may_be_nested_deeply() -> None:
    depth = 10**5
    for content in (b"]" * depth + b"a" * (depth - 1), b")" + b"\x85" * depth):
        assert read_pickle(PATH, b"\x80\x02}" + text(b"data") + content + b"s.").keys() == {"data"}
    with pytest.raises(SpecError, match="other keys"):
        read_pickle(PATH, b"\x80\x02})" + b"\x85" * depth + b"Ns.")


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
