from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bench import gram, scaling

SIZES = [64 << i for i in range(10)]


@pytest.mark.parametrize("exponent", [1.0, 2.0, 1.5])
def test_the_slope_of_a_power_law_is_its_exponent(exponent):
    found = scaling.fit(SIZES, [1e-6 * size**exponent for size in SIZES])
    assert found.slope == pytest.approx(exponent)
    assert found.at(1000) == pytest.approx(1e-6 * 1000**exponent)


@pytest.mark.parametrize("exponent", [1.0, 2.0])
def test_a_launch_overhead_does_not_bend_the_slope(exponent):
    """A constant 20 us beside 2 us of work at the smallest size, and noise."""
    noise = [1.03, 0.97] * 5
    times = [(0.02 + 0.002 * (size / 64) ** exponent) * factor for size, factor in zip(SIZES, noise)]
    found = scaling.fit(SIZES, times)
    assert found.first > 1
    assert found.past_overhead
    assert found.slope == pytest.approx(exponent, rel=0.1)


def test_an_axis_that_never_leaves_the_launch_overhead_is_told():
    found = scaling.fit(SIZES, [0.02 + 1e-5 * size / 64 for size in SIZES])
    assert not found.past_overhead
    assert found.first == len(SIZES) - 3


def test_at_least_three_points_count():
    assert scaling.fit([1, 2, 3, 4], [1.0, 1.0, 1.0, 1.1]).first == 1
    with pytest.raises(ValueError, match="at least 3 sizes"):
        scaling.fit([1, 2], [1.0, 2.0])


@pytest.mark.usefixtures("quick")
def test_a_curve_is_measured_judged_and_drawn(tmp_path, monkeypatch):
    axis = scaling.Axis(
        "gram",
        "rows",
        1,
        [16, 32, 64],
        lambda shape, size: gram.case(torch.device("cpu"), shape, size, 24, torch.float32),
        "width 24",
    )
    curve = scaling.measure_axis(axis, rounds=2)
    assert [row.shape for row in curve.rows] == [f"scaling, rows {size} (width 24)" for size in axis.sizes]
    within = replace(curve, fit=scaling.Fit(1.09, 0.0, 0)).verdict()
    assert "slope 1.09 from 16 to 64, ideal 1: within 10% (+9%)" in within
    beyond = replace(curve, fit=scaling.Fit(0.88, 0.0, 0, past_overhead=False)).verdict()
    assert "NOT within 10% (-12%), and too small to be past the launch overhead" in beyond

    pytest.importorskip("matplotlib")
    scaling.plot([curve, curve], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_axes_cover_gram_residual_and_assemble():
    for device in (torch.device("cpu"), torch.device("cuda")):
        names = {axis.name: axis.ideal for axis in scaling.axes(device)}
        assert names == {
            **{"gram rows": 1, "gram width": 2, "residual rows": 1, "residual width": 2, "residual T": 1},
            **{"assemble width": 2, "assemble T": 1},
        }
