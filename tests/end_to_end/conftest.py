"""One live server with the demo model for the tests that only talk to it."""

from collections.abc import Iterator

import pytest

from tests.end_to_end.running import Server, serving


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    with serving() as s:
        yield s
