"""Make the golden data anew: ``python tests/golden/regenerate.py [FILE ...]``; ``--list`` says what there is.

Run it only when a change of the numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
COMMAND = "python tests/golden/regenerate.py"


def loss_curve() -> dict[str, Any]:
    """Losses of 30 steps on the real digits."""
    import torch

    from igpt.machine import versions
    from igpt.training.options import PretrainOptions
    from igpt.training.pretrain import pretrain

    options: dict[str, Any] = {"source": "digits", "palette": "uniform:27", "n_layer": 2, "n_head": 2, "n_embd": 32}
    options |= {"steps": 30, "batch_size": 16, "lr": 0.003, "warmup": 5, "clip": 1.0, "weight_decay": 0.01, "log_every": 1}
    options |= {"val_every": 30, "val_images": 64, "sample_every": 0, "checkpoint_every": 30, "seed": 1, "device": "cpu"}
    with tempfile.TemporaryDirectory() as folder:
        run = pretrain(PretrainOptions(out=Path(folder) / "run", **options), progress=False).run
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "command": f"{COMMAND} loss_curve.json",
        "options": options,
        "loss": [row["loss"] for row in rows if "loss" in row],
        "val_loss": rows[-1]["val_loss"],
        "histogram_loss": rows[-1]["histogram_loss"],
        "made_with": versions() | {"threads": torch.get_num_threads()},
    }


FILES: dict[str, Callable[[], dict[str, Any]]] = {"loss_curve.json": loss_curve}


def main(names: list[str]) -> int:
    """Write the named files, or all."""
    if names == ["--list"]:
        sys.stdout.write("\n".join(FILES) + "\n")
        return 0
    unknown = [name for name in names if name not in FILES]
    if unknown:
        sys.stderr.write(f"no golden file {unknown[0]}; there are {', '.join(FILES)}\n")
        return 2
    for name in names or FILES:
        (HERE / name).write_text(json.dumps(FILES[name](), indent=1) + "\n", encoding="utf-8")
        sys.stdout.write(f"wrote {HERE / name}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
