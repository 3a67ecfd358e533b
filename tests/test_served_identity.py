"""served_identity.py: how far two lists are apart, by hand; on servers: test_openai_endpoint.py, test_servers.py."""

import math

import pytest

from served_identity import distance, probabilities, read_record, record_path


def test_probabilities_of_one_text_add():
    listed = ((" a", math.log(0.5)), ("b", math.log(0.2)), ("b", math.log(0.1)))
    assert probabilities(listed) == pytest.approx({" a": 0.5, "b": 0.3})


@pytest.mark.parametrize(
    ("now", "apart"),
    [
        ({"a": 0.6, "b": 0.3}, 0.0),
        ({"a": 0.55, "b": 0.37}, 0.07),
        ({"a": 0.6, "c": 0.25}, 0.15),  # b may have what is not listed, 0.15; c at most 0.1 before
        ({"a": 0.6, "c": 0.38}, 0.28),  # b has 0.02 at most, c had 0.1 at most
        ({}, 0.6),
    ],
)
def test_the_distance_is_what_a_probability_must_differ_at_least(now, apart):
    assert distance([{"x": 1.0}, {"a": 0.6, "b": 0.3}], [{"x": 1.0}, now]) == pytest.approx(apart)


def test_a_record_of_another_name_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("served_identity.cache_dir", lambda: tmp_path)
    path = record_path("one")
    assert path != record_path("two") and read_record(path, "one") == {"served_as": "one", "answers": {}}
    path.write_text('{"served_as": "two", "answers": {}}')
    with pytest.raises(ValueError, match="is not what it should be, the record of one; delete it"):
        read_record(path, "one")
