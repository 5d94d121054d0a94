"""SVC against FusionBench's own code, where that is installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from bmm_engine.anchors import get_anchor
from bmm_engine.anchors.calibration.svc import svc
from tests.parity.test_parity import TOLERANCE


@pytest.mark.peers
@pytest.mark.parametrize("floor", [0.1, 1.0])
@pytest.mark.parametrize("rule", ["average", "task_arithmetic", "iso_c", "tsv_m"])
def test_svc_is_the_packages(rule, floor):
    package = importlib.util.find_spec("fusion_bench")
    if package is None:
        pytest.skip("fusion_bench is not installed")
    (folder,) = package.submodule_search_locations
    file = (
        Path(folder) / "method/singular_value_calibration/utils.py"
    )  # alone: the packages above it need vision libraries
    spec = importlib.util.spec_from_file_location("fusion_bench_svc", file)
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    for shape in ((12, 20), (20, 12), (16, 16)):
        generator = torch.Generator().manual_seed(4)
        base, *experts = (torch.randn(shape, generator=generator) for _ in range(4))
        experts = [base + 0.1 * own for own in experts]
        merged = get_anchor(rule)(base, experts)
        start = base.double()
        found = svc(merged.double() - start, [e.double() - start for e in experts], floor=floor)
        for calibrate in (
            theirs.subspace_consistency_spectral_calibration,
            theirs.subspace_consistency_spectral_calibration_accelerated,
        ):
            wanted = calibrate(start, [e.double() for e in experts], merged.double(), floor) - start
            torch.testing.assert_close(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()))
