"""Imports go down, never up or sideways."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FLOORS = [  # ground first; a room (a module or a folder) may import lower floors and itself
    "types masked sharding processes",
    "compilation interrupts checkpoint report tags watch written",
    "policy voting aggregation batch cache sampling models tasks splice repetition",
    "bases methods data judging rollout verifier_worker",
    "slots verifier_pool",
    "rewards members checks learning",
    "loop",
    "build",
    "evaluate warmup judges drivers",
    "pair_data subjects ahead",
    "train bench",
]
FLOOR = {f"rl_reason.{room}": height for height, rooms in enumerate(FLOORS) for room in rooms.split()}
FLOOR |= {"kernels": -1, "configs": -1, "experiments": len(FLOORS)}
FILES = sorted(p for d in ("kernels", "rl_reason", "configs", "experiments") for p in (ROOT / d).rglob("*.py"))


def name_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str | None:
    """'rl_reason.models' for rl_reason.models.moe; None for what is not ours."""
    top, *rest = module.split(".")
    return {"rl_reason": f"rl_reason.{rest[0]}" if rest else None}.get(top, top if top in FLOOR else None)


def imports(path: pathlib.Path):
    """Every module that a file names in an import, wherever in the file; names imported from one count too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative imports hide the floor they go to"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_go_down(path):
    here = room_of(name_of(path))
    if here is None:
        return  # rl_reason/__init__.py
    assert here in FLOOR, f"{here} is on no floor: give it one in FLOORS"
    for module in imports(path):
        there = room_of(module)
        if there is not None and there != here:
            assert there in FLOOR, f"{name_of(path)} imports {module}, which is on no floor"
            assert FLOOR[there] < FLOOR[here], (
                f"{name_of(path)} (floor {FLOOR[here]}) imports {module} ({there}, floor {FLOOR[there]})"
            )


@pytest.mark.parametrize("path", [p for p in FILES if p.parent.name == "methods"], ids=name_of)
def test_methods_never_import_each_other(path):
    siblings = [m for m in imports(path) if m.startswith("rl_reason.methods")]
    assert not siblings, f"{name_of(path)} imports {siblings}; move what they share down to policy.py or masked.py"


@pytest.mark.parametrize("path", [p for p in FILES if p.parents[1].name == "kernels"], ids=name_of)
def test_kernels_never_import_each_other(path):
    own = ".".join(name_of(path).split(".")[:2])
    allowed = (own, "kernels.dispatch", "kernels.integers", "kernels.tpu")  # what all operations share
    others = [m for m in imports(path) if m.startswith("kernels.") and not m.startswith(allowed)]
    assert not others, f"{name_of(path)} imports {others}"


def test_every_room_exists():
    rooms = {room_of(name_of(path)) for path in FILES} - {None}
    assert not set(FLOOR) - rooms, f"FLOORS names rooms that are gone: {set(FLOOR) - rooms}"


def test_what_verifier_processes_and_configs_load_is_free_of_jax():
    # Workers start by the dozen and configs are read before jax is set up; neither may pay for it or initialise it.
    code = """
import pkgutil, sys, importlib, configs, experiments.config_files
import rl_reason.tasks, rl_reason.tasks.base, rl_reason.data.example, rl_reason.verifier_worker
for module in pkgutil.iter_modules(configs.__path__):
    importlib.import_module(f"configs.{module.name}")
print(sorted({"jax", "jaxlib", "flax", "optax"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_configs_import_only_data():
    allowed = ("ml_collections", "configs", "typing")
    for path in FILES:
        if path.parent.name == "configs":
            assert [m for m in imports(path) if not m.startswith(allowed)] == [], path
