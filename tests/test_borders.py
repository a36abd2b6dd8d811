"""Every private name of a dependency that the package uses exists: an upgrade fails here, by that name.

The uses are found in the package's source, so a new one fails, too, until a table below says where it is to be found.
"""

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap

import pytest

import lightning_phantom

PRIVATE = re.compile(r"_(?!_)\w+")
NO_ONES = {"_asdict", "_fields", "_replace", "_abc_impl", "_backward_cls"}  # public, or made by a metaclass

# What is read or written of others' objects: the module or class that has it.
ATTRIBUTES = {
    "_average_model": "lightning.pytorch.callbacks.StochasticWeightAveraging",
    "_hparams_name": "lightning.pytorch.utilities.parsing",
    "_log_graph": "lightning.pytorch.loggers.TensorBoardLogger",
    **dict.fromkeys(("_parameters", "_buffers", "_modules"), "torch.nn.Module"),
    **dict.fromkeys(
        ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"), "torch.nn.Module"
    ),
    **dict.fromkeys(
        ("_state_dict_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks"), "torch.nn.Module"
    ),
    **dict.fromkeys(("_backward_hooks", "_post_accumulate_grad_hooks", "_version"), "torch.Tensor"),
    **dict.fromkeys(("_is_view", "_is_zerotensor", "_make_wrapper_subclass"), "torch.Tensor"),
    "_C": "torch",
    "_trainer": "lightning.pytorch.LightningModule",
    "_SubprocessScriptLauncher": "lightning.pytorch.strategies.launchers",
    **dict.fromkeys(("_optimizer_to_device", "_optimizers_to_device"), "lightning.fabric.utilities.optimizer"),
    "_Stateful": "lightning.fabric.utilities.types",
    "_WrappingCheckpointIO": "lightning.pytorch.plugins.io.wrapper",
    **dict.fromkeys(
        ("_are_functorch_transforms_active", "_current_graph_task_id", "_get_tracing_state", "_is_alias_of", "_nn"),
        "torch._C",
    ),
    "_current_level": "torch.autograd.forward_ad",
    "_symbolic_trace": "torch.fx",
    "_execution_engine": "torch.autograd.Variable",
    **dict.fromkeys(("_schema", "_overloadpacket"), "torch._ops.OpOverload"),
    **dict.fromkeys(("_allgather_base_", "_reduce_scatter_base_"), "torch.ops.c10d"),
    "_c10d_functional": "torch.ops",
    "_unsafe_view": "torch.ops.aten",
    "_get_ddp_logging_data": "torch.nn.parallel.DistributedDataParallel",
    "_set_params_and_buffers_to_ignore_for_model": "torch.nn.parallel.DistributedDataParallel",
    "_world": "torch.distributed.distributed_c10d",
    "_reset_parameters": "torch.nn.Transformer",
    "_checkpoint_wrapped_module": "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "_device_types": "torch.distributed.ProcessGroup",
    "_unscale_grads_": "torch.amp.GradScaler",
    "_tp_plan": "transformers.PreTrainedModel",
    **dict.fromkeys(("_conf", "_hardware"), "codecarbon.emissions_tracker.BaseEmissionsTracker"),
    "_mode": "codecarbon.external.hardware.CPU",
    "_use_power_fallback": "codecarbon.core.gpu_device.GPUDevice",
}
# What a class of ours overrides, or uses of itself, that its base has.
INHERITED = {
    "CheckpointingStrategy": {"_checkpoint_io"},
    "FullySharded": {"_forward_redirection"},
    "PhantomFabricStrategy": {
        *("_backward_sync_control", "_checkpoint_io", "_convert_stateful_objects_in_state", "_timeout")
    },
    "PhantomLauncher": {"_call_children_scripts"},
    "Recipe": {"_set_seed"},
    "RunningStrategy": {"_lightning_module"},
    "SplitLinear": {"_load_from_state_dict"},
    "SplitStrategy": {"_configure_launcher", "_launcher", "_layer_sync", "_lightning_module", "_timeout"},
    "_CLI": {"_parse_ckpt_path"},
}
OWN_TEXTS = {"_before_phantom", "_j", "_operator"}  # strings that only look like names of others


def is_private(name):
    return PRIVATE.fullmatch(name) is not None and name not in NO_ONES


MODULES = [
    importlib.import_module(info.name)
    for info in pkgutil.walk_packages(lightning_phantom.__path__, "lightning_phantom.")
    if not info.name.endswith("__main__")
]
TREES = {module.__name__: ast.parse(inspect.getsource(module)) for module in MODULES}
CLASSES = [c for m in MODULES for c in vars(m).values() if inspect.isclass(c) and c.__module__ == m.__name__]


def of_itself(node):
    """Whether an attribute is one of `self`, `cls` or `super()`."""
    owner = node.value.func if isinstance(node.value, ast.Call) else node.value
    return isinstance(owner, ast.Name) and owner.id in ("self", "cls", "super")


def tree_of(cls):
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, TypeError):  # written in C
        return ast.parse("")


def names_of_class(cls):
    """The private names that a class defines, and those that it uses of itself."""
    tree = tree_of(cls)
    stored = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Store)}
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and of_itself(n)}
    defined = {*vars(cls), *vars(cls).get("__annotations__", ()), *(stored & used)}
    return set(filter(is_private, defined)), set(filter(is_private, used))


OURS = {name for cls in CLASSES for name in names_of_class(cls)[0]}


def imports():
    """`(module, name)` of each import in which something is private; the name None for a module."""
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and not node.module.startswith("lightning_phantom"):
                for alias in node.names:
                    if any(map(is_private, (*node.module.split("."), alias.name))):
                        yield pytest.param(node.module, alias.name, id=f"{name.rpartition('.')[2]}: {alias.name}")
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if any(map(is_private, alias.name.split("."))):
                        yield pytest.param(alias.name, None, id=f"{name.rpartition('.')[2]}: {alias.name}")


def foreign_attributes():
    """The private names that are read or written of objects that are not ours, also where a string names them."""
    for tree in TREES.values():
        parts = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in ast.walk(n)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and not of_itself(node) and is_private(node.attr):
                yield node.attr
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in parts:
                if is_private(node.value.rstrip(".")) and node.value not in OWN_TEXTS:
                    yield node.value.rstrip(".")


def foreign_bases(cls):
    return [b for b in cls.__mro__ if b.__module__.partition(".")[0] not in ("lightning_phantom", "builtins", "typing")]


def inherited():
    """By class, the private names that it shares with a base of others."""
    found = {}
    for cls in CLASSES:
        theirs = {name for base in foreign_bases(cls) for name in set().union(*names_of_class(base))}
        if shared := set().union(*names_of_class(cls)) & theirs:
            found[cls.__qualname__] = shared
    return found


@pytest.mark.parametrize(("module", "name"), imports())
def test_private_imports_exist(module, name):
    found = importlib.import_module(module)
    assert name is None or hasattr(found, name), f"{module}.{name} is gone"


TWINS = {"lightning.pytorch": "pytorch_lightning", "lightning.fabric": "lightning_fabric"}


def places(name):
    """Where a name is: of Lightning's under both of its names."""
    place = ATTRIBUTES[name]
    return [place, *(place.replace(one, other) for one, other in TWINS.items() if place.startswith(one))]


@pytest.mark.parametrize("name", sorted(set(foreign_attributes()) - OURS))
def test_private_attributes_exist(name):
    assert name in ATTRIBUTES, f"say in ATTRIBUTES where {name} is"
    for place in places(name):
        check_place(place, name)


def check_place(place, name):
    owner = None
    for end in range(place.count(".") + 1):
        module, *attributes = place.rsplit(".", end)
        try:
            owner = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            continue
    for attribute in attributes:
        owner = getattr(owner, attribute)
    written = "" if hasattr(owner, name) else inspect.getsource(owner)  # an instance has it, or others' objects
    assert hasattr(owner, name) or re.search(rf"\b{name}\b", written), f"{place}.{name} is gone"


def test_every_listed_attribute_is_used():
    assert set(ATTRIBUTES) <= set(foreign_attributes())


def test_private_names_of_bases_exist():
    assert inherited() == INHERITED


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__qualname__)
def test_what_a_class_uses_of_itself_is_somebodys(cls):
    known = {name for base in cls.__mro__ if base is not object for name in names_of_class(base)[0]}
    assert names_of_class(cls)[1] <= known
