"""
The rules of the house that a program can check: width, length, imports that point one way, and
pages that name only what is there.
"""

import ast
import graphlib
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from helpers import HERE

import train
from assessment.__main__ import COMMANDS
from assessment.runs import PICTURE

SCRIPTS = ["model", "train", "sample", "prepare_data"]
PACKAGES = {"torch", "numpy", "tiktoken", "requests"}   # all that is needed at run time
PAGES = [HERE / "README.md", HERE / "assessment" / "README.md"]
PAGES += sorted(HERE.glob("docs/*.md")) + sorted(HERE.glob("lessons/*.md"))

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(HERE)))


def read(path):
    return path.read_text(encoding="utf-8")


def files_of_the_project():
    """What git tracks, and what it would if it were asked to; nothing that .gitignore names."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=HERE, capture_output=True, encoding="utf-8")
    if listed.returncode != 0:
        pytest.skip(f"git cannot list the files: {listed.stderr.strip()}")
    paths = [HERE / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


# ------------------------------------------------------------------------------------------------
# Width and length

def test_no_line_of_code_is_wider_than_100_columns():
    files = [path for path in files_of_the_project() if path.suffix == ".py"]
    assert HERE / "model.py" in files
    too_wide = []
    for path in files:
        for number, line in enumerate(read(path).splitlines(), 1):
            if len(line) > 100:
                too_wide.append(f"{path.relative_to(HERE)}:{number}")
    assert not too_wide


@pytest.mark.parametrize("script", ["model", "train"])
def test_no_function_is_longer_than_45_lines(script):
    functions = [node for node in ast.walk(ast.parse(read(HERE / f"{script}.py")))
                 if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    assert len(functions) > 10
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert not {name: n for name, n in lines.items() if n > 45}


def test_readme_has_at_most_1200_words():
    assert 300 < len(read(HERE / "README.md").split()) <= 1200


# ------------------------------------------------------------------------------------------------
# Imports

def file_of(module):
    """The file of a module of ours, or None: "plumbing.files" -> plumbing/files.py"""
    path = HERE.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    return None


def modules_in(folder):
    return [f"{folder}.{path.stem}" for path in sorted((HERE / folder).glob("*.py"))]


def imports(tree):
    """The names of all modules imported in a tree of code, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def our_imports(module):
    """The modules of ours that a module of ours imports."""
    return {name for name in imports(ast.parse(read(file_of(module)))) if file_of(name)}


def without_loading_and_saving(tree):
    """The tree of model.py without from_pretrained and save_pretrained."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            node.body = [part for part in node.body
                         if getattr(part, "name", "") not in ("from_pretrained", "save_pretrained")]
    return tree


def test_model_imports_torch_alone_except_to_load_and_save():
    tree = ast.parse(read(HERE / "model.py"))
    loading = {name for name in imports(tree) if file_of(name)}
    assert "plumbing.huggingface" in loading
    assert loading <= {"plumbing.huggingface", "plumbing.conversion"}
    packages = {name.split(".")[0] for name in imports(without_loading_and_saving(tree))}
    assert packages - sys.stdlib_module_names == {"torch"}


def test_imports_make_no_circle():
    modules = SCRIPTS + modules_in("plumbing") + modules_in("assessment")
    arrows = {module: our_imports(module) - {module} for module in modules}
    assert len(modules) > 20
    graphlib.TopologicalSorter(arrows).prepare()   # raises CycleError, which names the circle


def test_plumbing_imports_plumbing_alone():
    for module in modules_in("plumbing"):
        outside = {name for name in our_imports(module) if not name.startswith("plumbing")}
        assert not outside, module


def test_train_and_sample_import_no_script_but_model_and_prepare_data():
    assert our_imports("train") & set(SCRIPTS) <= {"model", "prepare_data"}
    assert our_imports("sample") & set(SCRIPTS) <= {"model"}
    assert not our_imports("prepare_data") & set(SCRIPTS)


def test_config_files_import_nothing_of_ours():
    files = list(HERE.glob("config/*.py"))
    assert len(files) > 5
    for path in files:
        ours = [name for name in imports(ast.parse(read(path))) if file_of(name)]
        assert not ours, path.name


def test_run_time_needs_four_packages():
    imported = set()
    for module in SCRIPTS + modules_in("plumbing"):
        imported |= {name.split(".")[0] for name in imports(ast.parse(read(file_of(module))))}
    ours = {name for name in imported if file_of(name)}
    assert imported - sys.stdlib_module_names - ours == PACKAGES

    required = re.findall(r"^[\w-]+", read(HERE / "requirements.txt"), re.MULTILINE)
    assert set(required) == PACKAGES


USE_OF_MODEL = """
import torch
from model import GPT, GPTConfig
config = GPTConfig(block_size=16, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
idx = torch.arange(8)[None]
logits, loss = GPT(config)(idx, idx)
print(tuple(logits.shape))
"""


def test_model_runs_alone_in_an_empty_folder(tmp_path):
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(HERE / "model.py", folder)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", USE_OF_MODEL], cwd=folder, env=environment,
                          capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 8, 50)"


# ------------------------------------------------------------------------------------------------
# The pages

FOLDERS = r"(?:config|plumbing|tests|assessment|docs|lessons|\.ci|\.github)"
PATH_IN_A_FOLDER = re.compile(rf"(?<![\w/.-]){FOLDERS}/[\w./-]*\w")
NAME_OF_A_FILE = re.compile(r"(?<![\w/.-])[\w-]+\.(?:py|md|png)\b")
LINK = re.compile(r"\]\(([^)\s]+)\)")
SCRIPT_OF_A_COMMAND = re.compile(r"python3? ([\w./-]+\.py)")
COMMAND_OF_THE_ASSESSMENT = re.compile(r"python3? -m assessment (\w+)")


def anchors(page):
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", read(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-") for text in headings}


def test_the_pages_are_all_there():
    assert all(page.is_file() for page in PAGES)
    assert len(PAGES) > 5


@each_page
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(read(page)):
        if re.match(r"https?://|mailto:", link):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if anchor and target.suffix == ".md":   # links to lines of code: test_lessons.py
            assert anchor in anchors(target), link


@each_page
def test_every_path_named_exists(page):
    names = {path.name for path in files_of_the_project()}
    found = PATH_IN_A_FOLDER.findall(read(page))
    for path in set(found) - {"lessons/answers"}:   # made when it is needed
        assert (HERE / path).exists() or (page.parent / path).exists(), path
    for name in NAME_OF_A_FILE.findall(read(page)):
        readers_own = name.startswith("my_") or name == PICTURE
        assert name in names or readers_own, name


@each_page
def test_every_command_starts_something_that_exists(page):
    for script in SCRIPT_OF_A_COMMAND.findall(read(page)):
        assert (HERE / script).is_file(), script
    for command in COMMAND_OF_THE_ASSESSMENT.findall(read(page)):
        assert command in COMMANDS, command


def commands(page):
    """The words of every command on a page, in a block or between backticks."""
    text = read(page)
    lines = re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    for block in re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        lines += block.replace("\\\n", " ").splitlines()
    for line in lines:
        for command in line.split("&&"):
            if re.match(r" *(python|torchrun) ", command):
                yield shlex.split(command, comments=True)


def training_flags(page):
    """What follows train.py in the commands of a page that a reader could type as they are."""
    for words in commands(page):
        to_be_filled_in = any(word == "..." or word.startswith("my_") for word in words)
        if "train.py" in words and not to_be_filled_in:
            yield words[words.index("train.py") + 1:]


def test_every_training_command_of_the_pages_is_accepted(monkeypatch):
    monkeypatch.chdir(HERE)
    found = [(page, argv) for page in PAGES for argv in training_flags(page)]
    assert len(found) > 10
    for page, argv in found:
        if "--help" in argv:
            continue
        try:
            train.load_config(argv)
        except ValueError as e:
            pytest.fail(f"{page.relative_to(HERE)}: train.py {' '.join(argv)}: {e}")
