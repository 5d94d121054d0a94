"""The demo: the engine's main job on real data, by the same road a user takes."""

from bmm_engine.demo.run import run

__all__ = ["run"]
