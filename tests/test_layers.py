"""Imports only go down. Reads the syntax tree of every module; nothing is imported or run.

A new module is added to MODULES, in the layer of what it needs. Imports inside functions count too.
"""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

MODULES = {
    # 0: usable without the rest
    0: """
        kernels.checks kernels.dispatch kernels.ema kernels.ema_triton kernels.nf4
        kernels.nf4_triton kernels.pointwise kernels.policy_head kernels.policy_head_loss
        kernels.policy_head_sums kernels.policy_head_triton kernels.reference kernels.ties
        kernels.ties_triton kernels.tiles kernels.tiles_triton
        envs.alfworld envs.alfworld_compact envs.alfworld_draw envs.alfworld_engine
        envs.alfworld_expert envs.alfworld_furniture envs.alfworld_games envs.alfworld_icons
        envs.alfworld_pddl envs.alfworld_pen envs.alfworld_process envs.alfworld_rooms
        envs.alfworld_scene envs.alfworld_thor envs.base envs.blackjack envs.cards envs.custom
        envs.ezpoints envs.formula envs.guess envs.make envs.numberline envs.picture envs.points24
    """,
    # 1: no model
    1: """
        advice attend batch coded config flags footprint gae graphs history idle kl log machine
        memory pace parallel phases ppo presets prompts saved sft_config shapes terminal versions
    """,
    # 2: the model and its weights
    2: """
        adapters arguments card checkpoint families formats fused hub kv_cache lock lora merging
        model modules sinks tiny
    """,
    # 3: the model at work
    3: """
        backprop console corrector decode demos faults finetune guidance measure optimizer prefixes
        rollout run score scribe teacher trajectory update
    """,
    # 4: what is run
    4: "__main__ eval export merge play replay sft train view view_data view_seeds",
}
LAYERS = {f"turbo.{name}": layer for layer, names in MODULES.items() for name in names.split()}
LAYERS["turbo"] = 0

# Imported where they are used. Only a kernels/*_triton.py, itself imported late, opens with triton.
OPTIONAL = {
    "alfworld",
    "bitsandbytes",
    "fast_downward",
    "flash_attn",
    "matplotlib",
    "peft",
    "tensorboard",
    "textworld",
    "trackio",
    "triton",
    "wandb",
}
ALLOWED_IN_KERNELS = {"torch", "triton", *sys.stdlib_module_names}
FORBIDDEN_IN_ENVS = {"torch", "triton", "transformers", "tokenizers", "safetensors"}
UNSAFE_MODULES = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def source_files() -> dict[str, Path]:
    """Module name -> file, for every module that is installed."""
    files = {}
    for folder, package in (
        ("kernels", "turbo.kernels"),
        ("envs", "turbo.envs"),
        ("turbo", "turbo"),
    ):
        for path in sorted((ROOT / folder).glob("*.py")):
            files[package if path.stem == "__init__" else f"{package}.{path.stem}"] = path
    return files


def imported_modules(node: ast.AST, module: str) -> list[str]:
    """The full names that an import statement may load; `from turbo import gae` gives both."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        parent = module.split(".")[: -node.level] if module != "turbo" else ["turbo"]
        base = ".".join([*parent, *([base] if base else [])])
    return [base, *(f"{base}.{alias.name}" for alias in node.names)]


def violations(module: str, source: str) -> list[str]:
    """Every broken rule of one module, as `line: what`."""
    tree = ast.parse(source)
    deferred = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef)
        for inner in ast.walk(outer)
    }
    found = []
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        for name in imported_modules(node, module):
            problem = import_problem(module, name, at_top=id(node) not in deferred)
            if problem:
                found.append(f"{line}: {problem}")
        if isinstance(node, ast.Call):
            problem = call_problem(node)
            if problem:
                found.append(f"{line}: {problem}")
    return found


def import_problem(module: str, name: str, at_top: bool) -> str | None:
    """What is wrong with `module` importing `name`, if anything."""
    root = name.split(".")[0]
    if LAYERS.get(name, 0) > LAYERS[module]:
        return f"imports {name}, layer {LAYERS[name]}, from layer {LAYERS[module]}"
    if root in UNSAFE_MODULES:
        return f"imports {root}, which can run what it reads"
    if module.startswith("turbo.kernels."):
        inside = name == "turbo" or name.startswith("turbo.kernels")
        if not inside and root not in ALLOWED_IN_KERNELS:
            return f"imports {name}; kernels know torch, triton and each other only"
    if module.startswith("turbo.envs."):
        if root in FORBIDDEN_IN_ENVS:
            return f"imports {root}; environments are plain numpy"
        if root == "turbo" and name != "turbo" and not name.startswith("turbo.envs"):
            return f"imports {name}; environments know each other only"
    if at_top and name in LAYERS and name.endswith("_triton") and not module.endswith("_triton"):
        return f"imports {name} at the top; import it where the kernel is launched"
    is_kernel_file = root == "triton" and module.endswith("_triton")
    if at_top and root in OPTIONAL and not is_kernel_file:
        return f"imports {root} at the top; import it where it is used, with an install hint"
    if at_top and name.startswith("torch.utils.tensorboard"):
        return "imports tensorboard at the top; import it where it is used, with an install hint"
    return None


def call_problem(node: ast.Call) -> str | None:
    """What is wrong with a call, if anything: code or pickles that are read and run."""
    keywords = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
    called = ast.unparse(node.func)
    if called in ("eval", "exec", "builtins.eval", "builtins.exec"):
        return f"calls {called}"
    if called == "torch.load" and keywords.get("weights_only") is not True:
        return "calls torch.load without weights_only=True"
    if called in ("np.load", "numpy.load") and keywords.get("allow_pickle"):
        return f"calls {called} with allow_pickle"
    return None


@pytest.mark.parametrize("module", source_files())
def test_module_keeps_the_rules(module):
    assert module in LAYERS, f"{module} is not listed: add it to MODULES in {Path(__file__).name}"
    path = source_files()[module]
    found = violations(module, path.read_text(encoding="utf-8"))
    assert not found, "\n".join(f"{path.relative_to(ROOT)}:{problem}" for problem in found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("turbo.gae", "import turbo.model"),
        ("turbo.gae", "from turbo import model"),
        ("turbo.gae", "from . import train"),
        ("turbo.gae", "from .train import main"),
        ("turbo.gae", "def f():\n    from turbo.train import main"),
        ("turbo.kernels.ties", "import numpy"),
        ("turbo.kernels.ties", "from turbo.gae import gae"),
        ("turbo.kernels.ties", "from ..gae import gae"),
        ("turbo.kernels.ties", "import triton"),
        ("turbo.kernels.ties", "from .ties_triton import launch"),
        ("turbo.envs.base", "import torch"),
        ("turbo.envs.base", "def f():\n    import torch.nn"),
        ("turbo.envs.base", "from turbo import prompts"),
        ("turbo.log", "import wandb"),
        ("turbo.log", "class A:\n    try:\n        import wandb\n    except ImportError: pass"),
        ("turbo.view", "from matplotlib import pyplot"),
        ("turbo.train", "import pickle"),
        ("turbo.train", "eval('1 + 1')"),
        ("turbo.train", "torch.load(path)"),
        ("turbo.train", "torch.load(path, weights_only=False)"),
        ("turbo.train", "np.load(path, allow_pickle=True)"),
    ],
)
def test_the_rules_catch(module, source):
    assert violations(module, source)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("turbo.train", "from turbo import gae, model\nimport turbo.envs.make"),
        ("turbo.gae", "from turbo import __version__\nfrom turbo.ppo import ppo_loss"),
        ("turbo.kernels.ties", "import math\nimport torch\nfrom .reference import trim"),
        ("turbo.kernels.ties", "def f():\n    from .ties_triton import launch"),
        ("turbo.kernels.ties_triton", "import triton.language as tl"),
        ("turbo.log", "def f():\n    import wandb"),
        ("turbo.train", "model.eval()\ntorch.load(path, weights_only=True)"),
    ],
)
def test_the_rules_allow(module, source):
    assert violations(module, source) == []
