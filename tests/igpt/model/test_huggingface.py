"""The Hugging Face format, both ways: ours loads in transformers, theirs (old, sharded, fine-tuned) loads in ours."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import igpt
from igpt.errors import CheckpointError, ConfigError
from igpt.model.image_gpt import ImageGPT
from igpt.palette.palette import Palette
from tests.models import random_model


def small(**changes: Any) -> ImageGPT:
    values = {"n_layer": 2, "n_head": 2, "n_embd": 32, "vocab_size": 27, "height": 4, "width": 4, **changes}
    return random_model(0.1, **values)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(0, 27, (3, 16), generator=torch.Generator().manual_seed(1))


def hf_logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    start = torch.full((tokens.shape[0], 1), model.config.vocab_size - 1)
    with torch.no_grad():
        return model(input_ids=torch.cat([start, tokens[:, :-1]], 1)).logits


@pytest.mark.parametrize("head_dim", [16, 64, 96, 128])
def test_saved_model_loads_in_transformers_as_it_stands(head_dim: int, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = small(n_embd=2 * head_dim)
    model.save_pretrained(tmp_path)
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(hf_logits(theirs, tokens), model(tokens).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"objective": "bert"}, {"height": 2, "width": 8}])
def test_round_trip_is_bit_for_bit(changes: dict[str, Any], tmp_path: Path) -> None:
    model = small(**changes)
    model.palette = Palette.uniform(27)
    model.save_pretrained(tmp_path)
    again = ImageGPT.from_pretrained(tmp_path)
    assert again.config == model.config
    assert not again.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    assert again.palette is not None
    assert (again.palette.colors == model.palette.colors).all()


def test_files_are_readable_by_others(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_mode & 0o044
    assert not list(tmp_path.glob("*.part"))


def test_reads_what_transformers_writes(tmp_path: Path, tokens: torch.Tensor) -> None:
    config = transformers.ImageGPTConfig(
        vocab_size=28, n_positions=16, n_embd=32, n_layer=2, n_head=2, reorder_and_upcast_attn=True, initializer_range=0.2
    )
    torch.manual_seed(0)
    theirs = transformers.ImageGPTForCausalImageModeling(config).eval()
    theirs.save_pretrained(tmp_path)
    ours = ImageGPT.from_pretrained(tmp_path)
    assert (ours.config.height, ours.config.width, ours.config.vocab_size, ours.config.bias) == (4, 4, 27, False)
    torch.testing.assert_close(ours(tokens).logits, hf_logits(theirs, tokens), atol=1e-4, rtol=0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    theirs.save_pretrained(tmp_path)
    tuned = ImageGPT.from_pretrained(tmp_path)
    assert tuned.config.bias
    torch.testing.assert_close(tuned(tokens).logits, hf_logits(theirs, tokens), atol=1e-4, rtol=0)
    tuned.save_pretrained(tmp_path / "again")
    assert torch.equal(ImageGPT.from_pretrained(tmp_path / "again")(tokens).logits, tuned(tokens).logits)


def test_reads_sharded_files(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    theirs = transformers.ImageGPTForCausalImageModeling.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    shutil.copy(tmp_path / "config.json", tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    assert torch.equal(ImageGPT.from_pretrained(tmp_path / "sharded")(tokens).logits, model(tokens).logits)


def test_reads_old_files_with_mask_buffers(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for layer in range(2):
        state[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 16, 16, dtype=torch.bool)
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(state, tmp_path / "model.safetensors")
    assert torch.equal(ImageGPT.from_pretrained(tmp_path)(tokens).logits, model(tokens).logits)


def test_base_model_has_features_but_says_it_has_no_head(tmp_path: Path, tokens: torch.Tensor) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    base = {name.removeprefix("transformer."): value for name, value in state.items() if name != "lm_head.weight"}
    save_file(base, tmp_path / "model.safetensors")
    with pytest.warns(UserWarning, match="lm_head"):
        again = ImageGPT.from_pretrained(tmp_path)
    assert torch.equal(again.features(tokens), model.features(tokens))


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        values.update(changes)
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v != "absent"}))

    return edit


def edit_state(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors")

    return edit


def write(name: str, data: bytes | None) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        if data is None:
            (folder / name).unlink()
        else:
            (folder / name).write_bytes(data)

    return edit


def index(shards: object) -> Callable[[Path], None]:
    """Weights in two equal files, and an index of them."""

    def edit(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "whole.safetensors")
        shutil.copy(folder / "whole.safetensors", folder / "copy.safetensors")
        write("model.safetensors.index.json", json.dumps({"weight_map": shards}).encode())(folder)

    return edit


GAIN = "transformer.h.0.ln_1.weight"
HEAD = "lm_head.weight"
BREAKS: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (write("config.json", None), "config.json"),
    "no weights": (write("model.safetensors", None), "model.safetensors"),
    "only a pickle": (lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "pickle"),
    "config not JSON": (write("config.json", b"{"), "config.json.*JSON"),
    "config not text": (write("config.json", b"\xff\xfe\x00"), "config.json"),
    "config a list": (write("config.json", b"[]"), "object"),
    "weights empty": (write("model.safetensors", b""), "model.safetensors"),
    "weights garbage": (write("model.safetensors", b"\x80\x04K\x01." * 40), "model.safetensors"),
    "weights truncated": (
        lambda f: write("model.safetensors", (f / "model.safetensors").read_bytes()[:-100])(f),
        "safetensors",
    ),
    "no layers": (edit_config(n_layer="absent"), "n_layer"),
    "negative width": (edit_config(n_embd=-32), "n_embd.*-32"),
    "width a string": (edit_config(n_embd="32"), "n_embd"),
    "heads do not divide": (edit_config(n_head=5), "multiple"),
    "other activation": (edit_config(activation_function="relu"), "activation_function.*relu"),
    "other epsilon": (edit_config(layer_norm_epsilon=1e-6), "layer_norm_epsilon"),
    "other scale": (edit_config(scale_attn_by_inverse_layer_idx=True), "inverse_layer"),
    "other inner": (edit_config(n_inner=64), "n_inner.*64"),
    "not square": (edit_config(igpt_height="absent", igpt_width="absent", n_positions=15), "square"),
    "size and positions differ": (edit_config(igpt_height=3), "n_positions"),
    "objective unknown": (edit_config(igpt_objective="gan"), "gan"),
    "vocabulary differs": (edit_config(vocab_size=99), "wte"),
    "more layers": (edit_config(n_layer=3), "h.2"),
    "fewer layers": (edit_config(n_layer=1), "unknown tensors"),
    "tensor missing": (edit_state(lambda s: s.pop(GAIN)), "h.0.ln_1.weight is missing"),
    "tensor unknown": (edit_state(lambda s: s.update(extra=torch.zeros(1))), "unknown tensors extra"),
    "shape differs": (edit_state(lambda s: s.update({GAIN: torch.ones(31)})), r"\(32,\), got \(31,\)"),
    "NaN": (edit_state(lambda s: s.update({GAIN: torch.full((32,), float("nan"))})), "NaN"),
    "integers": (edit_state(lambda s: s.update({GAIN: torch.ones(32, dtype=torch.int64)})), "floating"),
    "index escapes": (index({"a": "../../etc/passwd"}), "weight_map"),
    "index to folders": (index({"a": ".."}), "weight_map"),
    "index of numbers": (index({"a": 3}), "weight_map"),
    "index of nothing": (index({}), "wte.weight"),
    "index a list": (index(["a"]), "weight_map"),
    "index names nothing": (index({"a": "shard.safetensors"}), "no shard.safetensors"),
    "index promises too much": (index({"a": "whole.safetensors"}), "has no tensor a, which the index says"),
    "two shards alike": (index({GAIN: "whole.safetensors", HEAD: "copy.safetensors"}), r"two tensors are .* and "),
}


@pytest.mark.parametrize("broken", BREAKS)
def test_broken_folders_are_refused_by_name(broken: str, tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    damage, message = BREAKS[broken]
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=message) as caught:
        ImageGPT.from_pretrained(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_palette_of_another_size_is_refused(tmp_path: Path) -> None:
    model = small()
    model.palette = Palette.uniform(8)
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="8 colours"):
        ImageGPT.from_pretrained(tmp_path)


def test_missing_folder_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ImageGPT.from_pretrained(tmp_path / "nowhere")

    def unreachable(*_: object, **__: object) -> str:
        raise OSError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match="hub"):
        ImageGPT.from_pretrained("someone/imagegpt")


def test_hub_ids_are_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: torch.Tensor) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    asked: list[str] = []

    def download(name: str, *, allow_patterns: list[str]) -> str:
        assert not any(pattern.endswith(".bin") for pattern in allow_patterns)
        asked.append(name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert torch.equal(igpt.ImageGPT.from_pretrained("someone/imagegpt")(tokens).logits, model(tokens).logits)
    assert asked == ["someone/imagegpt"]


def test_a_device_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="device 'teapot' cannot be used"):
        ImageGPT.from_pretrained(tmp_path, device="teapot")
    with pytest.raises(ConfigError, match="device 'cuda:99' cannot be used"):
        ImageGPT.from_pretrained(tmp_path, device="cuda:99")
    with pytest.raises(TypeError, match="source must be a path, got None"):
        ImageGPT.from_pretrained(None)  # type: ignore[arg-type]
