"""Builds the compiled extension, where that is possible. Everything else about the distribution is in pyproject.toml.

An install never fails for want of torch or of a C++ compiler: it goes on without the extension, says so in one sentence, and
igpt_kernels then works through its torch backend. With IGPT_REQUIRE_EXT=1 it fails instead.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel

REQUIRED = os.environ.get("IGPT_REQUIRE_EXT") == "1"


def go_on_without(reason: str) -> None:
    """Say that there will be no extension; stop if one is required."""
    if REQUIRED:
        sys.exit(f"igpt-kernels: the compiled extension was not built ({reason}), and IGPT_REQUIRE_EXT=1 asks for it.")
    sys.stdout.write(f"igpt-kernels: the compiled extension was not built ({reason}); its work is left to the torch backend.\n")


class Wheel(bdist_wheel):
    """One wheel for every Python from 3.10 on if there is an extension, for every platform if there is none."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.py_limited_api = "cp310"

    def run(self) -> None:
        self.run_command("build")  # only now is it known whether the extension compiles
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def extension_arguments() -> dict[str, Any]:
    """The arguments of `setup` that build the extension; none where torch is absent."""
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except (ImportError, OSError) as error:  # OSError: a torch whose own libraries do not load
        go_on_without(f"torch cannot be imported: {error}; install torch first and build with --no-build-isolation")
        return {}

    class BuildIfPossible(BuildExtension):  # type: ignore[misc]
        def run(self) -> None:
            compiler = os.environ.get("CXX", "c++")
            try:
                if shutil.which(shlex.split(compiler)[0]) is None:
                    raise FileNotFoundError(f"there is no C++ compiler {compiler!r}; install one, or name it in CXX")
                super().run()
            except Exception as error:  # whatever a compiler, a linker or torch's build code comes up with
                if REQUIRED:
                    raise
                go_on_without(f"{type(error).__name__} with the compiler {compiler!r}: {error}")
                for extension in self.extensions:  # one of an earlier build must not pass for this one
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
                self.extensions = []
                self.distribution.ext_modules = []

    # The stable ABI of torch 2.10 loads in every later torch, and no Python API is used, so one file serves all versions.
    # -ffp-contract=off: a fused multiply-add rounds once where the palette contract rounds twice.
    cpu = CppExtension(
        "igpt_kernels._C",
        ["csrc/palette.cpp", "csrc/binding_cpu.cpp"],
        depends=["csrc/palette.h"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],
        extra_compile_args=["-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden"],
        py_limited_api=True,
    )
    return {"ext_modules": [cpu], "cmdclass": {"build_ext": BuildIfPossible, "bdist_wheel": Wheel}}


setup(**extension_arguments())
