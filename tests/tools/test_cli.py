"""What the command lines share: groups of flags in --help, switches, errors in one line."""

import importlib
import io
import re
import subprocess
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from heptapod_fast.config import DataSettings, RecipeSettings, RunSettings, SystemSettings
from heptapod_fast.config.settings import setting
from heptapod_fast.systems import SYSTEMS, settings_registry
from heptapod_fast.world import OtherRankFailed
from tests.running import ROOT, command, environment, flags, refused

TOOLS = ("cache", "evaluate", "profile", "report", "sample", "train", "verify")
SHARED_MODULES = ("_cli", "_training", "_sampling")


@pytest.fixture
def cli(monkeypatch):
    """The module tools/_cli.py."""
    # Last, as _cli.py itself has it: tools/profile.py must not stand in for the standard library's.
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT / "tools")])
    return importlib.import_module("_cli")


# --------------------------------------------------------------------------------------- --help


@pytest.mark.parametrize("tool", TOOLS)
def test_every_tool_has_help(tool):
    result = command(tool, "--help")
    assert result.code == 0, result.err
    assert "usage" in result.out


def plain(line):
    """A line of --help without its frame, which is drawn as the output's encoding allows."""
    return " ".join(line.strip("╭╮╰╯│─|+- \n").split())


def sections(text):
    """{title of a group of flags: its lines, joined} in --help."""
    found = {"": ""}
    title = ""
    for line in text.splitlines():
        if re.fullmatch(r"([\w-]+ )?options", plain(line)):
            title = plain(line)
            found[title] = ""
        else:
            # Flags keep their dashes.
            found[title] += " ".join(line.strip("│| \n").split()) + " "
    return found


@pytest.mark.parametrize("system", settings_registry())
def test_help_shows_the_groups_each_with_its_flags(system):
    result = command("train", "--system", system, "--help")
    assert result.code == 0, result.err
    found = sections(result.out)
    groups = {
        "data options": DataSettings,
        "recipe options": RecipeSettings,
        "run options": RunSettings,
        f"{system} options": settings_registry()[system],
    }
    for title, group in groups.items():
        assert title in found, list(found)
        for name in group.names():
            assert f"--{name.replace('_', '-')} " in found[title], (title, name)


def test_help_shows_the_defaults_of_the_size():
    small, large = (
        sections(command("train", "--size", size, "--help").out)["data options"]
        for size in ("tiny", "B")
    )
    assert "(default: logograms)" in small
    assert "(default: logograms)" not in large
    assert "(default: kl16)" in large


def test_help_has_the_flags_of_the_chosen_system_alone():
    text = command("train", "--system", "1d-raster", "--help").out
    assert "--dropout" in text
    assert "--head-depth" not in text


# ------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    "words", [("--head-depth", "2"), ("--head-depth=2",), ("--head_depth", "2")]
)
def test_flags_of_another_system_are_refused_with_the_reason(words):
    refused(
        command("train", "--size", "tiny", "--system", "1d-raster", *words, "--dry-run"),
        "--head-depth 2 belongs to --system heptapod; --system 1d-raster has no such setting",
    )


@dataclass(frozen=True, kw_only=True)
class GlowSettings(SystemSettings):
    """Of a system with a switch that the others do not have."""

    glow: bool = setting("Whether it glows.")


@pytest.mark.parametrize(
    "word, value", [("--glow", True), ("--no-glow", False), ("--glow=False", False)]
)
def test_a_switch_of_another_system_is_refused_in_all_its_forms(monkeypatch, word, value):
    monkeypatch.setitem(SYSTEMS, "glowing", SimpleNamespace(Settings=GlowSettings))
    refused(
        command("train", "--size", "tiny", word, "--dry-run"),
        f"--glow {value} belongs to --system glowing; --system heptapod has no such setting",
    )


def test_the_last_system_on_the_command_line_counts():
    words = ("--size", "tiny", "--system", "1d-raster", "--head", "local", "--dry-run")
    refused(command("train", *words), "--head local belongs to --system heptapod")
    for last in (("--system", "heptapod"), ("--system=heptapod",)):
        result = command("train", *words, *last)
        assert result.code == 0, result.err
        assert "--head                 local\n" in result.out


def test_a_flag_that_no_system_has_is_named():
    refused(command("train", "--size", "tiny", "--hed", "local", "--dry-run"), "--hed")


def test_a_system_that_there_is_not_is_refused_with_those_there_are():
    refused(
        command("train", "--size", "tiny", "--system", "2d", "--dry-run"),
        "--system 2d: expected one of heptapod, 1d-raster, 1d-random",
    )


@pytest.mark.parametrize(
    "words, is_on",
    [
        (("--flip",), True),
        (("--no-flip",), False),
        (("--flip", "True"), True),
        (("--flip", "False"), False),
    ],
)
def test_switches_go_with_and_without_a_value(words, is_on):
    result = command("train", *flags(out="nowhere"), *words, "--dry-run")
    assert result.code == 0, result.err
    assert f"--flip                 {is_on}\n" in result.out


def test_bare_switches_are_spelt_out_and_nothing_else(cli):
    words = ["--flip", "--size", "tiny", "--no-allow_upscale", "--flip", "False", "--no-where"]
    found = cli.spell_out_switches(words, {"flip", "allow-upscale"})
    assert found == [
        *("--flip", "True", "--size", "tiny", "--allow-upscale", "False"),
        *("--flip", "False", "--no-where"),
    ]


def test_one_flag_can_be_looked_at_before_the_others(cli):
    assert cli.peek(["--size", "B"], "size", "tiny") == "B"
    assert cli.peek(["--size=B"], "size", "tiny") == "B"
    assert cli.peek(["--size"], "size", "tiny") == "tiny"
    assert cli.peek([], "size", "tiny") == "tiny"
    assert cli.peek(["--size", "B", "--size=L"], "size", "tiny") == "L"
    assert cli.peek(["--size=L", "--out", "x", "--size", "B"], "size", "tiny") == "B"


def test_flags_are_found_in_all_their_forms(cli):
    def found(*words):
        return cli.find_flag(list(words), {"head_depth", "glow"}, {"glow"})

    assert found("--size", "B", "--head-depth", "3") == ("head_depth", "3")
    assert found("--head_depth=a_b") == ("head_depth", "a_b")
    assert found("--no-glow", "--out", "x") == ("glow", "False")
    assert found("--glow") == ("glow", "True")
    assert found("--no-head-depth", "--out", "glow") is None


# ---------------------------------------------------------------------------------- under torchrun


@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False)])
@pytest.mark.parametrize(
    "words",
    [
        ("--size", "tiny", "--window", "8"),
        ("--size", "tiny", "--system", "2d"),
        ("--size", "tiny", "--hed", "local"),
    ],
)
def test_errors_in_the_command_line_are_said_once(monkeypatch, words, rank, speaks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("train", *words, "--dry-run")
    assert result.code != 0
    assert result.out == ""
    assert (result.err != "") is speaks


@pytest.mark.parametrize("rank, speaks", [("0", True), ("1", False)])
def test_a_dry_run_is_printed_once_for_all_ranks(monkeypatch, rank, speaks):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = command("train", *flags(out="nowhere", batch=8), "--dry-run")
    assert result.code == 0, result.err
    assert ("= 8 / 2 ranks / 4" in result.out) is speaks
    assert bool(result.out) is speaks


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("package", ["tyro", "torch"])
def test_a_missing_package_names_the_remedy(monkeypatch, package):
    for module in SHARED_MODULES:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    result = command("report", "somewhere")
    message = str(result.code)
    assert message.startswith(f"error: {package} is not installed for {sys.executable}")
    assert "source .venv/bin/activate" in message
    assert f"pip install {package}" in message


def test_a_package_that_only_one_command_needs_names_the_remedy(cli):
    def work():
        raise ModuleNotFoundError("No module named 'no_such_package'", name="no_such_package")

    with pytest.raises(SystemExit, match="no_such_package is not installed"):
        cli.main(work)


def ending(cli, work):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as found:
        cli.main(work)
    return found.value.code


@pytest.mark.parametrize(
    "error, code, text",
    [
        (ValueError("--batch 9: odd"), 1, "error: --batch 9: odd\n"),
        (FileNotFoundError("no such file: x"), 1, "error: no such file: x\n"),
        (KeyboardInterrupt(), 130, "interrupted before there was anything to save\n"),
        (RuntimeError("CUDA out of memory. Tried"), 1, "lower --micro-batch or --batch"),
        (MemoryError(), 1, "out of memory (MemoryError): lower --micro-batch"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_errors_are_a_line(cli, capsys, error, code, text):
    def work():
        raise error

    assert ending(cli, work) == code
    assert text in capsys.readouterr().err


def test_a_rank_that_stops_because_of_another_says_nothing(cli, capsys):
    def work():
        raise OtherRankFailed("rank 1 stops")

    assert ending(cli, work) == 1
    assert capsys.readouterr() == ("", "")


def test_errors_of_the_program_keep_their_traceback(cli):
    def work():
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        cli.main(work)


def test_the_exit_code_is_that_of_the_work(cli):
    assert ending(cli, lambda: 0) == 0
    assert ending(cli, lambda: 3) == 3


def test_what_the_terminal_cannot_show_is_escaped(cli, monkeypatch):
    """Names of classes and files are anybody's, terminals and log files know what they know."""
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))

    def work():
        print("gr\u00f6\u00dfe \udce9")
        sys.stdout.flush()
        return 0

    assert ending(cli, work) == 0
    assert raw.getvalue() == b"gr\\xf6\\xdfe \\udce9\n"


LEAVING = """
import atexit, sys
sys.path.insert(0, "tools")
import _cli
from heptapod_fast import world

class Late:
    def __del__(self):
        print("cleared up")

world.has_joined = bool(int(sys.argv[1]))
kept = Late()
atexit.register(print, "at exit")
print("worked")
_cli.leave(3)
"""


@pytest.mark.parametrize("joined, cleared", [(0, "cleared up\n"), (1, "")])
def test_one_of_several_ranks_leaves_without_pythons_clearing_up(joined, cleared):
    """Which threads of gloo do not survive; what was printed or registered is not lost."""
    words = [sys.executable, "-c", LEAVING, str(joined)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, f"worked\nat exit\n{cleared}"), done.stderr
