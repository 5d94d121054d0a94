"""The demo: the engine's main job on real data, by the same road a user takes."""

from bmm_engine.demo.runner import run

__all__ = ["run"]
