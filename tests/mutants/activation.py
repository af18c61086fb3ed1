"""Breaks of the kernels of the activation."""

from tests.mutants.mutant import Mutant

TESTS = "tests/interpreter/test_activation.py"

MUTANTS = (
    Mutant(
        "gelu: factor 1.7",
        "activation.py",
        "tl.math.exp2(z * (-1.702 * LOG2E))",
        "tl.math.exp2(z * (-1.7 * LOG2E))",
        "test_widths",
    ),
    Mutant("gelu: slope without its second term", "activation.py", "t * (1.0 + 1.702 * z * (1.0 - t))", "t", "test_widths"),
    Mutant(
        "gelu: bias left out backward",
        "activation.py",
        "            z += bias",
        "            z += 0 * bias",
        "test_widths",
    ),
    Mutant(
        "gelu: bias of the first columns for all",
        "activation.py",
        "z += tl.load(Bias + cols, mask",
        "z += tl.load(Bias + cols % BLOCK_N, mask",
        "test_rows or test_random_shapes",
    ),
    Mutant("gelu: workers start at the same tile", "activation.py", "range(worker, tl.cdiv", "range(0, tl.cdiv", "test_rows"),
    Mutant(
        "memory: values beyond the last read",
        "activation.py",
        "z = tl.load(X + offset, mask=ok, other=0.0)",
        "z = tl.load(X + offset)",
        "test_widths or test_rows",
    ),
)
