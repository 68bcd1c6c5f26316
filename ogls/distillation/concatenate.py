"""Concatenation of dataclasses with fields that are arrays or tensors over tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    T = TypeVar("T", bound=DataclassInstance)


def concatenate(parts: Sequence[T]) -> T:
    """Concatenate dataclasses of one type field by field, along the first axis (tokens).

    Every field is a numpy array or a tensor. `parts` must not be empty.
    """
    names = [f.name for f in fields(parts[0])]
    return type(parts[0])(**{name: _concatenate([getattr(p, name) for p in parts]) for name in names})


def _concatenate(values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    import torch

    return torch.cat(values)
