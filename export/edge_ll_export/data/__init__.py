"""Data sets of the recipes: raw samples in memory, divided by seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_ll_export.data import digits, fsdd
from edge_ll_export.data.dataset import Dataset, InputSpec, Split, split_dataset

if TYPE_CHECKING:
    from edge_ll_export.recipe import Recipe

__all__ = ["Dataset", "InputSpec", "Split", "input_spec", "load_dataset", "split_dataset"]


def input_spec(recipe: Recipe) -> InputSpec:
    """What the recipe's backbone takes, known without loading the data."""
    return {"digits": digits.SPEC, "fsdd": fsdd.SPEC}[recipe.dataset]


def load_dataset(recipe: Recipe) -> tuple[Dataset, Split]:
    """The recipe's data set and its division.

    Raises:
        DataError: The data is missing, damaged, or lacks a class or group of the recipe.
        MissingExtraError: The data set needs a package that is not installed.
    """
    dataset = {"digits": digits.load_digits, "fsdd": fsdd.load_fsdd}[recipe.dataset]()
    shares = recipe.split
    split = split_dataset(
        dataset,
        base=recipe.classes.base,
        new=recipe.classes.new,
        shares={
            "test": shares.test,
            "anchors": shares.anchors,
            "holdout": shares.holdout,
            "traffic": shares.traffic,
        },
        held_groups=shares.held_groups,
        seed=recipe.seed,
    )
    return dataset, split
