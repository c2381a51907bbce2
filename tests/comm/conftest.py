from collections.abc import Iterator

import pytest

from tests.comm.pool import Pool


@pytest.fixture(scope="session")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    made = Pool(tmp_path_factory.mktemp("ranks"))
    yield made
    made.close()
