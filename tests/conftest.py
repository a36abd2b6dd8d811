import gc
import os
import runpy
import signal
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

# Every test process counts as one of several ranks: threads that outnumber cores only make them wait.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)

# Child processes import test modules, examples and benchmarks by name; for the first folder see its sitecustomize.py.
here = Path(__file__).parent
folders = [f"{here}/helpers/lean", f"{here}/helpers", f"{here.parent}", os.environ.get("PYTHONPATH")]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
runpy.run_path(f"{folders[0]}/sitecustomize.py")  # here, too
# Tests share helpers, and some share what stands in another test.
sys.path[:0] = [str(folder) for folder in (here / "helpers", *here.iterdir()) if folder.is_dir()]


def pytest_collection_modifyitems(items):
    """Files with tests that wait for programs come first: processes that share the work take files, long ones soon."""
    items.sort(key=lambda item: item.get_closest_marker("program") is None)


def pytest_collection_finish():
    """All that was imported stays: no garbage collector need look through it again."""
    gc.freeze()


@pytest.fixture(scope="session")
def _outcomes():
    return {}


@pytest.fixture
def outcome(request, _outcomes, tmp_path_factory):
    """What the function of a test's `program` mark has returned, called once with a folder and the mark's arguments."""
    function, *args = key = request.node.get_closest_marker("program").args
    if key not in _outcomes:
        _outcomes[key] = function(tmp_path_factory.mktemp(function.__name__), *args)
    return _outcomes[key]


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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with same_environment():
        yield
    for number, handler in handlers.items():
        signal.signal(number, handler)  # an interrupted Trainer ignores them
    assert torch.get_default_dtype() is torch.float32
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
