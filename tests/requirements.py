"""What pip installs for a requirement, by the packages that are installed here."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def with_their_requirements(names: Iterable[str]) -> set[str]:
    """The distributions of requirements and of what these require; some may not be installed here."""
    found, todo = set(), [Requirement(name) for name in names]
    while todo:
        requirement = todo.pop()
        key = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if key in found:
            continue
        found.add(key)
        with suppress(PackageNotFoundError):
            needs = map(Requirement, requires(requirement.name) or ())
            extras = requirement.extras or {""}
            todo += [n for n in needs if not n.marker or any(n.marker.evaluate({"extra": e}) for e in extras)]
    return {name for name, _ in found}
