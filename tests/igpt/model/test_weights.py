"""Weights on disk: names that wrappers leave, what the format has no place for, and hostile folders."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.utils import parametrize
from torch.optim.swa_utils import AveragedModel

from igpt.errors import CheckpointError, DataError, IgptError
from igpt.model.huggingface import shapes_of
from igpt.model.image_gpt import ImageGPT
from igpt.palette.palette import Palette
from tests.hostile import SECONDS, at_most
from tests.models import greys, random_model

TOKENS = torch.randint(0, 27, (3, 16), generator=torch.Generator().manual_seed(1))


def small(**changes: Any) -> ImageGPT:
    values = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 27, "height": 4, "width": 4, **changes}
    return random_model(0.1, **values)


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"objective": "bert", "height": 2}])
def test_shapes_are_those_of_the_model(changes: dict[str, Any]) -> None:
    model = small(**changes)
    assert shapes_of(model.config) == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def renamed(folder: Path, name: Callable[[str], str]) -> None:
    state = load_file(folder / "model.safetensors")
    save_file({name(key): value for key, value in state.items()}, folder / "model.safetensors")


PREFIXES = {
    "compile": lambda name: f"_orig_mod.{name}",
    "DDP": lambda name: f"module.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "both, the other way": lambda name: f"_orig_mod.module.{name}",
    "FSDP of all": lambda name: f"_fsdp_wrapped_module.{name}",
    "FSDP of layers": lambda name: name.replace(".attn.", "._fsdp_wrapped_module.attn._fsdp_wrapped_module."),
    "checkpointed layers": lambda name: name.replace(".h.0.", ".h.0._checkpoint_wrapped_module."),
    "compiled layers": lambda name: name.replace(".h.1.", ".h.1._orig_mod."),
}


@pytest.mark.parametrize("prefix", PREFIXES)
def test_prefixes_of_wrappers_are_read(prefix: str, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    renamed(tmp_path, PREFIXES[prefix])
    assert torch.equal(ImageGPT.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("changes", [{}, {"objective": "bert"}, {"bias": True}])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        lambda model: torch.compile(model, backend="eager"),
        AveragedModel,
        nn.DataParallel,
        lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
    ],
    ids=["alone", "compile", "average", "parallel", "both"],
)
def test_state_dictionaries_of_our_own_are_read(wrap: Any, changes: dict[str, Any], tmp_path: Path) -> None:
    model = small(**changes)
    model.save_pretrained(tmp_path)
    state = {name: value.clone().contiguous() for name, value in wrap(model).state_dict().items()}
    save_file(state, tmp_path / "model.safetensors")
    again = ImageGPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_models_with_wrapped_parts_are_saved(tmp_path: Path) -> None:
    model = small()
    expected = model(TOKENS).logits
    model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    model.blocks[1] = checkpoint_wrapper(model.blocks[1])
    model.save_pretrained(tmp_path)
    assert torch.equal(ImageGPT.from_pretrained(tmp_path)(TOKENS).logits, expected)


def test_an_index_beside_a_whole_file_counts_for_nothing(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    assert torch.equal(ImageGPT.from_pretrained(tmp_path)(TOKENS).logits, model(TOKENS).logits)


def test_files_of_several_dtypes_are_read_in_the_one_that_holds_all(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({name: x.bfloat16() if "attn" in name else x for name, x in state.items()}, tmp_path / "model.safetensors")
    again = ImageGPT.from_pretrained(tmp_path)
    assert {parameter.dtype for parameter in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again(TOKENS).logits, model(TOKENS).logits, atol=0.05, rtol=0)


LORA = peft.LoraConfig(target_modules=["qkv", "wpe"], r=2, init_lora_weights=False)


def test_adapters_are_explained_and_merged_ones_saved(tmp_path: Path) -> None:
    model = small()
    adapted = peft.get_peft_model(model, LORA)
    with pytest.raises(CheckpointError, match=r"model holds an adapter \(wpe\.base_layer.*merge_and_unload\(\) of peft"):
        model.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    adapted.save_pretrained(tmp_path / "alone")
    with pytest.raises(CheckpointError, match=r"alone: holds an adapter alone; load its base model, .* peft\.PeftModel\.from_"):
        ImageGPT.from_pretrained(tmp_path / "alone")
    expected = adapted(TOKENS).logits
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(ImageGPT.from_pretrained(tmp_path / "merged")(TOKENS).logits, expected, atol=1e-5, rtol=0)
    save_file(state, tmp_path / "merged" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"tensor blocks.* is of an adapter; save the model after merge_and_unload"):
        ImageGPT.from_pretrained(tmp_path / "merged")
    # As the message says: the base model, and the adapter on it.
    small().save_pretrained(tmp_path / "base")
    again = peft.PeftModel.from_pretrained(ImageGPT.from_pretrained(tmp_path / "base"), tmp_path / "alone")
    assert again(TOKENS).logits.shape == expected.shape


class Same(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight


def quantize(model: ImageGPT) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, inplace=True)


OTHERS: dict[str, tuple[Callable[[ImageGPT], Any], str]] = {
    "parametrized": (lambda m: parametrize.register_parametrization(m.wte, "weight", Same()), "parametrizations.weight"),
    "a bias": (lambda m: setattr(m, "head", nn.Linear(32, 27)), "model holds head.bias"),
    "another layer": (lambda m: setattr(m.blocks[0], "fc", nn.Identity()), r"model lacks blocks\.0\.fc\.weight"),
    "another size": (lambda m: setattr(m, "wpe", nn.Embedding(5, 32)), r"wpe\.weight must be .*\(16, 32\), got .*\[5, 32\]"),
    "float8": (
        lambda m: m.to(torch.float8_e4m3fn),
        r"must be a plain tensor of floating-point values .* of torch\.float8_",
    ),
    "meta": (lambda m: m.to("meta"), "on meta"),
    "quantized": (quantize, r"model holds blocks\.0\.attn\.qkv\.scale"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_what_is_no_image_gpt_any_more_is_not_saved(other: str, tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    before = (tmp_path / "model.safetensors").read_bytes()
    change, message = OTHERS[other]
    change(model)
    with pytest.raises(CheckpointError, match=message):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_full_disk_leaves_the_old_weights(tmp_path: Path) -> None:
    old = small()
    old.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
        with pytest.raises(DataError, match=r"model\.safetensors: cannot be written \("):
            small(n_embd=64).save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / name).unlink()
        make(folder / name)

    return edit


def header(content: bytes, size: int | None = None) -> Callable[[Path], None]:
    """A safetensors file that is its header alone."""
    return instead(
        "model.safetensors",
        lambda path: path.write_bytes(struct.pack("<Q", len(content) if size is None else size) + content),
    )


def empty_tensors(count: int) -> bytes:
    one = '"transformer.h.%d.x":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return ("{" + ",".join(one % number for number in range(count)) + "}").encode()


def one_tensor(dtype: str, shape: list[int], end: int) -> bytes:
    return json.dumps({"transformer.wte.weight": {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}}).encode()


HOSTILE: dict[str, Callable[[Path], Any]] = {
    "many layers": config(n_layer=100_000),
    "some more layers": config(n_layer=1_000),
    "wide": config(n_embd=10**12),
    "wide, and the heads divide": config(n_embd=2**20, n_head=2**20),
    "many colours": config(vocab_size=2**40),
    "no heads": config(n_head=0),
    "many heads": config(n_head=2**62),
    "many positions": config(n_positions=2**62, igpt_height=2**31, igpt_width=2**31),
    "tall": config(n_positions=2**32, igpt_height=65536, igpt_width=65536),
    "a number of 400 digits": config(n_layer=10**400),
    "NaN": config(n_layer=float("nan")),
    "infinity": config(n_embd=float("inf")),
    "NaN of the mask": config(igpt_mask_rate=float("nan")),
    "a bool": config(n_layer=True),
    "null": config(n_embd=None),
    "an object": config(n_head={"a": [1]}),
    "a large number in a pattern": config(igpt_attention="strided:1e30"),
    "a number of 5,000 digits in a pattern": config(igpt_attention="local2d:" + "9" * 5000),
    "5,000 terms": config(igpt_attention="+".join(["local2d:3"] * 5000)),
    "100,000 patterns": config(igpt_attention=[f"local2d:{n}" for n in range(100_000)]),
    "no pattern": config(igpt_attention=[]),
    "patterns that are no text": config(igpt_attention=[1, None]),
    "an objective that is no text": config(igpt_objective=["ar"]),
    "deep config": lambda folder: (folder / "config.json").write_bytes(b"[" * 100_000),
    "deep objects": lambda folder: (folder / "config.json").write_bytes(b'{"a":' * 100_000),
    "large config": lambda folder: (folder / "config.json").write_bytes(b'{"a": "' + b"x" * (33 << 20) + b'"}'),
    "config a pipe": instead("config.json", os.mkfifo),
    "config a device": instead("config.json", lambda path: path.symlink_to("/dev/zero")),
    "config a folder": instead("config.json", Path.mkdir),
    "config a link to itself": instead("config.json", lambda path: path.symlink_to(path)),
    "weights a pipe": instead("model.safetensors", os.mkfifo),
    "weights a device": instead("model.safetensors", lambda path: path.symlink_to("/dev/zero")),
    "weights a folder": instead("model.safetensors", Path.mkdir),
    "weights a link to themselves": instead("model.safetensors", lambda path: path.symlink_to(path)),
    "weights a link to nothing": instead("model.safetensors", lambda path: path.symlink_to("gone")),
    "palette a pipe": instead("preprocessor_config.json", os.mkfifo),
    "index a pipe": instead("model.safetensors", lambda path: os.mkfifo(path.with_suffix(".safetensors.index.json"))),
    "a million tensors": header(empty_tensors(1_000_000)),
    "30,000 tensors": header(empty_tensors(30_000)),
    "a header of 2^63 bytes": header(b"{}", 2**63),
    "a header beyond the file": header(b"{}", 4_000_000),
    "a header that is deep": header(b"[" * 1_000_000),
    "a header of another kind": header(b"[]"),
    "an unknown dtype": header(one_tensor("F12", [0], 0)),
    "a dtype of 8 bits": header(one_tensor("F8_E4M3", [0], 0)),
    "a large tensor without bytes": header(one_tensor("F32", [2**40, 2**40], 0)),
    "a tensor beyond the file": header(one_tensor("F32", [1 << 30], 1 << 32)),
    "an empty tensor": header(one_tensor("F32", [2**40, 0], 0)),
    "a tensor without dimensions": header(one_tensor("F32", [], 0)),
    "long names": header(empty_tensors(3).replace(b".h.", b"." + b"h" * 100_000 + b".")),
    "names twice": header(b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},' * 2 + b'"b":{}}'),
}


@pytest.mark.parametrize("damage", HOSTILE)
def test_hostile_folders_are_refused_in_one_line(damage: str, tmp_path: Path) -> None:
    model = small()
    model.palette = greys(27)
    model.save_pretrained(tmp_path)
    HOSTILE[damage](tmp_path)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with at_most(SECONDS), pytest.raises(IgptError) as caught:
        ImageGPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB; a header of 90 MB is made here, too


@pytest.mark.parametrize("pattern", ["fixed:99999999,8", "strided:99999999", "local2d:99999", "+".join(["row"] * 32)])
def test_odd_patterns_are_read_and_run(pattern: str, tmp_path: Path) -> None:
    model = small(attention=pattern)
    model.save_pretrained(tmp_path)
    with at_most(SECONDS):
        assert ImageGPT.from_pretrained(tmp_path)(TOKENS).logits.isfinite().all()


def test_a_palette_pipe_does_not_wait(tmp_path: Path) -> None:
    for name in ("preprocessor_config.json", "kmeans_centers.npy"):
        os.mkfifo(tmp_path / name)
        with at_most(SECONDS), pytest.raises(IgptError, match="not a plain file"):
            Palette.from_pretrained(tmp_path / name)
    shutil.rmtree(tmp_path)
