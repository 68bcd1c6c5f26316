"""Batches whose requests are sampled together and finish in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

Output = tuple[tuple[int, ...], tuple[float, ...]]  # token ids and log-probs of a completion


class OpenBatches:
    """Collects the outputs of requests, which are numbered through all batches, until a batch is complete."""

    def __init__(self, sizes: Sequence[int]):
        self._batch_of = [batch for batch, size in enumerate(sizes) for _ in range(size)]
        self._first = [sum(sizes[:batch]) for batch in range(len(sizes))]
        self._sizes, self._missing = sizes, list(sizes)
        self._outputs: dict[int, Output] = {}  # of requests of incomplete batches
        self._unfinished = dict.fromkeys(range(sum(sizes)))

    @property
    def unfinished(self) -> list[int]:
        """The numbers of the requests without an output, in order."""
        return list(self._unfinished)

    def add(self, number: int, output: Output) -> Iterator[tuple[int, list[Output]]]:
        """Add the output of a request. Yields its batch and all its outputs, in order, if that is the last one."""
        batch = self._batch_of[number]
        del self._unfinished[number]
        self._outputs[number] = output
        self._missing[batch] -= 1
        if not self._missing[batch]:
            first = self._first[batch]
            yield batch, [self._outputs.pop(n) for n in range(first, first + self._sizes[batch])]

    def drop_outputs(self) -> None:
        """Forget the outputs of incomplete batches, whose requests are then sampled together again."""
        for number in self._outputs:
            self._missing[self._batch_of[number]] += 1
        self._unfinished = dict.fromkeys(sorted([*self._unfinished, *self._outputs]))
        self._outputs.clear()
