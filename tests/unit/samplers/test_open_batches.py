"""Batches whose requests finish in any order."""

from __future__ import annotations

from ogls.samplers.open_batches import OpenBatches, Output


def output(number: int) -> Output:
    return ((number,), (0.0,))


def test_a_batch_is_complete_with_its_last_request_and_its_outputs_are_in_order() -> None:
    batches = OpenBatches([2, 1, 3])
    order = [5, 2, 1, 3, 0, 4]
    complete = [(number, batch) for number in order for batch in batches.add(number, output(number))]
    assert complete == [
        (2, (1, [output(2)])),
        (0, (0, [output(0), output(1)])),
        (4, (2, [output(3), output(4), output(5)])),
    ]
    assert batches.unfinished == []


def test_what_is_dropped_is_asked_for_again_but_not_complete_batches() -> None:
    batches = OpenBatches([2, 2])
    for number in (3, 1, 0):
        list(batches.add(number, output(number)))
    assert batches.unfinished == [2]
    batches.drop_outputs()
    assert batches.unfinished == [2, 3]
    assert list(batches.add(3, output(3))) == []
    assert list(batches.add(2, output(2))) == [(1, [output(2), output(3)])]
