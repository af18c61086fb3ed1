"""Builds the compiled extension, where that is possible. Everything else about the distribution is in pyproject.toml.

An install never fails for want of torch, of a C++ compiler or of CUDA: it goes on without, says so in one sentence, and
igpt_kernels then works through its torch backend. With IGPT_REQUIRE_EXT=1 it fails instead. How: igpt_kernels/_native/build.py.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).resolve().parent))  # a build front end does not put it there

from igpt_kernels._native import build


class Sources(build_py):
    """The package with the C++ sources inside, so that it can be compiled where a compiler turns up after the install."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            shutil.copytree("csrc", Path(self.build_lib) / "igpt_kernels" / "csrc", dirs_exist_ok=True)


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on if there is an extension, for every platform if there is none."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.py_limited_api = "cp310"

    def run(self) -> None:
        self.run_command("build")  # only now is it known whether the extension compiles
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


arguments = build.extension_arguments(Path("csrc"))
arguments["cmdclass"] = {**arguments.get("cmdclass", {}), "build_py": Sources}
if "ext_modules" in arguments:
    arguments["cmdclass"]["bdist_wheel"] = Wheel
setup(**arguments)
