"""Trials in the mode sequential: the network is walked again for each candidate; only what the experts read is known after the first walk."""

from __future__ import annotations

import math
import shutil
import tempfile
import weakref
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from bmm_engine.checkpoint import StateDictSource
from bmm_engine.merging.factors import Factors
from bmm_engine.pipeline.live import LiveModels
from bmm_engine.searching.problem import Problem
from bmm_engine.searching.space import Candidate
from bmm_engine.sequential.reads import ExpertReads
from bmm_engine.sequential.run import walk_all
from bmm_engine.sequential.skeleton import Skeleton
from bmm_engine.sequential.state import Sweep
from bmm_engine.sequential.walk import SequentialWalk


class SequentialWriter:
    """Writes candidates into live tensors, each by a walk of its own. What the experts read is kept in a folder for temporary files."""

    def __init__(self, problem: Problem, live: LiveModels, factors: Factors, device: str):
        assert problem.walk is not None
        self.problem, self.live, self.factors, self.device = problem, live, factors, device
        self.statistics = problem.walk()
        self.skeleton = Skeleton.of(problem.models, problem.plan, device)
        folder = tempfile.mkdtemp(prefix="bmm-expert-reads-")
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self.reads = ExpertReads(Path(folder))

    @torch.no_grad()
    def write(self, candidate: Candidate) -> None:
        """Every tensor of the merge that the candidate stands for; where all ridges are infinite, the anchor's, without a walk."""
        tensors = self.factors.anchor(candidate.anchor)
        anchor = StateDictSource(tensors, f"anchor {candidate.anchor!r}")
        self.live.load(tensors)
        if all(alpha == math.inf for alpha in candidate.alpha.values()):
            return
        chosen = {
            k: v for k, v in self.problem.settings_of(candidate).items() if k in ("alpha", "scale", "task_weights")
        }
        settings = self.problem.plan.settings.but(**chosen, device=self.device)
        plan = replace(self.problem.plan, settings=settings, statistics=self.statistics)
        with ExitStack() as stack:
            walks = [
                SequentialWalk(plan, self.skeleton, self.statistics.batches, Sweep(None), reads=self.reads)
                for _ in range(settings.sequential.sweeps)
            ]
            source = walk_all(walks, anchor, stack, False)
            self.live.load({name: source.load(name) for name in tensors if name in source.solved})
