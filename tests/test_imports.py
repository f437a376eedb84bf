"""What imports what: no circle between any two files, few dependencies in the core, and rooms that
stand in the order of the README's picture."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "heptapod_fast"
KERNELS = ROOT / "kernels"  # installs as heptapod_fast.kernels
CORE = ("config", "grid", "rng", "ops", "model", "systems", "data.tokens", "train.loop")
OPTIONAL = (
    "PIL",
    "safetensors",
    "google_crc32c",
    "tyro",
    "zarr",
    "rich",
    "matplotlib",
    "scipy",
    "torchvision",
    "tensorboard",
    "wandb",
)


def module_name(path: Path) -> str:
    """heptapod_fast.train.loop of its file; a package's name of its __init__.py."""
    if path.is_relative_to(KERNELS):
        parts = ("heptapod_fast", "kernels", *path.relative_to(KERNELS).with_suffix("").parts)
    else:
        parts = ("heptapod_fast", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for folder in (PACKAGE, KERNELS) for path in folder.rglob("*.py")}


def for_type_checkers_only(tree: ast.AST) -> set[ast.AST]:
    """Everything below `if TYPE_CHECKING`."""
    return {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for child in ast.walk(node)
    }


def imports_in(code: str) -> set[str]:
    """The files of the project that code imports, wherever in it: lazy imports count."""
    tree = ast.parse(code)
    skipped = for_type_checkers_only(tree)
    found = set()
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"imports are absolute: {ast.unparse(node)}"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                found.add(submodule if submodule in FILES else node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


GRAPH = {name: imports_in(path.read_text()) - {name} for name, path in FILES.items()}


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """A way from a node back to itself; [] if there is none."""
    finished: set[str] = set()
    path: list[str] = []

    def visit(node: str) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        path.append(node)
        for other in sorted(graph[node]):
            if found := visit(other):
                return found
        path.pop()
        finished.add(node)
        return []

    for node in sorted(graph):
        if found := visit(node):
            return found
    return []


def test_no_two_files_import_each_other():
    found = circle_in(GRAPH)
    assert not found, " -> ".join(found)


def test_a_circle_would_be_found():
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_lazy_imports_count_and_those_for_type_checkers_do_not():
    code = """
if TYPE_CHECKING:
    from heptapod_fast import grid
def later():
    from heptapod_fast.train import loop
    import heptapod_fast.rng
"""
    assert imports_in(code) == {"heptapod_fast.train.loop", "heptapod_fast.rng"}


# ------------------------------------------------------------------------------ rooms and README


def room_of(name: str) -> str:
    """train of heptapod_fast.train.loop, rng of heptapod_fast.rng."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def rooms_of_the_readme() -> list[list[str]]:
    """The rooms of the package in the README's picture, line by line from the top."""
    text = (ROOT / "README.md").read_text()
    picture = re.search(r"## Map of the house.*?```\n(.*?)```", text, re.DOTALL).group(1)
    inside = picture.split("heptapod_fast/\n")[1]
    lines = []
    for line in inside.splitlines():
        if not line.startswith(" "):
            if line.startswith("kernels/"):
                break
            continue
        # Names stand first, two spaces end them; continuation lines are indented further.
        names = re.match(r"  (\S+(?: \S+)*)(?:  |$)", line)
        if names and not line.startswith("   "):
            lines.append(
                [name.removesuffix("/").removesuffix(".py") for name in names.group(1).split()]
            )
    return lines


def test_the_readmes_picture_names_every_room_once():
    named = [room for line in rooms_of_the_readme() for room in line]
    there = {room_of(name) for name in FILES} - {"", "kernels"}
    assert sorted(named) == sorted(there)


def test_imports_only_point_down_in_the_readmes_picture():
    height = {}
    for number, line in enumerate(rooms_of_the_readme()):
        for room in line:
            height[room] = -number
    height["kernels"] = height["ops"]  # an operation and its kernels define each other's numbers
    upward = [
        f"{name} imports {other}"
        for name, others in GRAPH.items()
        for other in others
        if room_of(name) and room_of(other) and height[room_of(other)] > height[room_of(name)]
    ]
    assert not upward, upward


def test_only_systems_knows_their_names():
    """Nothing outside of systems/ and its tests asks which system it has."""
    from heptapod_fast.systems import SYSTEMS

    names = {*SYSTEMS, *(system.__name__ for system in SYSTEMS.values())}
    for name, path in FILES.items():
        if room_of(name) == "systems":
            continue
        tree = ast.parse(path.read_text())
        texts = {
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        identifiers = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        found = names & (texts | identifiers)
        assert not found, f"{path} knows {found}"
    for path in (ROOT / "tools").glob("*.py"):
        if path.name in ("compare.py", "_ablations.py"):
            continue  # their cases are command lines, and name the systems that they train
        tree = ast.parse(path.read_text())
        texts = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        assert not names & texts, path


# ------------------------------------------------------------------------------------ dependencies


def run_blocked(code: str) -> subprocess.CompletedProcess:
    """Python in which importing an optional package fails."""
    block = f"import sys\nfor name in {OPTIONAL!r}: sys.modules[name] = None\n"
    return subprocess.run(
        [sys.executable, "-c", block + code], capture_output=True, text=True, cwd=ROOT, timeout=300
    )


def test_the_core_needs_torch_and_numpy_only():
    lines = "\n".join(f"import heptapod_fast.{name}" for name in CORE)
    done = run_blocked(lines + "\nfrom heptapod_fast import Config, build_system\nprint('fine')")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "fine\n"


def test_training_steps_run_without_the_others():
    """The step as the loop runs it, on synthetic tokens: what bench/gpu.py measures."""
    done = run_blocked(
        "import tempfile, torch\n"
        "from heptapod_fast import configure\n"
        "from heptapod_fast.train.loop import training_step\n"
        "from heptapod_fast.train.session import prepare\n"
        "from heptapod_fast.world import World\n"
        "config = configure('tiny', data='synthetic', width=32, heads=2, batch=8, device='cpu',\n"
        "                   out=tempfile.mkdtemp())\n"
        "session, state = prepare(config, World(0, 1, torch.device('cpu')), lambda line: None)\n"
        "loss, _ = training_step(session, state, session.system.phase(0, 100))\n"
        "print(loss.isfinite().item(), state.images)"
    )
    assert done.stdout == "True 8\n", done.stderr


@pytest.mark.parametrize("name", ["Config", "build_system", "configure", "load_run"])
def test_the_packages_own_names(name):
    import heptapod_fast

    assert name in heptapod_fast.__all__
    assert callable(getattr(heptapod_fast, name))
    assert name in dir(heptapod_fast)


def test_an_unknown_name_of_the_package_is_an_error():
    import heptapod_fast

    with pytest.raises(AttributeError, match="has no attribute 'Nothing'"):
        _ = heptapod_fast.Nothing
