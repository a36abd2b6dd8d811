import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
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
# Tests share helpers, and some share what stands in another test.
sys.path[:0] = [str(folder) for folder in (here / "helpers", *here.iterdir()) if folder.is_dir()]


def pytest_collection_modifyitems(items):
    """Tests that wait for work in the background come last; it starts in their order."""
    items.sort(key=lambda item: item.get_closest_marker("background") is not None)


@pytest.fixture(scope="session", autouse=True)
def _background(request, tmp_path_factory):
    """Start what tests marked `background(function, *args)` wait for, two at a time, while other tests run."""
    wanted = [mark.args for item in request.session.items for mark in item.iter_markers("background")]
    with ThreadPoolExecutor(2) as pool:
        yield {
            (function, *args): pool.submit(function, tmp_path_factory.mktemp(function.__name__), *args)
            for function, *args in dict.fromkeys(wanted)
        }
        pool.shutdown(cancel_futures=True)


@pytest.fixture
def outcome(request, _background):
    """What the function of a test's `background` mark, called with a folder and the mark's arguments, has returned."""
    return _background[request.node.get_closest_marker("background").args].result()


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
