"""The package as a whole: its names, what importing it costs, which way its imports run, and the example."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry
from programs import program

import lightning_phantom
from lightning_phantom.commands.cli import main

ROOT = Path(__file__).parent.parent
# The wings, floor by floor: a module imports from its own wing and from floors below its own.
FLOORS = (
    ("errors",),
    ("framework",),
    ("config",),
    ("distributed", "cost"),
    ("layers",),
    ("plan", "checkpoints", "measure"),
    ("swap", "conversion"),
    ("strategies",),
    ("__init__",),
    ("commands",),
    ("__main__",),
)
FLOOR = {wing: n for n, wings in enumerate(FLOORS) for wing in wings}
WITHOUT_LIGHTNING = ("distributed", "layers", "plan", "cost")


def test_public_names():
    assert set(lightning_phantom.__all__) == {
        *("EnergyMonitor", "PhantomConfig", "PhantomLinear", "PhantomStrategy"),
        "TensorParallelStrategy",
        *("densify", "estimate_cost", "phantomize_", "plan_phantom"),
    }
    for name in lightning_phantom.__all__:
        assert getattr(lightning_phantom, name).__doc__
    assert {"phantom", "tensor_parallel"} <= set(StrategyRegistry)


def test_importing_is_pure():
    code = """
import sys
import lightning_phantom
assert not {"torch", "lightning", "pytorch_lightning", "codecarbon"} & set(sys.modules)
import lightning, lightning.pytorch.cli, torch, torchmetrics
theirs = set(sys.modules)
from lightning_phantom import *
assert lightning.pytorch.strategies.StrategyRegistry["phantom"] and PhantomStrategy
ours = {name.split(".")[0] for name in set(sys.modules) - theirs}
assert not ours & {
    "codecarbon", "matplotlib", "pynvml", "amdsmi", "sklearn", "pandas", "rich", "pytorch_lightning"
}, ours
assert "codecarbon" not in sys.modules
assert not torch.cuda.is_initialized()
import importlib; importlib.reload(lightning_phantom)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr


def imported(path):
    """What a file imports, in full: `from a import b` may be the module a.b as well as a name in a."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


PACKAGE = ROOT / "lightning_phantom"
MODULES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}


def own_imports(name):
    """The modules of the package that a module imports, without the name that it takes from them."""
    for full in imported(MODULES[name]):
        first, _, rest = full.partition(".")
        if first == "lightning_phantom":
            candidates = (rest, rest.rpartition(".")[0], f"{rest}.__init__", f"{rest.rpartition('.')[0]}.__init__")
            yield next((c for c in candidates if c in MODULES), "__init__")


def wing(name):
    return name.partition(".")[0]


def test_imports_run_one_way():
    assert {wing(name) for name in MODULES} == {*FLOOR, "energy"}
    for name in MODULES:
        for other in own_imports(name):
            if wing(name) == wing(other):
                continue
            if wing(name) == "energy":  # a side leaf
                assert other in ("errors", "framework"), f"{name} imports {other}"
            elif wing(other) == "energy":
                assert FLOOR[wing(name)] >= FLOOR["__init__"], f"{name} imports {other}"
            else:
                assert FLOOR[wing(other)] < FLOOR[wing(name)], f"{name} imports {other}"


def test_no_imports_in_a_circle():
    graph = {name: set(own_imports(name)) - {name} for name in MODULES}
    while graph:
        leaves = {name for name, others in graph.items() if not others & graph.keys()}
        assert leaves, f"imports in a circle among {sorted(graph)}"
        graph = {name: others for name, others in graph.items() if name not in leaves}


def test_wings_do_without_what_they_do_not_need():
    for name, path in MODULES.items():
        outside = {full.partition(".")[0] for full in imported(path)}
        if name != "framework":  # which knows by what name
            assert not outside & {"lightning", "lightning_fabric", "pytorch_lightning"}, name
        if wing(name) in WITHOUT_LIGHTNING:
            assert "framework" not in own_imports(name), name
        if wing(name) == "cost":
            assert not outside & {"torch", "numpy"}, name


def test_cli_help_and_version(capsys):
    for arguments, expected in (
        (["--help"], "{fit,validate,test,predict}"),
        (["--version"], lightning_phantom.__version__),
    ):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        assert expected in capsys.readouterr().out


def digits(folder):
    command = ("-m", "lightning_phantom", "fit", "--config", "examples/digits.yaml")
    return program(*command, f"--trainer.logger.init_args.save_dir={folder}")


@pytest.mark.program.with_args(digits)
def test_the_digits_example_reaches_95_percent(outcome):
    assert "Phantom plan: 4 of 4 linears, num_blocks=2" in outcome
    lines = ([cell.strip() for cell in line.split("│")[1:]] for line in outcome.splitlines())
    rows = {cells[0]: cells[1] for cells in lines if len(cells) > 2}
    assert float(rows["validation accuracy"]) >= 0.95
    assert rows["weights per rank"] == "811,786"
    for label in ("validation loss", "ms per step", "bytes sent per rank and step", "energy, CPU"):
        assert label in rows, outcome


def test_yaml_and_command_line_reach_the_strategy(tmp_path):
    text = """
    trainer:
      accelerator: cpu
      devices: 1
      logger: false
      strategy:
        class_path: lightning_phantom.PhantomStrategy
        init_args:
          num_blocks: 8
          phantom_width: 2
          plan: {"layer": phantom}
          timeout: "0:02:00"
    """
    (tmp_path / "run.yaml").write_text(text)

    def strategy(*arguments):
        cli = LightningCLI(
            BoringModel,
            run=False,
            save_config_callback=None,
            args=["--config", str(tmp_path / "run.yaml"), *arguments],
        )
        return cli.trainer.strategy

    made = strategy()
    assert (made._request.num_blocks, made._request.phantom_width, made._request.plan) == (8, 2, {"layer": "phantom"})
    assert made._timeout.total_seconds() == 120
    assert strategy("--trainer.strategy.phantom_width=0.5")._request.phantom_width == 0.5
    assert type(strategy("--trainer.strategy.phantom_width=1")._request.phantom_width) is int
    assert type(strategy("--trainer.strategy.phantom_width=1.0")._request.phantom_width) is float
    named = strategy("--trainer.strategy=PhantomStrategy", "--trainer.strategy.num_blocks=4")
    assert named._request.num_blocks == 4
