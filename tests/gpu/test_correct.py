"""The correctness checks of `bench cuda` as tests on a GPU: `pytest -m gpu`."""

import os

import pytest
import torch

from nanosd3.measure.cuda import correct
from nanosd3.measure.cuda.result import Setting, Unavailable

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("check", correct.CORRECTNESS, ids=lambda check: check.name)
def test_check(check, tmp_path):
    os.environ.update(check.environment)
    try:
        rows = list(check.rows(Setting(torch.device("cuda"), tmp_path)))
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert rows
    assert [row for row in rows if not row.met] == []
