import pytest

from onlooker.tools.quantity import bytes_text, ms_text, num_bytes_of, reasons_text, seconds_text, time_text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (999_600, "1 MB"),
        (1_843_200_000, "1.84 GB"),
        (5 * 10**12, "5 TB"),
    ],
)
def test_bytes_read_in_powers_of_1000(num_bytes: int, text: str) -> None:
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(
    ("text", "num"), [("1000", 1000), ("2GiB", 2 << 30), ("1.5GB", 1_500_000_000), ("64 MiB", 64 << 20), ("1k", 1000)]
)
def test_bytes_are_read_as_they_are_written(text: str, num: int) -> None:
    assert num_bytes_of(text) == num


@pytest.mark.parametrize("text", ["", "-1", "1 XB", "much", "1MiBB"])
def test_what_is_no_number_of_bytes_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="512MiB"):
        num_bytes_of(text)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.5, "0.5 s"), (12.54, "12.5 s"), (200, "3 min 20 s"), (7500, "2 h 05 min")]
)
def test_seconds_grow_into_minutes_and_hours(seconds: float, text: str) -> None:
    assert seconds_text(seconds) == text


@pytest.mark.parametrize(("ms", "text"), [(0.421, "0.421 ms"), (62.04, "62 ms"), (1300, "1.3 s")])
def test_milliseconds_grow_into_seconds(ms: float, text: str) -> None:
    assert ms_text(ms) == text


def test_a_time_of_a_file_is_not_shown_as_a_date() -> None:
    assert time_text(12_500_000_000, "media") == "12.50 s of the file"
    assert time_text(0, "capture") == "1970-01-01 00:00:00.000 UTC"


def test_reasons_come_by_frequency_and_without_zeros() -> None:
    assert reasons_text({"stale": 1, "queue_full": 3, "gap": 0, "a": 1}) == "queue_full 3, a 1, stale 1"
