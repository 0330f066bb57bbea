import pytest

from onlooker.node.options import StreamOptions


@pytest.mark.parametrize("field", ["stride", "memory_bytes", "ring_frames", "ring_bytes", "min_pixels", "max_pixels"])
def test_a_limit_below_one_is_refused_by_name(field):
    with pytest.raises(ValueError, match=f"{field} must be at least 1, got 0"):
        StreamOptions(**{"name": "front", field: 0})


@pytest.mark.parametrize(("field", "value"), [("gate", -1.0), ("gate", 256.0), ("drop", -0.1), ("drop", 1.1)])
def test_a_threshold_beyond_its_scale_is_refused_by_name(field: str, value: float):
    with pytest.raises(ValueError, match=f"{field} must be within"):
        StreamOptions(**{"name": "front", field: value})


def test_a_ring_has_a_bound_in_bytes_unless_told_otherwise():
    assert StreamOptions("front").ring_bytes == 256 << 20
