"""edge_ll: a continual learner for the edge, and the fleet around it."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("edge-ll")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0+source"
