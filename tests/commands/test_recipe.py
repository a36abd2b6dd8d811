"""What a command takes from a config."""

import pytest

from lightning_phantom.commands.recipe import Recipe


@pytest.mark.parametrize(
    ("strategy", "environment", "chosen", "blocks"),
    [
        ("phantom", None, None, None),
        ("phantom", "8", None, 8),
        ("phantom_4", "8", None, 4),
        ("phantom_4", None, 16, 16),
        ("lightning_phantom.PhantomStrategy", "8", None, 8),
        ("tensor_parallel", "nonsense", 2, 2),
    ],
)
def test_num_blocks_come_from_the_command_line_the_strategy_or_the_environment(
    monkeypatch, strategy, environment, chosen, blocks
):
    if environment is not None:
        monkeypatch.setenv("PHANTOM_NUM_BLOCKS", environment)
    recipe = Recipe((), ["--model=lightning.pytorch.demos.BoringModel", f"--trainer.strategy={strategy}"], "plan")
    assert recipe.phantom_arguments(num_blocks=chosen).get("num_blocks") == blocks
