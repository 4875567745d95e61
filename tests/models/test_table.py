"""The table of families in the README says what is so."""

import pytest

from tests.models import table

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared():
    with table.prepared() as found:
        yield found


@pytest.mark.parametrize("name", table.FAMILIES)
def test_the_table_of_families_is_so(name, prepared):
    folder, sharded = prepared
    assert (
        table.line(f"`{name}`", *table.row(name, sharded[name], folder)) in table.README.read_text()
    )
