"""`m4ov run hybrid-rl`: reinforcement learning of several objectives from a supervised start, arm against arm."""

from m4ov.hybrid.flow import run

__all__ = ["run"]
