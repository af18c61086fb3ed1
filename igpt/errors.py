"""User-facing errors, and `import_extra` for optional packages.

The command line turns any `IgptError` into one line on stderr and exit code 2. Everything else is a bug: one line and exit
code 1, and with ``IGPT_DEBUG=1`` its traceback.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from igpt.console import one_line


class IgptError(ValueError):
    """A mistake that the user can mend: the message names the argument or file, what was got, and what is wanted.

    As text it is one line. What a terminal would obey or hide is spelled out (``\\x1b``): names of files can hold anything.
    """

    def __str__(self) -> str:
        return one_line(super().__str__())


class ConfigError(IgptError):
    """An option or configuration value that cannot work."""


class ArgumentTypeError(IgptError, TypeError):
    """An argument of a type, or a tensor of a dtype, that cannot work."""


class DataError(IgptError):
    """An image, token file or data set that cannot be read, or is not what its name says."""


class CheckpointError(IgptError):
    """A checkpoint or pretrained folder that is missing, incomplete, damaged or of another shape."""


class KernelRefused(IgptError):
    """A call that a kernel was strictly asked for, and cannot serve."""


class NonFiniteError(IgptError):
    """A loss, gradient or weight became NaN or infinite."""


class MissingExtra(IgptError, ImportError):
    """An optional package is not installed; the message is the command that installs it."""


def import_extra(module: str, extra: str) -> ModuleType:
    """Import `module`, or raise `MissingExtra` with the one command that installs it.

    Args:
        module: dotted module name, for example ``"sklearn.linear_model"``.
        extra: the extra of this distribution that brings it: ``"eval"``, ``"hf"`` or ``"log"``.

    Raises:
        MissingExtra: the package is absent. Errors inside an installed package are not hidden.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        top = module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] != top:
            raise
        raise MissingExtra(f"{top} is not installed; run: pip install 'igpt-kernels[{extra}]'") from error
