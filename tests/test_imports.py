"""What imports what: few dependencies in the core, none upward, and files that stay readable."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "heptapod_fast"
MODULES = sorted(PACKAGE.rglob("*.py"))
TOOLS = sorted((ROOT / "tools").glob("*.py"))
CORE = ("config", "grid", "rng", "ops", "model", "systems", "data.tokens", "train.loop")
OPTIONAL = ("PIL", "safetensors", "google_crc32c", "tyro", "zarr", "rich", "scipy", "torchvision")

# From the ground up; a module imports its own floor and those below. The counter-based generator
# and its operation define each other's numbers, so rng shares the floor of ops.
FLOORS = (
    ("progress", "faults", "storage"),
    ("ops", "rng", "kernels"),
    ("grid", "attention_masks"),
    ("tokenizers", "data"),
    ("config", "resolve", "pictures"),
    ("model",),
    ("sampling",),
    ("systems",),
    ("evaluation",),
    ("train", "runs", "reports"),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def run_blocked(code: str) -> subprocess.CompletedProcess:
    """Python in which importing an optional package fails."""
    block = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def test_the_core_needs_torch_and_numpy_only():
    lines = "\n".join(f"import heptapod_fast.{name}" for name in CORE)
    done = run_blocked(lines + "\nfrom heptapod_fast import Config, build_system\nprint('fine')")
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr


def test_a_step_of_training_runs_without_them():
    done = run_blocked(
        "import torch\nfrom heptapod_fast.systems import build_system\n"
        "from heptapod_fast import Config\n"
        "from heptapod_fast.data import SyntheticTokens\nfrom heptapod_fast.rng import Rng\n"
        "from heptapod_fast.tokenizers import token_spec\n"
        "config = Config(size='tiny', data='synthetic', width=32, heads=2).resolve()\n"
        "spec = token_spec('patch-vq', 24, 4, 128)\n"
        "batch = SyntheticTokens(spec, 5, 0).batch(torch.arange(2))\n"
        "loss = build_system(config, spec, 5).loss(batch, Rng(0))\n"
        "loss.total.backward()\nprint(loss.mean.isfinite().item())"
    )
    assert done.stdout == "True\n", done.stderr


def test_the_names_of_the_data_package_are_there():
    import heptapod_fast.data as data

    assert all(getattr(data, name).__name__ == name for name in data.__all__)
    assert "Logograms" in dir(data)
    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = data.Nothing


def imported(path: Path) -> set[str]:
    """Rooms of heptapod_fast that a module imports when it runs (not for type checkers only)."""
    tree = ast.parse(path.read_text())
    skipped = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("heptapod_fast"):
            names = (
                [node.module]
                if node.module != "heptapod_fast"
                else [f"heptapod_fast.{alias.name}" for alias in node.names]
            )
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("heptapod_fast.")}
    return found


def rooms() -> list[Path]:
    """Modules below a floor; the package's own __init__ passes names on."""
    return [path for path in MODULES if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", rooms(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_only_point_down(path):
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    upward = sorted(name for name in imported(path) if FLOOR[name] > FLOOR[room])
    assert not upward, f"{path} imports {upward}, which stand above it"


def test_every_room_has_a_floor():
    assert {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in rooms()} <= FLOOR.keys()
