"""The package as a whole: its names, what importing it costs, which way its imports run, and the example."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from background import program
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.strategies import StrategyRegistry

import lightning_phantom
from lightning_phantom.cli import main

ROOT = Path(__file__).parent.parent
# Each module imports only from those before it.
ORDER = (
    "errors launch rng files config cost comm linears convert calibrate chain split fused layers "
    "parallel_linear elementwise tracing plan proof declared ffn swap mesh gradients prepare replicas "
    "checkpoint sharded saving running base strategy tensor_parallel conversion_report conversion "
    "energy_report energy_show energy_meter energy_fit energy __init__ terminal recipe calibration_run "
    "convert_command predict measure scale trial simulate plan_command compare_options compare_report "
    "compare_show compare cli __main__"
).split()


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
import sys, lightning, lightning.pytorch.cli, torch, torchmetrics
theirs = set(sys.modules)
import lightning_phantom
ours = {name.split(".")[0] for name in set(sys.modules) - theirs}
assert not ours & {"codecarbon", "matplotlib", "pynvml", "sklearn", "pandas", "rich"}, ours
assert "codecarbon" not in sys.modules
assert not torch.cuda.is_initialized()
import importlib; importlib.reload(lightning_phantom)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning_phantom"):
            module = node.module.removeprefix("lightning_phantom").lstrip(".")
            yield from [module] if module else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            for a in node.names:
                if a.name.startswith("lightning_phantom"):
                    yield a.name.removeprefix("lightning_phantom").lstrip(".") or "__init__"


def test_imports_run_one_way():
    modules = {path.stem: path for path in (ROOT / "lightning_phantom").glob("*.py")}
    assert set(modules) == set(ORDER)
    for name, path in modules.items():
        for other in imported(path):
            assert ORDER.index(other) < ORDER.index(name), f"{name} imports {other}"
    energy = {other for name in ORDER if name.startswith("energy") for other in imported(modules[name])}
    assert energy <= {"errors", "energy_report", "energy_show", "energy_meter", "energy_fit"}  # a side leaf
    for name in ORDER[: ORDER.index("energy_report")]:
        assert not any(other.startswith("energy") for other in imported(modules[name]))
    assert not {"torch", "lightning"} & {
        node.names[0].name.split(".")[0]
        for node in ast.walk(ast.parse(modules["cost"].read_text()))
        if isinstance(node, ast.Import)
    }


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


@pytest.mark.background.with_args(digits)
def test_the_digits_example_reaches_95_percent(outcome):
    assert "Phantom plan: 4 of 4 linears, num_blocks=2" in outcome
    lines = ([cell.strip() for cell in line.split("│")[1:]] for line in outcome.splitlines())
    rows = {cells[0]: cells[1] for cells in lines if len(cells) > 2}
    assert float(rows["validation accuracy"]) >= 0.95
    assert rows["weights per rank"] == "811,786"
    for label in ("validation loss", "bytes sent per rank and step", "collectives per step", "CPU energy"):
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
