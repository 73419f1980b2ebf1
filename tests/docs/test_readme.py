"""The documents: links, tables of what exists, and the README's own commands and example on a tiny checkpoint."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import (
    DOCUMENTS,
    GIVEN,
    README,
    ROOT,
    all_options,
    anchors,
    bash_lines,
    blocks,
    commands,
    environment,
    links,
    prose,
    run_here,
    subcommand,
    text_of,
    use_commands,
    working_folder,
)
from tiny import LAYERS, save_switch, size_of, weight_files

from msmoe.families.loading import load

MSMOE = Path(sys.executable).with_name("msmoe")
NUM_EXPERTS, D_FF = 12, 64  # of wide experts: half of the bytes can be had
EXPERT_BYTES = 2 * 16 * D_FF * 4
PER_DOCUMENT = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


# What the documents name


@PER_DOCUMENT
def test_every_link_of_a_document_leads_somewhere(document):
    for target in links(document):
        name, _, anchor = target.partition("#")
        file = document.parent / name if name else document
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_is_one_page():
    assert len(text_of(README).encode()) < 10_000


def test_the_top_level_holds_the_readme_and_the_folders_it_links():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    names = {file.split("/")[0] for file in tracked.stdout.splitlines()}
    visible = {name for name in names if not name.startswith(".")}
    assert visible == {"pyproject.toml", "README.md", "LICENSE", "msmoe", "analysis", "scripts", "tests"}


@PER_DOCUMENT
def test_every_command_line_of_a_document_parses(document, tmp_path, monkeypatch):
    (tmp_path / "google" / "switch-base-8").mkdir(parents=True)  # a folder wins over a name on the hub
    monkeypatch.chdir(tmp_path)
    for _, name, *arguments in commands(bash_lines(document)):
        command = subcommand(name)
        assert command, name
        command.make_context(name, arguments)  # raises for an option that does not exist


@PER_DOCUMENT
def test_every_option_that_a_document_mentions_exists(document):
    comments = [line.partition("#")[2] for line in bash_lines(document) if line.startswith("msmoe")]
    spans = [span for span in re.findall(r"`([^`]+)`", prose(document)) if not re.search(r"accelerate|python", span)]
    mentioned = {option for part in (*comments, *spans) for option in re.findall(r"(?<![\w-])--[a-z][a-z-]+", part)}
    assert mentioned <= all_options()


def test_every_script_that_a_document_runs_exists():
    run = {
        name
        for document in DOCUMENTS
        for name in re.findall(r"(?:python|bash) (scripts/[\w/]+\.\w+)", text_of(document))
    }
    assert len(run) > 8
    assert all((ROOT / name).is_file() for name in run)


def test_every_file_in_the_packages_tree_exists():
    tree = next(block for block in blocks(ROOT / "msmoe" / "README.md", "") if block.startswith("msmoe/"))
    rows = re.findall(r"^  ([\w.]+/?) +(.+(?:\n {10,}.+)*)", tree, re.MULTILINE)
    assert len(rows) > 20
    for name, what in rows:
        folder = ROOT / "msmoe" / name
        assert folder.exists(), name
        beside = [folder, folder.parent]
        for file in re.findall(r"\b[\w/]+\.py\b", what):
            assert any((place / file).is_file() for place in beside if place.is_dir()), file


def test_every_folder_of_the_package_is_in_its_tree():
    tree = next(block for block in blocks(ROOT / "msmoe" / "README.md", "") if block.startswith("msmoe/"))
    folders = {file.parent.name for file in (ROOT / "msmoe").glob("*/__init__.py")}
    assert folders <= set(re.findall(r"^  (\w+)/", tree, re.MULTILINE))


@pytest.mark.parametrize("arguments", [["-m", "msmoe", "methods"], ["-m", "msmoe", "--version"]], ids=lambda a: a[-1])
def test_the_module_is_the_command(arguments, tmp_path):
    run = subprocess.run([sys.executable, *arguments], cwd=tmp_path, env=environment(tmp_path), capture_output=True)
    assert (run.returncode, run.stderr) == (0, b"")
    assert run.stdout


def test_the_line_for_the_shell_completes_commands(tmp_path):
    line = re.search(r'`(eval "\$\(_MSMOE_COMPLETE=bash_source msmoe\)")`', text_of(README))[1]
    script = f'{line}; COMP_WORDS=(msmoe eval); COMP_CWORD=1; _msmoe_completion msmoe; echo "${{COMPREPLY[@]}}"'
    path = {"PATH": f"{MSMOE.parent}:/usr/bin:/bin"}
    run = subprocess.run(["bash", "-c", script], env=environment(tmp_path) | path, capture_output=True, text=True)
    assert run.stdout.split() == ["evaluate"], run.stderr


# The commands under "Use", on a tiny checkpoint


@pytest.fixture(scope="module")
def tiny_run(records, tmp_path_factory):
    """The folder that the commands filled, and what each of them said; `inspect` ran as a process of its own."""
    base = tmp_path_factory.mktemp("readme")
    checkpoint = save_switch(base / "ckpt", d_ff=D_FF, num_experts=NUM_EXPERTS)
    (base / "work").mkdir()
    folder = working_folder(base / "work", checkpoint, records, records[:5])
    runs = []
    for line in use_commands():
        if line[1] == "inspect":
            command = [MSMOE, *line[1:]]
            run = subprocess.run(command, cwd=folder, env=environment(base), capture_output=True, text=True)
            runs.append((line, (run.returncode, run.stdout, run.stderr)))
        else:
            runs.append((line, run_here(folder, line)))
    return folder, runs


def printed(tiny_run, name: str) -> list[str]:
    return [out for line, (_, out, _) in tiny_run[1] if line[1] == name]


def test_the_readme_shows_every_command_but_the_demo():
    shown = [line[1] for line in use_commands()]
    assert shown == [
        "inspect", "convert", "profile", "plan", "apply", "factorize", "recover", "evaluate", "compress", "compress",
        "compare", "report", "methods", "families",
    ]  # fmt: skip


def test_every_command_of_the_readme_succeeds_without_a_word_on_stderr(tiny_run):
    assert [(line, code, err) for line, (code, _, err) in tiny_run[1]] == [(line, 0, "") for line, _ in tiny_run[1]]


def test_the_readmes_files_are_written_and_nothing_else(tiny_run):
    names = {file.name for file in tiny_run[0].iterdir()}
    checkpoints = {"switch-base-8", "switch-small", "switch-tiny", "switch-final", "in-one-go", "half"}
    files = {"stats", "plan.json", "results.json", "comparison", "report.html", "switch-final.training"}
    assert names - GIVEN == checkpoints | files


def test_the_readmes_checkpoint_keeps_two_experts_and_loads(tiny_run):
    layers = load(tiny_run[0] / "switch-small").config.moe_layers
    assert layers[LAYERS[0]] == NUM_EXPERTS  # kept
    assert sum(layers[name] for name in LAYERS[1:]) == 2 * 3


def test_compress_writes_what_profile_plan_and_apply_write(tiny_run):
    assert weight_files(tiny_run[0] / "in-one-go") == weight_files(tiny_run[0] / "switch-small")


def test_a_target_size_of_half_is_half_of_the_bytes_but_for_less_than_an_expert(tiny_run):
    half, whole = (size_of(tiny_run[0] / name) for name in ("half", "switch-base-8"))
    assert whole / 2 - EXPERT_BYTES < half <= whole / 2


def test_every_printed_table_names_the_layers_it_is_about(tiny_run):
    for out in [*printed(tiny_run, "inspect"), *printed(tiny_run, "profile"), *printed(tiny_run, "compress")]:
        assert all(layer in out for layer in LAYERS)
    for out in [*printed(tiny_run, "plan"), *printed(tiny_run, "apply")]:
        assert all(layer in out for layer in LAYERS[1:])


def test_the_example_in_python_runs_as_it_stands(switch, records, tmp_path):
    folder = working_folder(tmp_path, switch, records, records[:5])
    (folder / "switch-base-8").symlink_to(switch)
    code = blocks(README, "python")[0]
    assert code.startswith("import msmoe\n")
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "report.html").stat().st_size > 10_000
    assert weight_files(folder / "switch-final") != weight_files(folder / "switch-tiny")


def test_the_example_of_a_comparison_runs_as_it_stands(switch, records, tmp_path):
    folder = working_folder(tmp_path, switch, records, records[:5])
    (folder / "switch-base-8").symlink_to(switch)
    code = next(code for code in blocks(ROOT / "analysis" / "README.md", "python"))
    command = [sys.executable, "-c", code]
    run = subprocess.run(command, cwd=folder, env=environment(tmp_path), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert (folder / "comparison" / "results.json").is_file()
