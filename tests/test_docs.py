"""Every code block, YAML and link of README and docs holds."""

import json
import re
import shlex
import sys
from pathlib import Path

import lightning as L
import pytest
import yaml
from lightning.pytorch.cli import LightningCLI
from programs import program
from torch.distributed.run import get_args_parser

import lightning_phantom
from lightning_phantom.commands import plan as plan_command
from lightning_phantom.commands.cli import main
from lightning_phantom.commands.compare import options as compare_options
from lightning_phantom.cost.predict import Machine

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
# What a page calls the reader's own: a module with a chain, and data for it.
PROJECT = """
import lightning as L, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

class MyModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    def training_step(self, batch, batch_idx):
        return self.net(batch[0]).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)
    def on_train_epoch_end(self):
        self.trainer.should_stop = True

class MyData(L.LightningDataModule):
    def train_dataloader(self):
        return DataLoader(TensorDataset(torch.randn(16, 32)), batch_size=4)
"""


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def with_blocks(language):
    return [pytest.param(page, id=page.name) for page in PAGES if blocks(page, language)]


ALL = """
import json, runpy, sys, traceback
failed = {}
for script in sys.argv[1:]:
    try:
        runpy.run_path(script)
    except BaseException:
        failed[script] = traceback.format_exc()
json.dump(failed, open("failed.json", "w"))
"""


def run_blocks(folder):
    """Run the Python blocks beside the reader's own project: one process for all that need no second rank."""
    (folder / "my_project.py").write_text(PROJECT)
    scripts = {}
    for page in PAGES:
        for number, block in enumerate(blocks(page, "python")):
            script = folder / f"{page.stem}_{number}.py"
            script.write_text("from my_project import MyData, MyModule\n" + block.replace("devices=4", "devices=2"))
            scripts[script] = page
    several = [script for script in scripts if "devices=2" in script.read_text()]
    (folder / "all.py").write_text(ALL)
    program("all.py", *(script for script in scripts if script not in several), cwd=folder)
    failed = {Path(script): text for script, text in json.loads((folder / "failed.json").read_text()).items()}
    for script in several:
        try:
            program(script, cwd=folder)
        except AssertionError as error:
            failed[script] = str(error)
    return {page: [text for script, text in failed.items() if scripts[script] == page] for page in PAGES}


@pytest.mark.program.with_args(run_blocks)
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run(page, outcome):
    assert not outcome[page], "\n".join(outcome[page])


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_yaml_blocks_are_accepted(page, tmp_path, monkeypatch):
    (tmp_path / "my_project.py").write_text(PROJECT)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_project", raising=False)
    for block in blocks(page, "yaml"):
        (tmp_path / "run.yaml").write_text(re.sub("devices: [0-9]+", "devices: 1", block))
        cli = LightningCLI(
            run=False,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=None,
            args=["--config", str(tmp_path / "run.yaml")],
        )
        assert isinstance(cli.trainer.strategy, lightning_phantom.PhantomStrategy)
        assert isinstance(cli.model, L.LightningModule)


def commands(page):
    """The commands of a page's shell blocks, as words."""
    lines = (line for block in blocks(page, "bash") for line in block.replace("\\\n", " ").splitlines())
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.mark.parametrize("page", with_blocks("bash"))
def test_commands_are_accepted(page, tmp_path, monkeypatch, capsys):
    """Plans are made. What trains is parsed: the demo and pretrained.md's commands run in tests of their own."""
    monkeypatch.syspath_prepend(ROOT)
    monkeypatch.setattr(plan_command, "measure_here", lambda ranks, dtype: Machine(4e10, 1e10, 1e-5, 1e9, 1e-4))
    config = (ROOT / "benchmarks" / "ffn.yaml").read_text().replace("phantom_width: 64", "phantom_width: 0.25")
    config = config.replace("width: 4096", "width: 2048")
    for name in ("run", "small", "merged"):
        (tmp_path / f"{name}.yaml").write_text(config)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    for words in commands(page):
        if words[0] == "torchrun":
            arguments = get_args_parser().parse_args(words[1:])
            assert arguments.module
            words = [arguments.training_script.replace("_", "-"), *arguments.training_script_args]
        match words:
            case ["lightning-phantom", "plan", *_]:
                main(words[1:])
                assert "It stops paying" in capsys.readouterr().out
            case ["lightning-phantom", "compare", *rest]:
                request = compare_options.parse(rest)
                assert all(request.recipe(method).config.model for method in request.methods)
            case ["lightning-phantom", "fit" | "validate", *_]:
                with pytest.raises(SystemExit) as stop:
                    main([*words[1:], "--print_config"])
                assert stop.value.code == 0
            case ["lightning-phantom", "convert", *_]:
                assert page.name == "pretrained.md"
            case ["make", target]:
                assert f"\n{target}:" in (ROOT / "Makefile").read_text()
            case _:
                assert words in (
                    ["git", "clone", "<your", "fork>", "&&", "cd", "lightning_phantom"],
                    ["pip", "install", "."],
                    [".venv/bin/pre-commit", "install"],
                ), words


def test_every_file_that_is_named_exists():
    """Benchmarks, examples and tests, as paths or as modules."""
    for page in PAGES:
        for name in re.findall(r"\b(?:benchmarks|examples|tests)[./]\w[\w./]*", page.read_text()):
            path = ROOT / (name.rstrip("./") if "/" in name else "/".join(name.split(".")[:2]))
            assert path.exists() or list(path.parent.glob(f"{path.name}.*")), f"{page.name}: {name}"


def test_every_yaml_is_valid():
    for path in [*ROOT.glob("*.y*ml"), *ROOT.glob("examples/**/*.y*ml"), *ROOT.glob("docs/**/*.y*ml")]:
        assert yaml.safe_load(path.read_text()), path


def test_every_link_leads_somewhere():
    def anchors(page):
        heads = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}

    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`]*`", "", page.read_text())):
            if target.startswith(("http://", "https://")):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(path), f"{page.name}: {target}"


def test_every_page_is_in_the_menu():
    menu = (ROOT / "mkdocs.yml").read_text()
    assert all(f": {page.name}" in menu for page in (ROOT / "docs").glob("*.md"))


def test_every_public_name_is_documented():
    api = (ROOT / "docs/api.md").read_text()
    for name in lightning_phantom.__all__:
        assert f"::: lightning_phantom.{name}\n" in api, name
        text = getattr(lightning_phantom, name).__doc__
        assert text and "Args:" in text and "Raises:" in text and "Example" in text, name
