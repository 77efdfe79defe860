"""edge_ll: a continual learner for the edge, and the fleet around it."""

__version__ = "0.1.0"
