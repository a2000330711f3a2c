"""The command line itself: its help is quick, words that are wrong are one line, old names of options still work."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cli_runner import invoke
from fastff.bench.options import BenchOptions
from fastff.cli.app import COMMANDS
from fastff.cli.renamed import RENAMED, current_names


def test_the_list_of_commands_imports_neither_torch_nor_transformers():
    code = (
        "import sys; from fastff.cli import run; code = run(['--help']);"
        "print(code, [name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert all(name in done.stdout for name, _, _ in COMMANDS)


@pytest.mark.parametrize("name", [name for name, _, _ in COMMANDS])
def test_every_option_of_a_command_says_what_it_does(name):
    from fastff.cli import app

    said = invoke([name, "--help"])
    assert said.exit_code == 0
    shown = [argument for argument in app[name].assemble_argument_collection(parse_docstring=True) if argument.show]
    assert shown
    for argument in shown:
        assert argument.parameter.help, f"{name} {argument.name} has no help"
        assert argument.name in said.output or argument.name.lstrip("-").upper() in said.output


@pytest.mark.parametrize(
    ("words", "message", "code"),
    [
        (["bench", "--colour", "red"], "--colour", 2),
        (["nothing"], "nothing", 2),
        (["bench", "--only", "rows=many"], "'many' is not a list of whole numbers|rows=many", 1),
        (["bench", "--cell-seconds", "0"], "--cell-seconds 0.0 is not above 0", 1),
        (["bench", "--replace"], "--replace needs --out", 1),
        (["variants", "huge"], "preset 'huge' is not one of tiny, mini, small, base", 1),
        (["demo", "--sentences", "0"], "sentences 0 ", 1),
    ],
)
def test_what_the_user_can_put_right_is_one_line(words, message, code):
    done = invoke(words)
    assert done.exit_code == code, done.output
    assert done.output.startswith("error: ")
    assert any(part in done.output for part in message.split("|"))
    assert len(done.output.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tune"], "--tune does nothing with --device cpu: it is for cuda"),
        (["--jobs", "2"], "--jobs does nothing with --device cpu"),
        (["--max-run-seconds", "9"], "--max-run-seconds does nothing with --device cpu"),
        (["--device", "cuda", "--quick"], "--quick does nothing with --device cuda: it is for cpu"),
        (["--device", "cuda", "--replace"], "--replace does nothing with --device cuda"),
    ],
)
def test_an_option_that_does_nothing_with_the_device_is_refused(words, message):
    done = invoke(["bench", *words])
    assert done.exit_code == 1
    assert message in done.output


def test_an_option_for_both_devices_is_not_refused():
    BenchOptions(device="cuda", cell_seconds=1.0, only=("1x11",)).refuse_what_the_device_ignores()
    settings = BenchOptions(device="cuda", cell_seconds=1.5, jobs=3, max_run_seconds=60.0).gpu_settings()
    assert (settings.cell_seconds, settings.jobs, settings.seconds) == (1.5, 3, 60.0)


def test_old_names_of_options_work_with_a_warning():
    for command, names in RENAMED.items():
        for old, new in names.items():
            said = []
            assert current_names([command, old, "1"], said.append) == [command, new, "1"]
            assert current_names([command, f"{old}=1"], said.append) == [command, f"{new}=1"]
            assert len(said) == 2
            assert f"{old} is now {new}" in said[0]


def test_new_names_are_options_of_their_commands():
    from fastff.cli import app

    for command, names in RENAMED.items():
        arguments = [argument for argument in app[command].assemble_argument_collection() if argument.parse]
        options = {name for argument in arguments for name in argument.names}
        assert set(names.values()) <= options
        assert not set(names) & options


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["bench", "--seconds", "9"], ["bench", "--cell-seconds", "9"]),
        (["bench", "--device", "cpu", "--seconds=9"], ["bench", "--device", "cpu", "--cell-seconds=9"]),
        (["bench", "--seconds", "9", "--device", "cuda"], ["bench", "--max-run-seconds", "9", "--device", "cuda"]),
        (["bench", "--device=cuda", "--seconds", "9"], ["bench", "--device=cuda", "--max-run-seconds", "9"]),
        (["pretrain", "--seconds", "9"], ["pretrain", "--seconds", "9"]),
        ([], []),
    ],
)
def test_seconds_of_bench_meant_two_things(words, wanted):
    assert current_names(words, lambda _: None) == wanted
