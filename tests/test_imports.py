"""Imports point one way, importing is free, and every module has its test file.

Packages: ``igpt_kernels <- igpt <- benchmarks <- tools <- tests``. Inside `igpt` the sub-packages have an order of their own.
Imports inside functions count as well: a late import still ties two modules together.
"""

from __future__ import annotations

import ast
import functools
import graphlib
import subprocess
import sys
import textwrap
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("igpt_kernels", "igpt", "benchmarks", "tools")
"""Each may import those before it."""
LAYERS = (
    ("errors", "files", "console", "checks", "machine"),
    ("plots", "kernels", "palette"),
    ("model",),
    ("data", "generation"),
    ("training",),
    ("evaluation",),
    ("commands",),
)
"""Modules and sub-packages of `igpt`: each may import those of its own and of the layers before it, in any order that has no
cycle."""
BY_NAME = {"benchmarks.plans": "benchmarks.cases.", "igpt.commands.main": "igpt.commands."}
"""Modules that import others by a name put together at run time, and how those names begin."""
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
SOURCES = [path for name, path in MODULES.items() if name.startswith("igpt")]

# Modules without a test file of their own -> where they are tested. A key that ends in a dot stands for a sub-package.
TESTED_BY = {
    "igpt_kernels._triton.": "tests/interpreter/, tests/gpu/",
    "igpt_kernels._torch.": "tests/igpt_kernels/_ops/, tests/igpt_kernels/",
    "igpt_kernels._ops.decode": "tests/igpt_kernels/_ops/test_attention.py",
    "igpt_kernels._ops.sparse": "tests/igpt_kernels/test_sparse.py",
    "igpt_kernels._ops.norm": "tests/igpt_kernels/test_norm.py",
    "igpt_kernels._ops.activation": "tests/igpt_kernels/test_activation.py",
    "igpt_kernels._ops.shared": "tests/igpt_kernels/_ops/test_attention.py",
    "igpt_kernels.block_lists": "tests/igpt_kernels/test_layouts.py",
    "igpt_kernels.patterns": "tests/igpt_kernels/test_layouts.py",
    "igpt_kernels.memory": "tests/igpt_kernels/test_attention.py",
    "igpt_kernels.self_check_cases": "tests/igpt_kernels/test_self_check.py, tests/gpu/test_self_check.py",
    "igpt_kernels.reference": "tests/igpt_kernels/test_attention.py, test_loss.py, test_norm.py, test_activation.py",
    "igpt_kernels.tensors": "tests/igpt_kernels/_ops/test_attention.py, tests/igpt_kernels/test_attention.py",
    "igpt.errors": "tests/igpt/commands/test_main.py",
    "igpt.machine": "tests/igpt/commands/test_main.py",
    "igpt.kernels.state": "tests/igpt/kernels/test_use.py",
    "igpt.plots.page": "tests/igpt/commands/test_demo.py",
    "igpt.model.config": "tests/igpt/test_checks.py, tests/igpt/model/test_image_gpt.py",
    "igpt.data.array": "tests/igpt/data/test_digits.py, test_batches.py",
    "igpt.data.source": "tests/igpt/data/test_digits.py, test_folder.py",
    "igpt.training.options": "tests/igpt/test_checks.py, tests/igpt/training/test_pretrain.py",
    "igpt.evaluation.features": "tests/igpt/evaluation/test_probe.py",
    "igpt.commands.": "tests/igpt/commands/test_main.py, and the test file of the module each command runs",
    "benchmarks.cases.": "tests/benchmarks/test_registry.py",
    "benchmarks.plans": "tests/benchmarks/test_registry.py",
    "benchmarks.__main__": "tests/benchmarks/measure/test_run.py",
    "benchmarks.bench_all": "tests/benchmarks/test_registry.py",
    "benchmarks.measure.machine": "tests/benchmarks/measure/test_run.py",
    "benchmarks.measure.timing": "tests/benchmarks/measure/test_run.py",
    "benchmarks.report.": "tests/benchmarks/report/test_report.py",
    "tools.audit_cuda": "tests/csrc/test_palette.py",
    "tools.kernel_plan": "tests/tools/test_gpu.py",
    "tools.kernels": "tests/interpreter/test_catalogue.py",
    "tools.tune": "tests/interpreter/test_catalogue.py",
    "tools.sanitize": "tests/tools/test_gpu.py",
}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of the code; relative imports are not used here."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def type_only(path: Path) -> set[str]:
    """What a file imports for annotations alone, under ``if TYPE_CHECKING:``, or late in an ``__init__`` by its table."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for inner in node.body:
                if isinstance(inner, ast.ImportFrom):
                    names |= {inner.module or ""} | {f"{inner.module}.{alias.name}" for alias in inner.names}
    return names


@functools.cache
def graph() -> dict[str, frozenset[str]]:
    """Every module, and the modules of ours that it imports to run: early, late, or by the name in a table of strings."""
    found = {}
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name in ("igpt", "igpt_kernels"):
            found[name] = frozenset()  # names that load on first use: no module is imported by importing the package
            continue
        wanted = (imported(path) - type_only(path)) & set(MODULES)
        strings = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Constant)]
        for node in strings:
            if isinstance(node.value, str) and ":" in node.value and node.value.partition(":")[0] in MODULES:
                wanted.add(node.value.partition(":")[0])  # "module:function"
        if name in BY_NAME:
            wanted |= {other for other in MODULES if other.startswith(BY_NAME[name]) and other != name}
        found[name] = frozenset(wanted - {"igpt", "igpt_kernels", "benchmarks", "tools"} - {name.rpartition(".")[0], name})
    return found


def layer(name: str) -> int | None:
    """The layer of a module of `igpt`; None for ``igpt`` and ``igpt.__main__``, which start the commands."""
    part = name.split(".")[1] if "." in name else "__main__"
    return next((number for number, parts in enumerate(LAYERS) if part in parts), None)


def refused(name: str, names: set[str]) -> set[str]:
    """Of what a module imports: packages after its own, pickles, and the parser of the command line outside of its module."""
    never = {
        *PACKAGES[PACKAGES.index(name.partition(".")[0]) + 1 :],
        "tests",
        "pickle",
        "dill",
        "cloudpickle",
        "shelve",
        "marshal",
    }
    if name != "igpt.commands.main":
        never.add("tyro")
    return {other for other in names if other.partition(".")[0] in never}


def upward(name: str, names: Iterable[str]) -> set[str]:
    """Of what a module of `igpt` imports: modules of layers after its own."""
    mine = layer(name)
    assert mine is not None
    return {other for other in names if other.startswith("igpt.") and (layer(other) or 0) > mine}


@pytest.mark.parametrize("name", MODULES)
def test_packages_import_those_before_them(name: str) -> None:
    assert not refused(name, imported(MODULES[name]))


@pytest.mark.parametrize("name", [name for name in MODULES if name.startswith("igpt.")])
def test_sub_packages_import_those_before_them(name: str) -> None:
    if layer(name) is None:
        assert name == "igpt.__main__"
        return
    assert not upward(name, graph()[name])
    # Commands have the terminal, the output files and the wording to themselves.
    assert name.startswith("igpt.commands") or not {other for other in imported(MODULES[name]) if ".commands" in other}


def test_imports_that_point_the_other_way_are_seen(tmp_path: Path) -> None:
    names = {"igpt_kernels.norm", "igpt.files", "benchmarks.plans", "tools.gpu", "tests.kit", "tyro.conf", "pickle", "torch"}
    after = ["igpt.files", "benchmarks.plans", "tools.gpu"]
    for number, package in enumerate(PACKAGES):
        assert refused(f"{package}.x", names) == {*after[number:], "tests.kit", "tyro.conf", "pickle"}
    assert refused("igpt.commands.main", names) == {*after[1:], "tests.kit", "pickle"}
    first, *_, last = [f"igpt.{parts[0]}.x" for parts in LAYERS]
    for number, parts in enumerate(LAYERS):
        everything = [f"igpt.{part}.x" for layer in LAYERS for part in layer]
        assert upward(f"igpt.{parts[0]}", everything) == {f"igpt.{part}.x" for layer in LAYERS[number + 1 :] for part in layer}
    assert (upward(first, [last]), upward(last, [first])) == ({last}, set())
    code = "import a.b\ndef f():\n    from c import d\nif TYPE_CHECKING:\n    from e import f\n"
    (tmp_path / "x.py").write_text(code)
    assert imported(tmp_path / "x.py") == {"a.b", "c", "c.d", "e", "e.f"}
    assert type_only(tmp_path / "x.py") == {"e", "e.f"}
    (tmp_path / "x.py").write_text("from . import x")
    with pytest.raises(AssertionError, match="imports relatively"):
        imported(tmp_path / "x.py")


def test_no_import_cycle() -> None:
    modules = {name: set(others) for name, others in graph().items()}
    assert "benchmarks.cases.attention" in modules["benchmarks.plans"]
    assert "igpt_kernels._native.load" in modules["igpt_kernels.backends"], "late imports count"
    tuple(graphlib.TopologicalSorter(modules).static_order())
    modules["igpt.errors"].add("igpt.commands.main")
    with pytest.raises(graphlib.CycleError):
        tuple(graphlib.TopologicalSorter(modules).static_order())


def test_every_module_has_its_test_file() -> None:
    """``package/part/module.py`` is tested by ``tests/package/part/test_module.py``, or listed with what tests it."""
    used = set()
    for name, path in MODULES.items():
        if path.name in ("__init__.py", "__main__.py") and name not in TESTED_BY:
            continue
        own = ROOT / "tests" / path.relative_to(ROOT).parent / f"test_{path.stem}.py"
        keys = [key for key in TESTED_BY if name == key or (key.endswith(".") and name.startswith(key))]
        assert own.exists() or keys, f"{name} has no {own.relative_to(ROOT)}"
        used |= set(keys) if not own.exists() else {key for key in keys if key.endswith(".")}
    assert used == set(TESTED_BY), "listed, but has a test file of its own or is gone"
    for places in TESTED_BY.values():
        folder = ""
        for place in places.split(", "):
            if place.startswith("tests/"):
                assert (ROOT / place).exists(), place
                folder = place.rpartition("/")[0]
            elif place.startswith("test_"):
                assert (ROOT / folder / place).exists(), place


def test_every_test_file_has_its_module() -> None:
    """A test file is named for a module, a kernel's file or a helper of the tests, or stands for the whole project."""
    whole = {"test_docs", "test_imports", "test_commits", "test_words"}
    for subject in SUBJECTS:
        assert (ROOT / subject).exists(), f"{subject} is listed, but gone"
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.relative_to(ROOT / "tests").parent
        stem = path.stem.removeprefix("test_")
        if str(folder) == ".":
            assert path.stem in whole or (ROOT / "tests" / f"{stem}.py").exists(), path
        elif folder.parts[0] in PACKAGES:
            own = (ROOT / folder / f"{stem}.py").exists() or (ROOT / folder / stem).is_dir()
            assert own or (str(path.relative_to(ROOT))) in SUBJECTS, path


SUBJECTS = {
    "tests/igpt_kernels/test_sparse.py": "block_sparse_attention, which has no module of its own",
    "tests/igpt_kernels/test_transforms.py": "every operation under transforms of torch",
    "tests/igpt_kernels/test_views.py": "every operation on views",
    "tests/igpt_kernels/_triton/test_interpreter.py": "starts tests/interpreter",
    "tests/igpt/kernels/test_huggingface_classes.py": "use_kernels on subclasses and patched classes of transformers",
    "tests/igpt/kernels/test_huggingface_masks.py": "use_kernels on models of transformers, padded and with caches",
    "tests/igpt/kernels/test_huggingface_swaps.py": "use_kernels on models of transformers",
    "tests/igpt/model/test_copies.py": "copies, pickles and processes of models and palettes",
    "tests/igpt/model/test_transforms.py": "torch.func, tracers, compilers and subclasses of Tensor on models",
    "tests/igpt/commands/test_hostile.py": "options, names and outputs of all commands",
    "tests/igpt/kernels/test_huggingface_weights.py": "use_kernels on models of transformers with other weights",
    "tests/igpt/training/test_resume.py": "pretrain, continued",
    "tests/igpt/training/test_hostile.py": "run folders that someone spoiled, moved or removed",
    "tests/benchmarks/report/test_report.py": "all of benchmarks/report",
}
"""Test files that stand for a subject instead of a module."""


def unpickling(code: str) -> list[str]:
    """The calls that may unpickle."""
    found = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = [ast.unparse(keyword.value) for keyword in node.keywords if keyword.arg == "allow_pickle"]
            if ast.unparse(node.func) in ("torch.load", "joblib.load") or said not in ([], ["False"]):
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    assert not unpickling(path.read_text(encoding="utf-8"))


def test_unpickling_is_seen() -> None:
    bad = ["torch.load(x)", "joblib.load(x)", "np.load(x, allow_pickle=True)", "np.load(x, allow_pickle=allowed)"]
    assert [unpickling(f"def f():\n    return {one}") for one in bad] == [[one] for one in bad]
    assert not unpickling("np.load(x)\nnp.load(x, allow_pickle=False)\nsafetensors.torch.load_file(x)")


def test_every_module_is_imported_somewhere() -> None:
    """A module that nothing imports, and that no command or table names, is dead code."""
    reached: set[str] = set().union(*graph().values())
    reached |= set().union(*(imported(path) for path in (ROOT / "tests").rglob("*.py")))
    exports = "".join(path.read_text(encoding="utf-8") for path in SOURCES if path.name == "__init__.py")
    for name, path in MODULES.items():
        if path.name in ("__init__.py", "__main__.py") or name in reached or name.startswith(("tools.", "benchmarks.")):
            continue
        assert f'"{name}"' in exports or f'"{name.rpartition(".")[2]}"' in exports, f"{name} has no importer"


def run(code: str) -> str:
    """Run code in a fresh interpreter at the root; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_packages_imports_almost_nothing() -> None:
    heavy = "torch numpy triton sklearn scipy matplotlib PIL transformers huggingface_hub safetensors tyro"
    for package in ("igpt", "igpt_kernels", "igpt.model.config", "igpt.commands.main"):
        allowed = {"tyro"} if package == "igpt.commands.main" else set()
        loaded = run(f"import sys, {package}; print(*[name for name in '{heavy}'.split() if name in sys.modules])").split()
        assert set(loaded) <= allowed, package


def test_everything_imports_without_extras_triton_or_extension() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    modules = [name for name in modules if not name.startswith("igpt_kernels._triton.")]  # launched from there, late
    modules.remove("igpt.__main__")  # runs the command line
    out = run(
        f"""
        import importlib, importlib.machinery
        BLOCKED = {{"triton", "sklearn", "scipy", "matplotlib", "transformers", "huggingface_hub", "tensorboard"}}
        find = importlib.machinery.PathFinder.find_spec

        def find_spec(name, path=None, target=None):
            return None if name.partition(".")[0] in BLOCKED else find(name, path, target)

        importlib.machinery.PathFinder.find_spec = find_spec
        import torch
        torch.ops.load_library = lambda path: (_ for _ in ()).throw(OSError("no extension today"))
        for name in {modules!r}:
            importlib.import_module(name)
        import igpt
        from igpt_kernels._native import load
        assert not load.status().loaded
        tokens = torch.zeros(1, 64, dtype=torch.int64)
        with igpt.use_kernels():
            igpt.ImageGPT(igpt.preset("tiny", height=8, width=8, vocab_size=16))(tokens)
        print("fine")
        """
    )
    assert out.endswith("fine")


def test_public_names_exist() -> None:
    import igpt
    import igpt_kernels

    for package in (igpt, igpt_kernels):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            package.no_such_name  # noqa: B018
