"""docs/models.md says what the tests found."""

from __future__ import annotations

from tests.pipeline.family_table import NOT_SERVED, NOT_WRITING
from tests.pipeline.models_page import PAGE, page
from tests.pipeline.tiny_families import families


def test_the_page_of_models_is_up_to_date():
    assert PAGE.read_text() == page(), "write it anew: python -m tests.pipeline.models_page"


def test_it_lists_no_family_that_is_not_there():
    assert set(NOT_SERVED) | set(NOT_WRITING) <= set(families())


def test_most_families_are_served():
    assert len(families()) - len(NOT_SERVED) >= 55
