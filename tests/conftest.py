import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Every test process counts as one of several ranks: threads that outnumber cores only make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Child processes import helpers and test modules by name.
here = str(Path(__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")]))
sys.path.insert(0, here)


@contextmanager
def same_environment():
    """Undo what a run left in the environment: LOCAL_RANK alone makes a later script wait for ranks nobody starts."""
    environment = dict(os.environ)
    yield
    for key in set(os.environ) - set(environment):
        del os.environ[key]
    os.environ.update(environment)


@pytest.fixture(autouse=True, scope="module")
def _no_leaks_from_shared_fixtures():
    with same_environment():
        yield


@pytest.fixture(autouse=True)
def _same_numbers_and_no_leaks():
    torch.manual_seed(0)
    with same_environment():
        yield
    assert torch.get_default_dtype() is torch.float32
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
