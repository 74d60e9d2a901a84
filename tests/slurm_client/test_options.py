"""Every form of sbatch's --time."""

from __future__ import annotations

import pytest

from cifar_hpc.errors import SpecError
from cifar_hpc.slurm.options import parse_time

DAY = 86400


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("30", 30 * 60),
        ("90", 90 * 60),
        ("0:30", 30),
        ("90:00", 90 * 60),
        ("5:07", 5 * 60 + 7),
        ("1:02:03", 3723),
        ("24:00:00", DAY),
        ("100:00:00", 100 * 3600),
        ("1-0", DAY),
        ("1-12", DAY + 12 * 3600),
        ("1-12:30", DAY + 12 * 3600 + 30 * 60),
        ("2-03:04:05", 2 * DAY + 3 * 3600 + 4 * 60 + 5),
        (" 10 ", 600),
    ],
)
def test_forms(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", "x", "-5", "1.5", "1:2:3:4", "1-", "-1:00", "1-2-3", "1-2:3:4:5", "1:", ":30", "1h", "4 hours", "1e3"],
)
def test_bad_forms_name_the_key_and_the_forms(text: str) -> None:
    with pytest.raises(SpecError, match=r"^resources\.time: .* D-HH:MM:SS") as caught:
        parse_time(text, "resources.time")
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", ["0", "00:00", "0-00:00:00"])
def test_parse_time_refuses_zero(text: str) -> None:
    with pytest.raises(SpecError, match="must be more than zero"):
        parse_time(text)
