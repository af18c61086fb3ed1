"""A check of each Triton kernel on a GPU before its first result is handed out.

Some versions of ptxas and Triton compile products of matrices wrongly (fla-org/flash-linear-attention#1262,
triton-lang/triton#11366). So the first call of an operation runs its kernels, forward and backward, on a small case. The
results are compared with the oracle in float64, within the budgets of `igpt_kernels.testing`. It happens once for each
operation, dtype, size and device. A check that passed is noted in a file of the user's cache.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from igpt_kernels import self_check_cases

Key = tuple[str, str, torch.dtype, int, torch.device]
"""Operation, step, dtype, size (head dim, width or classes) and device of a check."""
VARIABLE = "IGPT_KERNELS_SELF_CHECK"
DEVICES = ("cuda",)
"""Types of devices whose kernels are checked; ROCm's are called cuda too."""
_PASSED = "passed"
_states: dict[Key, str | SelfCheckError] = {}
_lock = threading.Lock()
_running: set[int] = set()


class SelfCheckError(RuntimeError):
    """A kernel gave a wrong result on this machine; the message names it, the error, and remedies."""


def enabled() -> bool:
    """False with IGPT_KERNELS_SELF_CHECK=0, and in Triton's interpreter."""
    return os.environ.get(VARIABLE) != "0" and os.environ.get("TRITON_INTERPRET") != "1"


def ensure(op: str, step: str, arguments: Sequence[Any], load: Callable[[str], Callable[..., Any]]) -> None:
    """Check the kernels of an operation, unless that was done for arguments of this kind.

    While the stream is captured into a CUDA graph, or memory is short, nothing is checked: a later call does it.

    Args:
        op: name of the operation.
        step: name of its step that is about to run.
        arguments: of that step.
        load: gives the launcher of a step by its name.

    Raises:
        SelfCheckError: the kernels gave a wrong result, now or at an earlier call.

    Cost: a look-up; at the first call 1 to 21 launches of small kernels, and the compilation of those that the caller
    does not need.
    """
    x = arguments[0]
    if x.device.type not in DEVICES or (op, step) not in self_check_cases.CASES:
        return
    size = arguments[1].shape[0] if op == "linear_cross_entropy" else x.shape[-1]
    key = (op, step, x.dtype, size, x.device)
    state = _states.get(key)
    if state is None:
        state = _state(key, load)
    if isinstance(state, SelfCheckError):
        raise state


def _state(key: Key, load: Callable[[str], Callable[..., Any]]) -> str | SelfCheckError | None:
    """Look a check up on disk, else run it; None where it must wait."""
    if not enabled() or key[3] < 1 or threading.get_ident() in _running:
        return None
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return None
    with _lock:
        if key not in _states:
            path = record(key)
            if passed(path):
                _states[key] = _PASSED
            else:
                found = _run(key, load)
                if found is None:
                    return None
                if found == _PASSED:
                    _write(path, key)
                _states[key] = found
        return _states[key]


def _run(key: Key, load: Callable[[str], Callable[..., Any]]) -> str | SelfCheckError | None:
    """Run the case in a thread of its own, where no mode and no autocast of the caller holds."""
    found: list[BaseException | None] = []

    def work() -> None:
        _running.add(threading.get_ident())
        try:
            op, step, dtype, size, device = key
            self_check_cases.CASES[op, step](load, dtype, size, device)
            found.append(None)
        except BaseException as error:
            found.append(error)
        finally:
            _running.discard(threading.get_ident())

    thread = threading.Thread(target=work, name="igpt-kernels self-check")
    thread.start()
    thread.join()
    error = found[0]
    if error is None:
        return _PASSED
    if isinstance(error, torch.OutOfMemoryError):
        return None
    if not isinstance(error, (AssertionError, RuntimeError)):
        raise error
    return SelfCheckError(_message(key, error))


def _message(key: Key, error: BaseException) -> str:
    op, step, dtype, size, device = key
    assembler = blackwell_ptxas()
    remedies = [f"backend='torch' computes {op} without these kernels", f"{VARIABLE}=0 turns this check off"]
    if assembler is not None:
        remedies.insert(0, f"TRITON_PTXAS_PATH={assembler} takes another assembler")
    return (
        f"the Triton kernels of {op} ({step}, {dtype}, size {size}) are wrong on {device}: {error}. "
        f"The likely cause is the compiler. Remedies: {'; '.join(remedies)}."
    )


def blackwell_ptxas() -> Path | None:
    """The second assembler that Triton's wheel brings, if it is there; it is newer than the first."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"
    return path if path.is_file() else None


@functools.cache
def _sources() -> str:
    """Digest of the kernels, their configurations and the cases."""
    here = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*here.glob("_triton/*.py"), *here.glob("configs/*.json"), *here.glob("*.py")]):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def _driver() -> str:
    try:
        return Path("/proc/driver/nvidia/version").read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def facts(key: Key) -> dict[str, str]:
    """What the result of a check depends on."""
    op, step, dtype, size, device = key
    gpu = device.type == "cuda" and torch.cuda.is_available()
    try:
        triton = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        triton = ""
    return {
        "check": f"{op} {step} {dtype} {size}",
        "device": torch.cuda.get_device_name(device) if gpu else device.type,
        "driver": _driver() if gpu else "",
        "torch": torch.__version__,
        "triton": triton,
        "ptxas": os.environ.get("TRITON_PTXAS_PATH", ""),
        "sources": _sources(),
    }


def record(key: Key) -> Path:
    """The file that says that a check passed."""
    name = hashlib.sha256(json.dumps(facts(key), sort_keys=True).encode()).hexdigest()[:24]
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "igpt-kernels" / "self-check" / f"{name}.json"


def passed(path: Path) -> bool:
    """Whether the file is there and whole."""
    try:
        return bool(json.loads(path.read_text(encoding="utf-8"))["passed"] is True)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _write(path: Path, key: Key) -> None:
    """Note in one step that a check passed; a folder that cannot be written to costs the next process a check."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump({"passed": True, **facts(key)}, file)
        os.replace(file.name, path)
    except OSError:
        return


def describe() -> str:
    """The state in one line, for ``igpt info``."""
    if not enabled():
        return f"off ({VARIABLE}=0 or Triton's interpreter)"
    failed = sum(isinstance(state, SelfCheckError) for state in _states.values())
    folder = record(("", "", torch.float32, 1, torch.device("cpu"))).parent
    noted = sum(map(passed, folder.glob("*.json")))
    return f"on; in this process {len(_states) - failed} passed, {failed} failed; {noted} passed noted in {folder}"
