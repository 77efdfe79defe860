"""Data sets of the recipes: raw samples in memory, divided by seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edge_ll.errors import DataError
from edge_ll_export.data import cifar10, clinc150, digits, file, fsdd
from edge_ll_export.data.dataset import Dataset, InputSpec, Split, split_dataset

if TYPE_CHECKING:
    from edge_ll_export.recipe import DataFile, Recipe

__all__ = ["Dataset", "InputSpec", "Split", "input_spec", "load_dataset", "split_dataset"]

_SPECS = {
    "digits": digits.SPEC,
    "fsdd": fsdd.SPEC,
    "cifar10": cifar10.SPEC,
    "clinc150": clinc150.SPEC,
}
_LOADERS = {
    "digits": digits.load_digits,
    "fsdd": fsdd.load_fsdd,
    "cifar10": cifar10.load_cifar10,
    "clinc150": clinc150.load_clinc150,
}


def input_spec(recipe: Recipe) -> InputSpec:
    """What the recipe's backbone takes, known without loading the data."""
    if recipe.dataset == "file":
        return file.file_spec(_file(recipe))
    return _SPECS[recipe.dataset]


def load_dataset(recipe: Recipe) -> tuple[Dataset, Split]:
    """The recipe's data set and its division.

    Raises:
        DataError: The data is missing, damaged, or lacks a class or group of the recipe.
        MissingExtraError: The data set needs a package that is not installed.
    """
    if recipe.dataset == "file":
        dataset = file.load_file(_file(recipe))
    else:
        dataset = _LOADERS[recipe.dataset]()
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


def _file(recipe: Recipe) -> DataFile:
    if recipe.file is None:
        raise DataError('dataset "file" needs the table [file]')
    return recipe.file
