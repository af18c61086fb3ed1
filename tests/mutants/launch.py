"""Breaks of the key by which a compiled kernel is found, and of the direct launch."""

from tests.mutants.mutant import Mutant

TESTS = "tests/igpt_kernels/_triton/test_launch.py"
_PROPERTY = "test_the_kernel_is_the_one or test_every_value_of_one_argument"

MUTANTS = (
    Mutant("key: without alignment", "launch.py", "x.data_ptr() & 15", "x.data_ptr() & 0", _PROPERTY),
    Mutant("key: alignment to 8 bytes", "launch.py", "x.data_ptr() & 15", "x.data_ptr() & 7", _PROPERTY),
    Mutant("key: one alignment for all pointers", "launch.py", "misaligned << 4 | x", "misaligned | x", _PROPERTY),
    Mutant("key: without dtypes", "launch.py", "*map(_dtype, tensors)", "len(tensors)", _PROPERTY),
    Mutant("key: without values", "launch.py", "*form.values(args)", "0", _PROPERTY),
    Mutant("key: without 64-bit sizes", "launch.py", "x >> 31", "x >> 99", _PROPERTY),
    Mutant("key: unsigned as signed", "launch.py", "x >> 31", "min(x >> 31, 1)", _PROPERTY),
    Mutant("key: without types", "launch.py", "*map(type, args)", "len(args)", _PROPERTY),
    Mutant("key: without constants", "launch.py", "*constants.values()", "0", _PROPERTY),
    Mutant("key: descriptors without dtype", "launch.py", "(x.base.dtype, *x", "(*x", _PROPERTY),
    Mutant("key: descriptors without block", "launch.py", "*x.block_shape, ", "", _PROPERTY),
    Mutant("key: descriptors without layout", "launch.py", ', getattr(x, "layout", None)', "", _PROPERTY),
    Mutant("key: without device", "launch.py", "device, misaligned,", "0, misaligned,", "test_device_driver"),
    Mutant("key: without driver", "launch.py", "active is not _owner[0]", "False", "test_device_driver"),
    Mutant("key: without debug", "launch.py", "knobs.runtime.debug", "0", "test_device_driver"),
    Mutant("launch: hooks left out", "launch.py", 'getattr(enter, "calls", enter)', "False", "test_hooks"),
    Mutant("launch: constants as passed", "launch.py", "*args, *tail", "*args, *constants.values()", "test_constants"),
)  # fmt: skip
