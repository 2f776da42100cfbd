"""A training run from configuration to results, on this process's share of the work."""

from sr_dist.train.loop import Result, run

__all__ = ["Result", "run"]
