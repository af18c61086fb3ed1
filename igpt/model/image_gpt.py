"""Image GPT: a GPT-2-like transformer over palette tokens in raster order (Chen et al. 2020), as released.

What differs from GPT-2: a root-mean-square norm without mean or bias, no biases at all, x·sigmoid(1.702x) as activation; an
output matrix that is not tied to the embedding and starts at zero; a learned start vector in front of the tokens
(github.com/openai/image-gpt, model.py).

Letters: B batch, T tokens = h·w, C width, H heads, D = C/H head dim, V colours, L layers.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import register_dataclass

from igpt.checks import check_bool, check_int
from igpt.errors import ArgumentTypeError, ConfigError, IgptError
from igpt.kernels import state
from igpt.model.arguments import LARGEST, check_generator, check_mask, check_targets, check_tokens
from igpt.model.config import ImageGPTConfig
from igpt.model.plain import is_plain, is_plain_table, is_plain_tensor, remember
from igpt_kernels import layouts
from igpt_kernels.activation import quick_gelu as fused_quick_gelu
from igpt_kernels.attention import block_sparse_attention, decode_attention, flash_attention
from igpt_kernels.loss import linear_cross_entropy
from igpt_kernels.messages import shown
from igpt_kernels.norm import rms_norm

if TYPE_CHECKING:
    from igpt.palette.palette import Palette


@remember
class RMSNorm(state.Swappable, nn.Module):
    """``x · rsqrt(mean(x²) + 1e-5) · weight`` over the last dimension; half dtypes are computed in float32."""

    kernel_op = "norm"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        state.prepare(self)

    def forward(self, x: Tensor) -> Tensor:
        backend = self._backend()
        return plain_norm(x, self.weight) if backend is None else rms_norm(x, self.weight, backend=backend)

    def _backend(self) -> str | None:
        if is_plain_tensor(self.weight):
            return state.active(self, "norm")
        settings = state.settings_of(self)
        if settings["norm"] is not None:
            state.refuse(settings, "norm", f"the weight is a {type(self.weight).__name__}")
        return None


def add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """``norm(x + residual)`` and the sum itself: in one kernel where that is the same as calling the module."""
    if is_plain(norm, RMSNorm):
        backend = cast(RMSNorm, norm)._backend()
        if backend is not None:
            return rms_norm(x, cast(RMSNorm, norm).weight, residual=residual, backend=backend)
        total = x + residual
        return plain_norm(total, cast(RMSNorm, norm).weight), total
    total = x + residual
    return norm(total), total


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """`RMSNorm` as it is written."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype) * weight


def quick_gelu(x: Tensor) -> Tensor:
    """``x · sigmoid(1.702 x)``."""
    return x * torch.sigmoid(1.702 * x)


def plain_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, layout: layouts.SparseLayout | None = None) -> Tensor:
    """``softmax(q kᵀ / sqrt(D)) v``, eager: q [B,H,Tq,D], k and v [B,H,Tk,D] -> [B,H,Tq,D].

    The last query stands at the last key: causal hides the keys after each query's own position; a layout hides what it says.
    """
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])  # [B,H,Tq,Tk]
    if layout is not None:
        visible = layout.mask_rows(k.shape[2] - q.shape[2], k.shape[2], q.device)
        scores = scores.masked_fill(~visible, -math.inf)
    elif causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[2] - q.shape[2])
        scores = scores.masked_fill(~visible, -math.inf)
    return scores.softmax(-1) @ v


@dataclass
class Cache:
    """Keys and values of the positions seen so far; `length` positions of each [B,H,Tmax,D] are filled.

    A layer that computes in another dtype or on another device than was guessed moves its tables there.
    """

    keys: list[Tensor]
    values: list[Tensor]
    length: int = 0

    @property
    def max_length(self) -> int:
        """Positions that fit."""
        return self.keys[0].shape[2]


class Attention(state.Swappable, nn.Module):
    """Multi-head self-attention with one fused projection to queries, keys and values; dense, or with a sparse pattern."""

    kernel_op = "attention"

    def __init__(self, config: ImageGPTConfig, layer: int) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.head_dim = config.head_dim
        self.causal = config.objective == "ar"
        layout = layouts.parse(config.pattern(layer), config.height, config.width, causal=self.causal)
        self.layout = None if layout.is_dense else layout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        state.prepare(self)

    def forward(self, x: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).view(batch, tokens, 3, self.n_head, self.head_dim).permute(2, 0, 3, 1, 4)  # each [B,H,T,D]
        end = tokens
        if cache is not None:
            start, end = cache.length, cache.length + tokens
            if cache.keys[layer].dtype != k.dtype or cache.keys[layer].device != k.device:
                cache.keys[layer], cache.values[layer] = cache.keys[layer].to(k), cache.values[layer].to(v)
            keys, values = cache.keys[layer], cache.values[layer]
            keys[:, :, start:end], values[:, :, start:end] = k, v
            k, v = keys[:, :, :end], values[:, :, :end]
        backend = state.active(self, "attention")
        if backend is None:
            y = plain_attention(q, k, v, self.causal, self.layout)
        elif cache is not None and tokens == 1:
            y = decode_attention(q, keys, values, end, layout=self.layout, backend=backend)
        elif self.layout is not None:
            # Queries for the pixels that the cache knows already, where it knows some, only to be dropped: patterns are cut
            # into tiles of the image, which do not begin anywhere.
            q = F.pad(q, (0, 0, end - tokens, 0))
            layout = self.layout if end == self.layout.tokens else self.layout.prefix(end)
            y = block_sparse_attention(q, k, v, layout, backend=backend)[:, :, end - tokens :]
        else:
            y = flash_attention(q, k, v, causal=self.causal, backend=backend)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))

    def extra_repr(self) -> str:
        pattern = "dense" if self.layout is None else self.layout
        kernel = state.settings_of(self)["attention"] or "plain"
        return f"n_head={self.n_head}, causal={self.causal}, pattern={pattern}, kernel={kernel}"


class Block(state.Swappable, nn.Module):
    """Pre-norm block: ``h += Attention(norm(h)); h += MLP(norm(h))``."""

    kernel_op = "mlp"

    def __init__(self, config: ImageGPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = RMSNorm(config.n_embd)
        self.attn = Attention(config, layer)
        self.ln_2 = RMSNorm(config.n_embd)
        self.fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        state.prepare(self)

    def forward(self, h: Tensor, cache: Cache | None = None, layer: int = 0) -> Tensor:
        x, h = add_and_norm(self.ln_2, self.attn(self.ln_1(h), cache, layer), h)
        x = self.fc(x)
        backend = state.active(self, "mlp")
        x = quick_gelu(x) if backend is None else fused_quick_gelu(x, backend=backend)
        return h + self.proj(x)


@dataclass
class ImageGPTOutput:
    """What a forward pass gives: `logits` [B,T,V] without targets, `loss` (nats per pixel) with them."""

    logits: Tensor | None = None
    loss: Tensor | None = None


# torch.export and torch.func take outputs apart, and must know how.
register_dataclass(ImageGPTOutput, serialized_type_name="igpt.ImageGPTOutput")


class ImageGPT(state.Swappable, nn.Module):
    """The model: tokens [B,T] in, logits or loss out. See `forward`.

    Args:
        config: its shape. Parameters: ``L(12C² + 2C) + T·C + 2·V·C + 2C`` (one C less for the bert objective, which has no
            start vector).
    """

    kernel_op = "loss"

    def __init__(self, config: ImageGPTConfig) -> None:
        super().__init__()
        if not isinstance(config, ImageGPTConfig):
            raise ArgumentTypeError(f"config must be an ImageGPTConfig, such as igpt.preset gives, got {type(config).__name__}")
        self.config = config
        self.palette: Palette | None = None
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_ctx, config.n_embd)
        self.sos = nn.Parameter(torch.empty(config.n_embd)) if config.objective == "ar" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = RMSNorm(config.n_embd)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        state.prepare(self)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw fresh weights from torch's global generator.

        Matrices as the paper says, by the Sparse Transformer's depth-dependent scheme (Child et al. 2019): N(0, 0.125/√fan_in),
        those that write into the residual stream divided by √(2L), output zero. Tables as in the released code: tokens and
        start vector N(0, 0.02), positions N(0, 0.01).
        """
        if self.wte.weight.is_meta:
            return  # there is nothing to draw, and torch takes 2 ms a matrix to say so
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.01)
        if self.sos is not None:
            nn.init.normal_(self.sos, std=0.02)
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                depth = math.sqrt(2 * self.config.n_layer) if name.endswith("proj") else 1.0
                nn.init.normal_(module.weight, std=0.125 / math.sqrt(module.in_features) / depth)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        nn.init.zeros_(self.head.weight)

    @property
    def device(self) -> torch.device:
        """Where the model computes: where its weights are, or where accelerate brings them for each call."""
        hook = getattr(self, "_hf_hook", None)
        for each in getattr(hook, "hooks", (hook,)):
            device = getattr(each, "execution_device", None)
            if device is not None:
                return torch.device(device)
        return next(self.parameters()).device

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> ImageGPTOutput:
        """Logits of every pixel, or the loss.

        ``ar``: position i sees the start vector and pixels 0..i-1 and predicts pixel i. ``bert``: every position sees all
        pixels that `mask` leaves; the loss counts the hidden ones only, first over each image, then over images.

        Args:
            tokens: integers [B,T], 0 <= token < V; for ``ar`` T may be shorter than the image. B may be 0.
            targets: integers [B,T], usually the tokens themselves (nothing has to be shifted); -100 is not counted.
            mask: bool [B,T], True = hidden; ``bert`` only. Drawn with `config.mask_rate` when None.
            generator: where the mask is drawn from; torch's global generator when None.

        Returns:
            `logits` [B,T,V] without targets; `loss`, a scalar in nats per pixel, with them. Where no pixel counts, the loss
            is 0 and its gradients are zeros: no image, all targets -100, nothing hidden.

        Raises:
            IgptError: shapes, dtypes or values that do not fit, named; or weights that cannot be computed with together.
        """
        tokens = self._tokens(tokens)
        check_mask(mask, tokens, self.config.objective)
        check_generator(generator)
        same = targets is None or targets is tokens
        if targets is not None and not same:
            targets = check_targets(targets, tokens, self.config.vocab_size)
        if self.sos is None and mask is None:
            mask = self._draw_mask(tokens.shape[0], generator)
        if torch.compiler.is_compiling():
            return self._forward(tokens, targets, mask, same)
        try:
            return self._forward(tokens, targets, mask, same)
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain(error)
            raise

    def _forward(self, tokens: Tensor, targets: Tensor | None, mask: Tensor | None, all_count: bool) -> ImageGPTOutput:
        h = self._embed(tokens, mask)
        for block in self.blocks:
            h = block(h)
        h = self.ln_f(h)
        if targets is None:
            return ImageGPTOutput(logits=self.head(h))
        if targets.numel() == 0:
            return ImageGPTOutput(loss=self.head(h).sum() * 0.0)
        if mask is None:
            loss = self._nats(h, targets, "mean")
            return ImageGPTOutput(loss=loss if all_count else loss.masked_fill((targets == -100).all(), 0.0))
        nats = self._nats(h, targets, "none")
        counted = mask & (targets != -100)
        hidden = counted.sum(1)
        per_image = (nats * counted).sum(1) / hidden.clamp(min=1)
        # An image in which nothing was hidden has no loss, instead of the 0/0 of the released code.
        return ImageGPTOutput(loss=per_image.sum() / (hidden > 0).sum().clamp(min=1))

    def _explain(self, error: Exception) -> None:
        """Raise `ConfigError` where an error of torch comes from weights of several dtypes or devices, or of float8."""
        if isinstance(error, IgptError) or not any(word in str(error) for word in ("type", "implemented", "device")):
            return
        weights = {name: weight for name, weight in self.named_parameters() if weight.is_floating_point()}
        dtypes = {weight.dtype: f"{name} {weight.dtype}".replace("torch.", "") for name, weight in weights.items()}
        devices = {weight.device: f"{name} on {weight.device}" for name, weight in weights.items()}
        if not dtypes.keys() <= {torch.float16, torch.bfloat16, torch.float32, torch.float64}:
            what = f"weights must be float16, bfloat16, float32 or float64, got {', '.join(dtypes.values())}"
        elif len(dtypes) > 1 and not torch.is_autocast_enabled(self.device.type):
            what = f"weights must have one dtype, or run under torch.autocast; got {', '.join(dtypes.values())}"
        elif len(devices) > 1:
            what = f"weights must be on one device, got {', '.join(devices.values())}"
        else:
            return
        raise ConfigError(what) from error

    def _nats(self, h: Tensor, targets: Tensor, reduction: str) -> Tensor:
        """Cross-entropy of the output matrix's logits: h [B,T,C], targets [B,T] -> a scalar ("mean") or [B,T] ("none")."""
        settings = state.running(self, state.settings_of(self))
        if settings["loss"] is not None:
            reason = self._own_loss_reason()
            if not reason:
                state.count(settings, "loss")
                weight = self.head.weight
                return linear_cross_entropy(h, weight, targets, reduction=reduction, backend=str(settings["loss"]))
            state.refuse(settings, "loss", reason)
        nats = F.cross_entropy(self.head(h).flatten(0, 1), targets.flatten(), reduction=reduction)
        return nats if reduction == "mean" else nats.view_as(targets)

    def _own_loss_reason(self) -> str:
        """Why the loss cannot read the output matrix past its layer; empty when it can."""
        if not is_plain(self.head, nn.Linear):
            return f"the output layer is wrapped ({type(self.head).__name__}, or hooks on it)"
        if self.head.bias is not None:
            return "the output layer has a bias"
        if not is_plain_tensor(self.head.weight):
            return f"the output matrix is a {type(self.head.weight).__name__}"
        return ""

    def features(self, tokens: Tensor, layer: int | None = None, *, normed: bool = True, mask: Tensor | None = None) -> Tensor:
        """What a linear probe classifies: the mean over positions of the input of block `layer`'s attention.

        ``f[l] = mean_T(norm(h[l]; ln_1 of block l))`` for l < L and ``mean_T(norm(h[L]; ln_f))`` for l = L (paper, section
        2.4; footnote of the blog post).

        Args:
            tokens: integers [B,T].
            layer: 0..L, or None for all.
            normed: False gives the mean of the residual stream h[l] itself.
            mask: bool [B,T], True = hidden; ``bert`` only, whose evaluation keeps pixels hidden (nothing is when None).

        Returns:
            [B,C], or [L+1,B,C] for all layers.
        """
        layers = self.config.n_layer
        if layer is not None:
            layer = check_int("layer", layer, 0, layers)
        normed = check_bool("normed", normed)
        tokens = self._tokens(tokens)
        check_mask(mask, tokens, self.config.objective)
        with self._loaded():
            h = self._embed(tokens, mask)
            found = []
            for index in range(layers + 1):
                norm = cast(Block, self.blocks[index]).ln_1 if index < layers else self.ln_f
                if layer is None or layer == index:
                    found.append((norm(h) if normed else h).mean(1))
                if layer == index:
                    return found[0]
                if index < layers:
                    h = self.blocks[index](h)
            return torch.stack(found)

    def new_cache(self, batch_size: int, max_length: int | None = None) -> Cache:
        """An empty cache for `decode`, for `max_length` positions (a whole image when None).

        Raises:
            IgptError: an argument that is no number of images or positions, named; or one too large for the memory.
        """
        batch_size = check_int("batch_size", batch_size, 0, LARGEST)
        length = self.config.n_ctx if max_length is None else check_int("max_length", max_length, 1, self.config.n_ctx)
        shape, device = (batch_size, self.config.n_head, length, self.config.head_dim), self.device
        autocast = torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else next(self.parameters()).dtype
        try:
            # Zeros, not empty: what is never read must still be finite for backends that mask instead of slicing.
            tables = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2 * self.config.n_layer)]
        except RuntimeError as error:
            raise ConfigError(f"batch_size must fit into memory with its cache, got {batch_size}") from error
        return Cache(keys=tables[::2], values=tables[1::2])

    def decode(self, tokens: Tensor, cache: Cache) -> Tensor:
        """Feed known pixels, get the distribution of the next one.

        An empty cache takes the start vector first, so ``decode(tokens[:, :0], cache)`` gives the logits of pixel 0. The cache
        then holds one position more than pixels were fed.

        Args:
            tokens: integers [B,n], the pixels that follow those fed before; n may be 0 at the very start only.
            cache: from `new_cache`; grows in place.

        Returns:
            logits [B,V] of the pixel after the last one fed.

        Raises:
            ConfigError: the model has the bert objective, which has no order to draw in; nothing to feed, or more than the
                cache or the image holds; values that are no colours.
            ArgumentTypeError: `tokens` are no integers, `cache` is no cache.
        """
        if self.sos is None:
            raise ConfigError("a model with objective 'bert' has no next pixel for tokens; sampling needs objective 'ar'")
        if not isinstance(cache, Cache):
            raise ArgumentTypeError(f"cache must come from new_cache, got {shown(cache)}")
        if len(cache.keys) != self.config.n_layer:
            raise ConfigError(f"cache must have {self.config.n_layer} layers, got {len(cache.keys)}")
        positions = min(cache.max_length, self.config.n_ctx)
        colors = self.config.vocab_size
        tokens = check_tokens(tokens, context=f"0 to {positions}", least=0, most=self.config.n_ctx, colors=colors)
        if tokens.shape[0] != cache.keys[0].shape[0]:
            raise ConfigError(f"tokens must be [B,n] with the cache's B = {cache.keys[0].shape[0]}, got {tuple(tokens.shape)}")
        self._check_device(tokens)
        start = cache.length
        end = start + tokens.shape[1] + (start == 0)
        if end == start:
            raise ConfigError(
                "tokens must hold at least one pixel once decoding has begun, got shape " + str(tuple(tokens.shape))
            )
        if end > positions:
            raise ConfigError(f"tokens: the cache holds {positions} positions, {end} are needed")
        try:
            with self._loaded():
                x = self.wte(tokens)
                if start == 0:
                    x = torch.cat([self.sos.expand(x.shape[0], 1, -1), x], 1)
                h = x + self._positions(start, end, x.device)
                for layer, block in enumerate(self.blocks):
                    h = block(h, cache, layer)
                logits = self.head(self.ln_f(h[:, -1]))
        except (RuntimeError, TypeError, ValueError) as error:
            self._explain(error)
            raise
        cache.length = end
        return logits

    def draw_mask(self, batch_size: int, generator: torch.Generator | None = None) -> Tensor:
        """A mask for the bert objective: bool [B,T] on the model's device, True (hidden) with probability `mask_rate`.

        Raises:
            IgptError: an argument that is no number of images or no generator, named; or a number too large for the memory.
        """
        check_generator(generator)
        batch_size = check_int("batch_size", batch_size, 0, LARGEST)
        try:
            return self._draw_mask(batch_size, generator)
        except RuntimeError as error:
            raise ConfigError(f"batch_size must fit into memory with its mask, got {batch_size}") from error

    def _draw_mask(self, batch_size: int, generator: torch.Generator | None) -> Tensor:
        device = self.device if generator is None else generator.device
        uniform = torch.rand(batch_size, self.config.n_ctx, generator=generator, device=device)
        return (uniform < self.config.mask_rate).to(self.device)

    def _embed(self, tokens: Tensor, mask: Tensor | None) -> Tensor:
        """[B,T] -> [B,T,C]: ar shifts the start vector in and drops the last pixel; bert zeroes the hidden pixels."""
        x = self.wte(tokens)
        if self.sos is not None:
            x = torch.cat([self.sos.expand(x.shape[0], 1, -1), x[:, :-1]], 1)
        elif mask is not None:
            x = x * (~mask)[..., None]
        return x + self._positions(0, tokens.shape[1], x.device)

    def _positions(self, start: int, end: int, device: torch.device) -> Tensor:
        """Rows of the position table, [n,C]: read where that is the same as calling it, without a lookup."""
        if is_plain_table(self.wpe):
            return self.wpe.weight[start:end]
        return self.wpe(torch.arange(start, end, device=device))

    def _tokens(self, tokens: Any) -> Tensor:
        """The tokens of whole images, or for ``ar`` of their beginnings, checked, as int64."""
        config = self.config
        size = f"{config.height} x {config.width} = {config.n_ctx}"
        least = 1 if self.sos is not None else config.n_ctx
        tokens = check_tokens(tokens, context=size, least=least, most=config.n_ctx, colors=config.vocab_size)
        self._check_device(tokens)
        return tokens

    def _check_device(self, tokens: Tensor) -> None:
        # Hooks on the table may move what it is called with.
        if is_plain_table(self.wte) and tokens.device != self.wte.weight.device:
            raise ConfigError(f"tokens must be on the device of the weights ({self.wte.weight.device}), got {tokens.device}")

    @contextlib.contextmanager
    def _loaded(self) -> Iterator[None]:
        """The model's own start vector at hand in methods beside `forward`, where accelerate offloads it."""
        hook = getattr(self, "_hf_hook", None)
        if hook is not None:
            hook.pre_forward(self)
        try:
            yield
        finally:
            if hook is not None:
                hook.post_forward(self, None)

    @classmethod
    def from_pretrained(cls, source: str | Path, *, device: torch.device | str = "cpu") -> ImageGPT:
        """Read a model in Hugging Face ImageGPT format; see `igpt.model.huggingface.load`."""
        from igpt.model.huggingface import load

        return load(source, device=device)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, and its palette if it has one, in Hugging Face's format; see `igpt.model.huggingface.save`."""
        from igpt.model.huggingface import save

        save(self, folder)
