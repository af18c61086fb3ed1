"""How the compiled extension is built: the one description, for setup.py and for a build after the install (cache.py).

Two libraries on LibTorch's stable ABI, loaded by _ext.py: _C (CPU), and _C_cuda where there is a CUDA toolkit. Nothing here
fails for want of a tool: `Tool.reason` says what is missing, and a library that cannot be built is left out. Environment:
IGPT_CUDA=auto|0|1, IGPT_REQUIRE_EXT=1, CXX, CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# The stable ABI of torch 2.10 loads in every later torch, and no Python API is used, so one file serves all versions.
ABI = ("TORCH_TARGET_VERSION", "0x020a000000000000")
# -ffp-contract=off, -fmad=false: a fused multiply-add rounds once where the palette contract rounds twice.
CXX_FLAGS = ("-std=c++17", "-O3", "-g0", "-ffp-contract=off", "-fvisibility=hidden")
NVCC_FLAGS = ("-std=c++17", "-O3", "-fmad=false", "-Xcompiler", "-fvisibility=hidden")
# Code for 8.x, 9.0, 10.x and 12.x, and PTX for what comes later: the same file on every machine, GPU in sight or not.
ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0+PTX")
LIBRARIES = ("igpt_kernels._C", "igpt_kernels._C_cuda")


@dataclass(frozen=True)
class Tool:
    """A compiler that is there, or the reason why it is not."""

    path: str = ""
    version: str = ""
    reason: str = ""


def required() -> bool:
    """Whether a build that cannot be done must fail."""
    return os.environ.get("IGPT_REQUIRE_EXT") == "1"


def compiler() -> Tool:
    """The C++ compiler: CXX, else c++."""
    named = os.environ.get("CXX") or "c++"
    path = shutil.which(shlex.split(named)[0])
    if path is None:
        return Tool(reason=f"there is no C++ compiler {named!r}; install one, or name it in CXX")
    return Tool(path, _first_line([path, "--version"]))


def toolkit() -> Tool:
    """The CUDA toolkit of CUDA_HOME, CUDA_PATH or nvcc in PATH; `path` is its root folder, found through wrappers and links."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc", path=str(Path(home) / "bin")) if home else shutil.which("nvcc")
    if nvcc is None and not home and Path("/usr/local/cuda/bin/nvcc").is_file():
        nvcc = "/usr/local/cuda/bin/nvcc"
    if nvcc is None:
        where = f"in CUDA_HOME={home}" if home else "in PATH or /usr/local/cuda"
        return Tool(reason=f"there is no nvcc {where}; install a CUDA toolkit, or name it in CUDA_HOME")
    # A wrapper's own folder tells nothing; the compiler itself says where it is.
    told = _output([nvcc, "--dryrun", "-c", "x.cu"])
    version = re.search(r"release (\d+\.\d+)", _output([nvcc, "--version"]))
    top = re.search(r"^#\$ TOP=(.+)$", told, re.MULTILINE)
    if version is None or top is None:
        return Tool(reason=f"{nvcc} does not answer as nvcc does: {(told.strip() or 'no output').splitlines()[0]}")
    root = Path(top.group(1)).resolve()
    if _cudart(root) is None:
        return Tool(reason=f"the CUDA toolkit {root} has no libcudart_static.a; install its development files")
    return Tool(str(root), version.group(1))


def cuda(torch: Any) -> Tool:
    """The toolkit to build _C_cuda with, or the reason why it is not built.

    ``IGPT_CUDA=auto`` builds where torch has CUDA and a toolkit of the same major version is there; ``1`` also where torch
    has no CUDA (the file then serves other machines); ``0`` never.
    """
    wish = os.environ.get("IGPT_CUDA") or "auto"
    if wish not in ("auto", "0", "1"):
        return Tool(reason=f"IGPT_CUDA must be auto, 0 or 1; got {wish!r}")
    if wish == "0":
        return Tool(reason="IGPT_CUDA=0")
    if sys.platform != "linux":
        return Tool(reason=f"it is built on Linux only, and this is {sys.platform}")
    has = torch.version.cuda
    if has is None and wish == "auto":
        return Tool(reason=f"torch {torch.__version__} has no CUDA; IGPT_CUDA=1 builds for other machines")
    found = toolkit()
    if found.reason:
        return found
    if has is not None and found.version.split(".")[0] != has.split(".")[0]:
        return Tool(
            reason=f"nvcc is of CUDA {found.version}, and torch {torch.__version__} of CUDA {has}; the major versions must be "
            f"equal: install CUDA {has.split('.')[0]}, and name it in CUDA_HOME"
        )
    if not architectures(found):
        return Tool(reason=f"nvcc {found.version} knows none of the architectures {', '.join(ARCHITECTURES)}; it is too old")
    return found


def architectures(found: Tool) -> tuple[str, ...]:
    """Those of ARCHITECTURES that the toolkit knows; the last with PTX."""
    known = re.findall(r"compute_(\d+)", _output([f"{found.path}/bin/nvcc", "--list-gpu-arch"]))
    kept = [arch for arch in ARCHITECTURES if arch.removesuffix("+PTX").replace(".", "") in known]
    return (*kept[:-1], kept[-1].removesuffix("+PTX") + "+PTX") if kept else ()


def sources() -> Path:
    """The folder of the C++ sources: beside the package in a source tree, inside it when installed."""
    inside = Path(__file__).resolve().parents[1] / "csrc"
    return inside if inside.is_dir() else Path(__file__).resolve().parents[2] / "csrc"


def extension_arguments(csrc: Path) -> dict[str, Any]:
    """The arguments of setuptools' `setup` that build the libraries from `csrc`; none where torch is absent."""
    try:
        import torch
        from torch.utils import cpp_extension
    except (ImportError, OSError) as error:  # OSError: a torch whose own libraries do not load
        _go_on_without(f"torch cannot be imported: {error}; install torch first and build with --no-build-isolation")
        return {}
    headers = [str(path) for pattern in ("*.h", "cpu/*.h", "cpu/*.inc") for path in sorted(csrc.glob(pattern))]
    extensions = [
        cpp_extension.CppExtension(
            LIBRARIES[0],
            [str(path) for path in (csrc / "palette.cpp", csrc / "binding_cpu.cpp", *sorted((csrc / "cpu").glob("*.cpp")))],
            depends=headers,
            define_macros=[ABI],
            extra_compile_args=list(CXX_FLAGS),
            py_limited_api=True,
        )
    ]
    found = cuda(torch)
    if found.reason:
        sys.stdout.write(f"igpt-kernels: the CUDA library is not built ({found.reason}).\n")
        if required() and os.environ.get("IGPT_CUDA", "auto") not in ("auto", "0"):
            sys.exit("igpt-kernels: IGPT_CUDA and IGPT_REQUIRE_EXT=1 ask for the CUDA library.")
    else:
        cpp_extension.CUDA_HOME = found.path  # which torch leaves out where it has no CUDA, and guesses from a wrapper
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", ";".join(architectures(found)))
        extensions.append(
            cpp_extension.CppExtension(
                LIBRARIES[1],
                [str(csrc / name) for name in ("palette.cu", "binding_cuda.cpp")],
                depends=headers,
                define_macros=[ABI],
                extra_compile_args={"cxx": list(CXX_FLAGS), "nvcc": list(NVCC_FLAGS)},
                library_dirs=[str(_cudart(Path(found.path)))],
                libraries=["cudart_static", "rt", "dl", "pthread"],  # no CUDA library to be found at load time
                extra_link_args=["-Wl,--exclude-libs,ALL"],
                py_limited_api=True,
            )
        )
    return {"ext_modules": extensions, "cmdclass": {"build_ext": _build_if_possible(cpp_extension.BuildExtension)}}


def _build_if_possible(build_extension: type[Any]) -> type[Any]:
    """torch's build command (ninja where it is installed), one library after another; what fails is left out."""

    class BuildIfPossible(build_extension):  # type: ignore[misc]
        extensions: list[Any]
        compiler: Any
        build_temp: str

        def run(self) -> None:
            wanted, kind, objects = self.extensions, self.compiler, Path(self.build_temp)
            built = []
            for extension in wanted:
                self.extensions, self.compiler = [extension], kind
                self.build_temp = str(objects / extension.name.rpartition(".")[2])  # two of the objects are palette.o
                try:
                    if compiler().reason:
                        raise FileNotFoundError(compiler().reason)
                    super().run()
                    built.append(extension)
                except Exception as error:  # whatever a compiler, a linker or torch's build code comes up with
                    if required():
                        raise
                    named = os.environ.get("CXX") or "c++"
                    _go_on_without(f"{type(error).__name__} with the compiler {named!r}: {error}", extension.name)
                    # One of an earlier build must not pass for this one.
                    Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
            self.extensions = self.distribution.ext_modules = built

    return BuildIfPossible


def _go_on_without(reason: str, library: str = LIBRARIES[0]) -> None:
    """Say that there will be no such library; stop if one is required."""
    name = "the compiled extension" if library == LIBRARIES[0] else "the CUDA library"
    if required():
        sys.exit(f"igpt-kernels: {name} was not built ({reason}), and IGPT_REQUIRE_EXT=1 asks for it.")
    sys.stdout.write(f"igpt-kernels: {name} was not built ({reason}); its work is left to the torch backend.\n")


def _cudart(root: Path) -> Path | None:
    """The folder of the static CUDA runtime."""
    for folder in (root / "lib64", root / "lib", *sorted(root.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    return None


def _output(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError) as error:
        return str(error)
    return done.stdout + done.stderr


def _first_line(command: Sequence[str]) -> str:
    return (_output(command).strip() or "unknown version").splitlines()[0]


def main(folder: str) -> None:
    """Build into `folder`/igpt_kernels; objects go beside them. Run in a process of its own, in an empty folder."""
    from setuptools import setup

    arguments = extension_arguments(sources().resolve())
    if arguments:
        command = ["build_ext", "--build-lib", folder, "--build-temp", str(Path(folder) / "objects")]
        setup(name="igpt-kernels", packages=[], py_modules=[], script_args=command, **arguments)


if __name__ == "__main__":
    main(sys.argv[1])
