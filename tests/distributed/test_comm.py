"""Every collective of the package is issued in `distributed/comm.py`."""

import ast
import re
from pathlib import Path

import pytest
import torch.distributed as dist

import lightning_phantom

PACKAGE = Path(lightning_phantom.__file__).parent
# The meter imports none of the package but its errors, and gathers its records over the world by itself.
EXEMPT = ("distributed/comm.py", "energy/fit.py")
COLLECTIVE = re.compile(
    r"(^|_)(all_gather|all_reduce|all_to_all|reduce|broadcast|gather|scatter|send|recv|barrier)(_|$)"
)
OF_A_GROUP = {"allgather", "allreduce", "alltoall", "alltoall_base", "_allgather_base", "_reduce_scatter_base"}


def collectives(source):
    """The functions of torch.distributed that exchange something, and likewise methods of groups, that a file names."""
    tree = ast.parse(source)
    known = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(node, ast.ImportFrom):
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            else:
                name = alias.name if alias.asname else alias.name.partition(".")[0]
                known[alias.asname or name] = name

    def full(node):
        if isinstance(node, ast.Attribute):
            return f"{full(node.value)}.{node.attr}"
        return known.get(node.id, "") if isinstance(node, ast.Name) else ""

    for node in ast.walk(tree):
        owner, _, name = full(node).rpartition(".")
        ours = owner.startswith("torch.distributed") and COLLECTIVE.search(name)
        if ours or (isinstance(node, ast.Attribute) and node.attr in OF_A_GROUP):
            yield name or node.attr


def test_no_other_file_issues_one():
    assert {"all_gather_object", "all_to_all_single", "barrier", "broadcast", "gather"} <= {
        name for name in dir(dist) if COLLECTIVE.search(name)
    }
    named = {str(path.relative_to(PACKAGE)): set(collectives(path.read_text())) for path in PACKAGE.rglob("*.py")}
    assert all(named.pop(file) for file in EXEMPT)
    assert not {file: names for file, names in named.items() if names}


@pytest.mark.parametrize(
    "source",
    [
        "import torch.distributed as dist\ndist.all_reduce(x)",
        "import torch\ntorch.distributed.barrier()",
        "from torch import distributed\nfor collective in (distributed.broadcast,): collective(x, 0)",
        "from torch.distributed import reduce_scatter_tensor as add\nadd(x, y)",
        "import torch.distributed._functional_collectives as funcol\nfuncol.all_gather_tensor(x, 0, group)",
        "self.group.allreduce(x)",
    ],
)
def test_one_would_be_found(source):
    assert set(collectives(source))
