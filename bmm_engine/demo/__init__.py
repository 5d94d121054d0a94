"""The demo: the engine's main job on real data, by the same road a user takes. It is told (`narrator`) before torch is imported."""
