"""The data dictionary is generated from the schemas, and every column has a description."""

from __future__ import annotations

from conftest import REPO

from ogls.analysis.dictionary import data_dictionary
from ogls.records import ALL_TABLES


def test_the_data_dictionary_is_generated_from_the_records() -> None:
    assert (REPO / "data" / "README.md").read_text() == data_dictionary(), "run `make docs`"


def test_every_column_has_a_description() -> None:
    for table in ALL_TABLES:
        for column in table.schema:
            assert column.metadata[b"about"].decode().strip().endswith((".", "?")), f"{table.name}.{column.name}"
