"""Imports point one way, and importing is free: csrc -> igpt_kernels -> igpt -> igpt.cli."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(path for package in ("igpt", "igpt_kernels") for path in (ROOT / package).rglob("*.py"))


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


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    names = imported(path)
    if path.is_relative_to(ROOT / "igpt_kernels"):
        assert not {name for name in names if name.partition(".")[0] == "igpt"}
    assert not {name for name in names if name.partition(".")[0] in ("benchmarks", "tests")}
    if path != ROOT / "igpt" / "cli.py":
        assert not {name for name in names if name.startswith(("igpt.cli", "tyro"))}
    assert not {name for name in names if name.partition(".")[0] in ("pickle", "dill", "cloudpickle", "shelve", "marshal")}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert ast.unparse(node.func) not in ("torch.load", "joblib.load"), f"{path}:{node.lineno}"
            for keyword in node.keywords:
                value = keyword.value
                assert keyword.arg != "allow_pickle" or (isinstance(value, ast.Constant) and value.value is False)


def test_no_room_without_a_door() -> None:
    """A module that nothing imports, and no command names, is a dead room."""
    cli = (ROOT / "igpt" / "cli.py").read_text(encoding="utf-8")
    outside = [path for folder in ("benchmarks", "tests") for path in (ROOT / folder).rglob("*.py")]
    reached = set().union(*(imported(path) for path in [*SOURCES, *outside]))
    for path in SOURCES:
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        if path.name == "__init__.py" or name == "igpt.cli" or f'"{name}:' in cli:
            continue
        assert name in reached or f'"{name}"' in "".join(
            p.read_text(encoding="utf-8") for p in SOURCES if p.name == "__init__.py"
        ), f"{name} has no importer"


def run(code: str) -> str:
    """Run code in a fresh interpreter at the root; its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_packages_imports_almost_nothing() -> None:
    heavy = "torch numpy triton sklearn scipy matplotlib PIL transformers huggingface_hub safetensors tyro"
    for package in ("igpt", "igpt_kernels", "igpt.config", "igpt.cli"):
        allowed = {"tyro"} if package == "igpt.cli" else set()
        loaded = run(f"import sys, {package}; print(*[name for name in '{heavy}'.split() if name in sys.modules])").split()
        assert set(loaded) <= allowed, package


def test_everything_imports_without_extras_triton_or_extension() -> None:
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for path in SOURCES]
    modules = [name for name in modules if not name.startswith("igpt_kernels._triton.")]  # launched from there, late
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
        from igpt_kernels import _ext
        assert not _ext.status().loaded
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
