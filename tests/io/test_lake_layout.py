import random

import pytest

from beam_pipelines.io.lake.layout import Range, open_files, open_name, published_name, to_read

DAY = 20_000  # 2024-10-04
A = Range("orders", 0, 0, 100_000)
B = Range("orders", 0, 100_000, 200_000)
C = Range("日本", 12, 1_000_000_000_000, 1_000_000_100_000)


def chosen(*names):
    """What is read, whatever order the names are listed in."""
    shuffled = list(names)
    results = set()
    for seed in range(10):
        random.Random(seed).shuffle(shuffled)
        results.add(tuple(to_read(shuffled)))
    (result,) = results
    return list(result)


@pytest.mark.parametrize("of", [A, B, C])
def test_a_published_file_goes_before_an_open_one_of_its_range_and_date(of):
    published = published_name(of, DAY)
    assert chosen(published, open_name(of, DAY, of.end - 1), open_name(of, DAY, of.end)) == [
        published
    ]


@pytest.mark.parametrize("of", [A, B, C])
def test_of_open_files_the_one_that_covers_most_is_read(of):
    names = [open_name(of, DAY, of.start + covered) for covered in (9, 10, 99)]
    assert chosen(*names) == names[2:]


def test_numbers_of_more_digits_are_larger():
    far = Range("t", 0, 999_999_900_000, 1_000_000_000_000)
    names = [open_name(far, DAY, 999_999_999_999), open_name(far, DAY, 1_000_000_000_000)]
    assert chosen(*names) == names[1:]


def test_dates_and_ranges_are_apart():
    names = [published_name(A, DAY), open_name(A, DAY + 1, 5), open_name(B, DAY, 100_005)]
    assert chosen(*names) == sorted(names)


def test_what_isnt_the_lakes_is_left_out():
    assert (
        chosen(
            "notes.parquet",
            "event_date=2024-10-04/notes.parquet",
            f"event_date=2024-10-04/{A.name}.parquet.crc",
            open_name(A, DAY, 5).removeprefix("_open/"),
            f"_open/{published_name(A, DAY)}",
        )
        == []
    )


def test_open_files_of_a_range_come_by_date_with_the_longest_first():
    names = [open_name(A, DAY, 5), open_name(A, DAY, 15), open_name(A, DAY + 1, 5)]
    others = [open_name(B, DAY, 100_005), published_name(A, DAY)]
    assert open_files([*names, *others], A) == {
        "event_date=2024-10-04": [names[1], names[0]],
        "event_date=2024-10-05": [names[2]],
    }
