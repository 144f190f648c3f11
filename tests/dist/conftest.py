"""For tests on several ranks."""

from collections.abc import Iterator

import pytest

from tests.helpers.dist import end_pools


@pytest.fixture(autouse=True, scope="module")
def no_ranks_left() -> Iterator[None]:
    """Ranks that stay from call to call end with their file: their groups' threads would slow down all that follows."""
    yield
    end_pools()
