"""How the package is cut: which file may import which, and what the README says of each."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from trl import SFTTrainer

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "hf_fedsa"
INSIDE = REPOSITORY / "tests" / "inside.py"
HEADING = "## How it is cut"

# Arrows that must not exist, and do: `(importer, imported)` -> why, and when it goes.
ARROWS_ALLOWED: dict[tuple[str, str], str] = {}
MOST_LINES = 500
LONG_FILES_ALLOWED = {
    "trainer.py": "what a Trainer's subclass has to override and what users call, with the docstrings of both",
}


# Imports


def module_files(package: Path) -> dict[str, Path]:
    """Every module's file by its name below the package, which is itself called `""`."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, modules: Iterable[str]) -> Iterator[tuple[bool, str]]:
    """
    What a module imports, also within functions and for type checkers: whether it is ours, and its name.

    Names of ours are those below the package; of what others have written only the library's name is told.
    """
    here = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            bases, names = [alias.name for alias in node.names], []
        elif isinstance(node, ast.ImportFrom):
            parts = [PACKAGE.name, *here.split(".")] if here else [PACKAGE.name]
            above = parts[: len(parts) - node.level + 1] if node.level else []
            bases, names = [".".join([*above, *filter(None, [node.module])])], [alias.name for alias in node.names]
        else:
            continue
        for base in bases:
            library, _, below = base.partition(".")
            if library != PACKAGE.name:
                yield False, library
                continue
            # `from .client import slots` imports a module, `from .client.slots import Slots` a name in one.
            candidates = [f"{below}.{name}".removeprefix(".") for name in names] or [below]
            yield from {(True, candidate if candidate in modules else below) for candidate in candidates}


def arrows_of(package: Path) -> set[tuple[str, bool, str]]:
    """`(importer, whether the imported is ours, imported)` for all modules of a package."""
    modules = module_files(package)
    return {(name, *found) for name, path in modules.items() for found in imports_of(name, path, modules)}


def is_in(module: str, *rooms: str) -> bool:
    """Whether a module is one of these, or in one of these folders."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


# The package itself, `""`, has all names of the trainers.
TRAINERS = ("", "trainer", "sft_trainer")
HEAVY_LIBRARIES = {"accelerate", "datasets", "flwr", "peft", "transformers", "trl"}


def fault_of(importer: str, is_ours: bool, imported: str) -> str | None:
    """Why an arrow must not exist, `None` if it may."""
    if not is_ours:
        wrong = is_in(importer, "server") and imported in HEAVY_LIBRARIES
        return "a server has no model and no data" if wrong else None
    of_trainers = imported in TRAINERS
    if is_in(importer, "server") and (of_trainers or is_in(imported, "client", "hub", "config")):
        return "a server knows no client, no Hub and no Trainer"
    if is_in(importer, "client") and (of_trainers or is_in(imported, "server", "transport", "hub")):
        return "a client knows no server, no transport, no Hub and no Trainer"
    if is_in(imported, "flower") and not is_in(importer, "flower"):
        return "Flower stands at the edge"
    if imported == "trainer" and importer not in TRAINERS:
        return "what the trainer is built of does not know it"
    return None


def entered(importer: str, imported: str) -> Iterator[str]:
    """Folders whose `__init__` runs because of an import from outside of them."""
    while imported := imported.rpartition(".")[0]:
        if not is_in(importer, imported):
            yield imported


def circles_in(arrows: Iterable[tuple[str, str]]) -> set[str]:
    """The shortest way from each module back to itself, as `a -> b -> a`."""
    targets: dict[str, list[str]] = {}
    for importer, imported in sorted(arrows):
        targets.setdefault(importer, []).append(imported)
    found = {}
    for start in targets:
        ways, seen = [[start]], set()
        while ways:
            way = ways.pop(0)
            for target in targets.get(way[-1], ()):
                if target == start:
                    found.setdefault(frozenset(way), " -> ".join(module or PACKAGE.name for module in [*way, start]))
                    ways = []
                    break
                if target not in seen:
                    seen.add(target)
                    ways.append([*way, target])
    return set(found.values())


def faults_of(package: Path, allowed: Iterable[tuple[str, str]] = ()) -> list[str]:
    """All that is wrong with a package's imports, but for the arrows allowed, and these if they are not there."""
    arrows = arrows_of(package)
    faults = {(a, b): fault for a, is_ours, b in arrows if (fault := fault_of(a, is_ours, b))}
    told = [f"{a} imports {b or package.name}: {fault}" for (a, b), fault in faults.items() if (a, b) not in allowed]
    told += [f"{a} does not import {b}, or may: remove the exception" for a, b in set(allowed) - faults.keys()]
    ours = {(a, b) for a, is_ours, b in arrows if is_ours and (a, b) not in allowed}
    circles = circles_in(ours | {(a, folder) for a, b in ours for folder in entered(a, b)})
    return sorted([*told, *(f"circle: {circle}" for circle in circles)])


def test_imports_run_one_way():
    faults = faults_of(PACKAGE, ARROWS_ALLOWED)
    assert not faults, "\n".join(faults)


def make_package(folder: Path, files: Mapping[str, str]) -> Path:
    for name, source in {"__init__.py": "", **files}.items():
        path = folder / "hf_fedsa" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return folder / "hf_fedsa"


@pytest.mark.parametrize(
    "name, source, fault",
    [
        ("server/sum.py", "from ..client.store import Store", "server.sum imports client.store"),
        ("server/sum.py", "from ..client import store", "server.sum imports client.store"),
        ("server/sum.py", "from .. import client", "server.sum imports client"),
        ("server/sum.py", "import hf_fedsa.client.store as s", "server.sum imports client.store"),
        ("server/sum.py", "from hf_fedsa.client.store import Store", "server.sum imports client.store"),
        ("server/sum.py", "from ..hub.push import push", "server.sum imports hub.push"),
        ("server/sum.py", "from ..sft_trainer import T", "server.sum imports sft_trainer"),
        ("server/sum.py", "from .. import FederatedTrainer", "server.sum imports hf_fedsa"),
        ("server/sum.py", "from ..config import Config", "server.sum imports config"),
        ("server/sum.py", "def f():\n    import torch, peft.tuners", "server.sum imports peft"),
        ("server/sum.py", "if TYPE_CHECKING:\n    import transformers", "server.sum imports transformers"),
        ("server/__init__.py", "from ..client import store", "server imports client.store"),
        *(
            ("server/sum.py", f"from {name}.x import y", f"server.sum imports {name}")
            for name in sorted(HEAVY_LIBRARIES)
        ),
        ("client/store.py", "from ..server.sum import total", "client.store imports server.sum"),
        ("client/store.py", "def f():\n    from .. import transport", "client.store imports transport"),
        ("client/store.py", "from ..hub import push", "client.store imports hub.push"),
        ("client/store.py", "from ..trainer import T", "client.store imports trainer"),
        ("config.py", "from .flower import app", "config imports flower.app"),
        ("config.py", "from .trainer import T", "config imports trainer"),
        ("flower/__init__.py", "from ..trainer import T", "flower imports trainer"),
    ],
)
def test_an_arrow_that_must_not_exist_is_told(tmp_path, name, source, fault):
    names = ("client/__init__", "client/store", "hub/__init__", "hub/push", "server/sum", "flower/app", "transport")
    files = {f"{module}.py": "" for module in (*names, "config", "trainer", "sft_trainer")}
    package = make_package(tmp_path, files)
    assert faults_of(package) == []
    make_package(tmp_path, {**files, name: source})
    assert [text.partition(":")[0] for text in faults_of(package)] == [fault]
    arrow = tuple(fault.replace("hf_fedsa", "").split(" imports "))
    assert faults_of(package, [arrow]) == []


def test_arrows_that_may_exist_are_not_told(tmp_path):
    files = {
        "__init__.py": "from .trainer import T\nfrom .sft_trainer import S",
        "trainer.py": "import trl\nfrom .server.sum import total\nfrom .client.slots import load\nfrom . import hub",
        "sft_trainer.py": "from .trainer import T",
        "server/__init__.py": "",
        "server/sum.py": "import torch\nfrom ..tensors import clone",
        "client/slots.py": "import peft\nfrom .store import get\nfrom ..tensors import clone\nfrom ..config import C",
        "client/store.py": "from ..tensors import clone",
        "flower/app.py": "from .worker import run\nfrom ..transport import T",
        "flower/worker.py": "import flwr",
        **dict.fromkeys(("hub.py", "tensors.py", "config.py", "transport.py"), ""),
    }
    assert faults_of(make_package(tmp_path, files)) == []


def test_an_exception_that_is_no_longer_needed_is_told(tmp_path):
    package = make_package(tmp_path, {"server/sum.py": "from .. import tensors", "tensors.py": ""})
    for imported in ("client.store", "tensors"):
        (fault,) = faults_of(package, [("server.sum", imported)])
        assert fault == f"server.sum does not import {imported}, or may: remove the exception"


def test_a_circle_is_told(tmp_path):
    files = {
        "a.py": "from .b import x",
        "b.py": "def f():\n    from . import c",
        "c/__init__.py": "from .. import a",
    }
    package = make_package(tmp_path, files)
    assert faults_of(package) == ["circle: a -> b -> c -> a"]
    assert faults_of(make_package(tmp_path, {**files, "b.py": ""})) == []


def test_a_circle_through_a_folder_is_told(tmp_path):
    files = {
        "a.py": "from .c.d import x",
        "c/__init__.py": "from .e import y",
        "c/d.py": "",
        "c/e.py": "from .. import a",
    }
    package = make_package(tmp_path, files)
    assert faults_of(package) == ["circle: a -> c -> c.e -> a"]
    assert faults_of(make_package(tmp_path, {**files, "c/__init__.py": "from .d import x"})) == []
    files = {"__init__.py": "from .a import x", "a.py": "from . import __version__"}
    assert faults_of(make_package(tmp_path / "root", files)) == ["circle: hf_fedsa -> a -> hf_fedsa"]


# The files


def responsibility_of(path: Path) -> str:
    """The first line of a file, without its quotes."""
    text = path.read_text(encoding="utf-8")
    lines = (ast.get_docstring(ast.parse(text), clean=False) or "").split("\n")
    assert lines[0] and text.startswith(f'"""{lines[0]}'), f"{path} must begin with its one responsibility, in quotes."
    assert lines[0].endswith(".") and lines[1:2] in ([], [""]), f"The first line of {path} must be a whole sentence."
    return lines[0]


def tree_of(package: Path) -> str:
    """The package as the README shows it: folders as headings, and every file with its responsibility."""
    entries = [(f"{package.name}/", responsibility_of(package / "__init__.py"))]

    def add(folder: Path, indent: str) -> None:
        for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name)):
            if path.is_dir() and list(path.rglob("*.py")):
                entries.append((f"{indent}{path.name}/", responsibility_of(path / "__init__.py")))
                add(path, indent + "  ")
            elif path.suffix == ".py" and path.name != "__init__.py":
                entries.append((indent + path.name, responsibility_of(path)))

    add(package, "  ")
    width = max(len(name) for name, _ in entries)
    return "".join(f"{name:{width}}  {text}\n" for name, text in entries)


def tree_in(readme: str) -> str:
    _, _, section = readme.partition(f"\n{HEADING}\n")
    found = re.search(r"^```(?:text)?\n(.*?)^```$", section.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    return found[1] if found else ""


def test_the_readme_names_every_file_and_its_responsibility():
    tree, shown = tree_of(PACKAGE), tree_in((REPOSITORY / "README.md").read_text(encoding="utf-8"))
    if tree != shown:
        sys.stdout.write(tree)
    assert tree == shown, f"Put what this test writes, from `{PACKAGE.name}/` on, under `{HEADING}` in README.md."


def test_a_readme_that_is_behind_differs(tmp_path):
    package = make_package(tmp_path, {"__init__.py": '"""All."""', "a.py": '"""One."""', "c/b.py": '"""Two."""'})
    (package / "c" / "__init__.py").write_text('"""More.\n\nThan one line."""')
    tree = tree_of(package)
    assert tree == "hf_fedsa/  All.\n  c/       More.\n    b.py   Two.\n  a.py     One.\n"
    assert tree_in(f"# X\n\n{HEADING}\n\nText.\n\n```\n{tree}```\n\n## Next\n") == tree
    assert tree_in(f"# X\n\n{HEADING}\n\nText.\n\n## Next\n\n```\n{tree}```\n") == ""
    (package / "a.py").write_text('"""Another."""')
    assert tree_of(package) != tree
    for text in ('"""\nOne.\n"""', "import os", '# One.\n"""One."""', '"""One"""', '"""One,\nand two."""'):
        (package / "a.py").write_text(text)
        with pytest.raises(AssertionError, match="a.py must b"):
            tree_of(package)


def too_long(package: Path, allowed: Iterable[str]) -> list[str]:
    """Files of more lines than they may have, and exceptions that are not needed."""
    lines = {
        str(path.relative_to(package)): len(path.read_text(encoding="utf-8").splitlines())
        for path in module_files(package).values()
    }
    long = {name for name, count in lines.items() if count > MOST_LINES}
    told = [f"{name} has {lines[name]} lines, more than {MOST_LINES}: divide it" for name in sorted(long - {*allowed})]
    return told + [f"{name} is not too long: remove the exception" for name in sorted({*allowed} - long)]


def test_no_file_is_too_long():
    assert too_long(PACKAGE, LONG_FILES_ALLOWED) == []


def test_a_file_that_is_too_long_is_told(tmp_path):
    package = make_package(tmp_path, {"a.py": "x = 1\n" * MOST_LINES, "b/c.py": "x = 1\n" * (MOST_LINES + 1)})
    assert too_long(package, []) == [f"b/c.py has {MOST_LINES + 1} lines, more than {MOST_LINES}: divide it"]
    assert too_long(package, ["b/c.py"]) == []
    assert too_long(package, ["b/c.py", "a.py"]) == ["a.py is not too long: remove the exception"]


# What an import loads


@pytest.mark.parametrize("name", ["hf_fedsa", "hf_fedsa.server"])
def test_an_import_loads_no_model_library(name):
    command = f"import sys, {name}; print(*sorted({{'transformers', 'peft', 'trl', 'datasets'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", command], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


# The tests


def private_names(package: Path) -> set[str]:
    """Names with an underscore that a package gives to what it defines, and that are not upstream's as well."""
    names = set()
    for path in module_files(package).values():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                names.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                names.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names |= {node.attr} if isinstance(node.value, ast.Name) and node.value.id == "self" else set()
    return {name for name in names if re.match(r"_[A-Za-z]", name)} - {*dir(SFTTrainer), *dir(BaseTunerLayer)}


def private_uses(source: str, names: set[str]) -> list[str]:
    """Attributes, imports, and strings given to a function such as `setattr`, that are among these names."""
    used = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            found = [node.attr]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hf_fedsa"):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            values = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found = [value.rpartition(".")[2] for value in values]
        else:
            continue
        used += [f"line {node.lineno}: {name}" for name in found if name in names]
    return used


def test_tests_look_inside_through_one_file():
    names = private_names(PACKAGE)
    # The stand-in for the Hub has nothing of the package, and private names of its own.
    for path in sorted({*(REPOSITORY / "tests").glob("*.py")} - {INSIDE, INSIDE.with_name("hub_server.py")}):
        used = private_uses(path.read_text(encoding="utf-8"), names)
        assert not used, f"{path.name} uses private names of hf_fedsa, let it ask tests/inside.py: {used}"


def test_a_look_inside_is_told(tmp_path):
    method = "    def _m(self):\n        self._a = other._b = 1\n"
    source = f"_x = 1\n_K = 2\ndef _f(): pass\nclass _C:\n    _d: int\n{method}"
    names = private_names(make_package(tmp_path, {"a/b.py": source}))
    assert names == {"_x", "_K", "_f", "_C", "_d", "_m", "_a"}
    for use in (
        "trainer._a",
        "trainer.x._m()",
        "from hf_fedsa.a import _C",
        "monkeypatch.setattr(b, '_x', 1)",
        "getattr(trainer, '_a')",
        "monkeypatch.setattr('hf_fedsa.a.b._f', 1)",
    ):
        assert len(private_uses(use, names)) == 1, use
    assert private_uses("trainer._b\ntrainer.a\n'_a'\nself.m('_b')", names) == []
