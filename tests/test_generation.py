"""The versions of transformers that the package runs with."""

import pytest

from qbl_trl.generation import before_5


@pytest.mark.parametrize(
    ("version", "before"), [("4.57.1", True), ("5.14.0", False), ("5.23.0.dev0", False), ("6.0", False)]
)
def test_generations_are_told_by_their_version(version, before):
    assert before_5(version) is before


@pytest.mark.parametrize("version", ["4.56.2", "5.0.0", "5.13.1"])
def test_versions_whose_loading_code_is_another_are_refused_with_those_that_work(version):
    with pytest.raises(ImportError, match=rf"4\.57, and with 5 from 5\.14 on; {version} is installed"):
        before_5(version)
