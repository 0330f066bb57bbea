"""The language layers: a forward pass of our own over the weights that transformers loaded.

It computes what transformers' forward computes, with explicit positions and a `MemoryPass` for attention. What
lies between two attention calls is one function of tensors, the same for every layer, that can be compiled; the
products of a query, key and value, and of gate and up, are one product each.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .attention import MemoryPass


@dataclass(frozen=True, slots=True, eq=False)
class AttentionWeights:
    """What makes queries, keys and values of a layer's input."""

    norm: Tensor
    qkv: Tensor  # ((heads + 2 * kv_heads) * head_dim, hidden)
    qkv_bias: Tensor | None
    query_norm: Tensor | None  # (head_dim,)
    key_norm: Tensor | None
    eps: float
    num_heads: int
    num_kv_heads: int


@dataclass(frozen=True, slots=True, eq=False)
class MlpWeights:
    """What follows attention in a layer; `mlp` is transformers' own module where it is no plain gated one."""

    out: Tensor  # (hidden, heads * head_dim)
    out_bias: Tensor | None
    norm: Tensor
    gate_up: Tensor | None  # (2 * intermediate, hidden)
    down: Tensor | None
    eps: float
    mlp: nn.Module | None = None


class LanguageModel:
    """Runs the layers. `before`, `after`, `project` and `join` are what may be compiled."""

    def __init__(self, model: Any, config: Any) -> None:
        self._model = model
        self._layers = [_layer_weights(layer, config) for layer in model.layers]
        self._devices = [layer.norm.device for layer, _ in self._layers]
        self._scale = float(model.layers[0].self_attn.scaling)
        self.before: Callable[..., tuple[Tensor, Tensor, Tensor]] = before_attention
        self.after: Callable[..., Tensor] = after_attention
        self.project: Callable[..., Tensor] = project
        self.join: Callable[..., tuple[Tensor, Tensor]] = join_layers

    @property
    def is_dense(self) -> bool:
        """Whether every layer's MLP is a plain gated one."""
        return all(rest.mlp is None for _, rest in self._layers)

    @property
    def is_whole(self) -> bool:
        """Whether all of it lies on one device."""
        return len(set(self._devices)) == 1

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_heads(self) -> int:
        return self._layers[0][0].num_heads

    @property
    def scale(self) -> float:
        """What attention scores are multiplied with."""
        return self._scale

    def rotation(self, positions: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """Cos and sin (head_dim,), float32, that turn a rotated query or key on by so many positions on each axis."""
        rotary = self._model.rotary_emb
        axes = torch.tensor(positions, device=rotary.inv_freq.device)[:, None, None]
        # What it also scales with is in every key already.
        cos, sin = (table[0, 0] / rotary.attention_scaling for table in rotary(rotary.inv_freq.float(), axes))
        return cos, sin

    def run(
        self,
        embeds: Tensor,
        positions: Tensor,
        memory: MemoryPass,
        deepstack: Sequence[Tensor] = (),
        between: Callable[[], None] | None = None,
    ) -> Tensor:
        """Run all layers over embeds (batch, n, hidden) at positions (3, batch, n).

        deepstack holds what is added after each of the first layers, (batch, n, hidden). `between` is called
        between two layers. Returns hidden states (batch, n, hidden).
        """
        batch, n, _ = embeds.shape
        tables = _OnDevices(self.tables(embeds, positions))
        x = embeds.flatten(0, 1)
        for number in range(self.num_layers):
            device = self._devices[number]
            x = x.to(device)
            q, k, v = self.begin(number, x, *tables.on(device))
            rows = (part.unflatten(0, (batch, n)).transpose(1, 2) for part in (q, k, v))
            attended = memory.attend(number, *rows, self._scale)
            x = self.end(number, x, attended.reshape(batch * n, -1))
            if number < len(deepstack):
                x = x + deepstack[number].flatten(0, 1).to(x)
            if between is not None:
                between()
        return self.normed(x).unflatten(0, (batch, n))

    def tables(self, embeds: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin (batch * n, 1, head_dim) at positions (3, batch, n)."""
        cos, sin = self._model.rotary_emb(embeds, positions)
        return cos.flatten(0, 1)[:, None], sin.flatten(0, 1)[:, None]

    def begin(self, number: int, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """A layer up to its attention: q (tokens, heads, head_dim), k and v of x (tokens, hidden)."""
        return self.before(x, cos, sin, self._layers[number][0])

    def end(self, number: int, x: Tensor, attended: Tensor) -> Tensor:
        """The rest of a layer; attended (tokens, heads * head_dim)."""
        return self.after(x, attended, self._layers[number][1])

    def enter(self, x: Tensor) -> Tensor:
        """The first layer's products before its attention, for `rotate`; x (tokens, hidden)."""
        return self.project(x, self._layers[0][0])

    def cross(self, number: int, x: Tensor, attended: Tensor) -> tuple[Tensor, Tensor]:
        """The rest of a layer, and the next one's products before its attention."""
        return self.join(x, attended, self._layers[number][1], self._layers[number + 1][0])

    def weights(self, number: int) -> AttentionWeights:
        return self._layers[number][0]

    def normed(self, x: Tensor) -> Tensor:
        """What the last layer gives, ready for logits."""
        norm = self._model.norm
        return _rms_norm(x.to(norm.weight.device), norm.weight, norm.variance_epsilon)


class _OnDevices:
    """The rotary tables, (tokens, 1, head_dim) each, copied to further devices only once."""

    def __init__(self, tables: tuple[Tensor, Tensor]) -> None:
        self._tables = {tables[0].device: tables}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._tables:
            cos, sin = next(iter(self._tables.values()))
            self._tables[device] = (cos.to(device), sin.to(device))
        return self._tables[device]


def before_attention(x: Tensor, cos: Tensor, sin: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise, project and rotate x (tokens, hidden): q (tokens, heads, head_dim), k and v with the K/V heads."""
    return _rotated_heads(
        F.linear(_rms_norm(x, weights.norm, weights.eps), weights.qkv, weights.qkv_bias), cos, sin, weights
    )


def project(x: Tensor, weights: AttentionWeights) -> Tensor:
    """Normalise and project x (tokens, hidden), without the bias: (tokens, (heads + 2 * kv_heads) * head_dim)."""
    return F.linear(_rms_norm(x, weights.norm, weights.eps), weights.qkv)


def rotate(qkv: Tensor, cos: Tensor, sin: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    """What `before_attention` makes of x, from what `project` makes of it."""
    return _rotated_heads(qkv if weights.qkv_bias is None else qkv + weights.qkv_bias, cos, sin, weights)


def join_layers(x: Tensor, attended: Tensor, rest: MlpWeights, following: AttentionWeights) -> tuple[Tensor, Tensor]:
    """From a layer's attention to the next one's: `after_attention`, and `project` of what it gives."""
    x = after_attention(x, attended, rest)
    return x, project(x, following)


def _rotated_heads(qkv: Tensor, cos: Tensor, sin: Tensor, weights: AttentionWeights) -> tuple[Tensor, Tensor, Tensor]:
    num_kv = weights.num_kv_heads
    qkv = qkv.unflatten(-1, (weights.num_heads + 2 * num_kv, -1))
    q, k, v = qkv.split([weights.num_heads, num_kv, num_kv], dim=1)
    if weights.query_norm is not None and weights.key_norm is not None:
        q, k = _rms_norm(q, weights.query_norm, weights.eps), _rms_norm(k, weights.key_norm, weights.eps)
    return _rotated(q, cos, sin), _rotated(k, cos, sin), v


def after_attention(x: Tensor, attended: Tensor, weights: MlpWeights) -> Tensor:
    """The rest of a layer; x (tokens, hidden), attended (tokens, heads * head_dim)."""
    x = _plus(x, F.linear(attended, weights.out, weights.out_bias))
    normed = _rms_norm(x, weights.norm, weights.eps)
    if weights.gate_up is None or weights.down is None:
        assert weights.mlp is not None
        return x + weights.mlp(normed[None])[0]
    gate, up = F.linear(normed, weights.gate_up).chunk(2, dim=-1)
    return _plus(x, F.linear(F.silu(gate) * up, weights.down))


def _plus(x: Tensor, product: Tensor) -> Tensor:
    """Their sum, which a compiler does together with what comes next.

    Of a plain sum it would make one product on top of x, which has to be copied first.
    """
    return (x.float() + product).to(x.dtype) if torch.compiler.is_compiling() else x + product


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """In float32, as the Qwen models have it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin


def _layer_weights(layer: Any, config: Any) -> tuple[AttentionWeights, MlpWeights]:
    attention, norm = layer.self_attn, layer.post_attention_layernorm
    qkv, bias = fuse([attention.q_proj, attention.k_proj, attention.v_proj])
    is_gated = config.hidden_act == "silu" and all(
        type(getattr(layer.mlp, name, None)) is nn.Linear and getattr(layer.mlp, name).bias is None
        for name in ("gate_proj", "up_proj", "down_proj")
    )
    gate_up = fuse([layer.mlp.gate_proj, layer.mlp.up_proj])[0] if is_gated else None
    return (
        AttentionWeights(
            norm=layer.input_layernorm.weight,
            qkv=qkv,
            qkv_bias=bias,
            query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
            key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
            eps=float(layer.input_layernorm.variance_epsilon),
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
        ),
        MlpWeights(
            out=attention.o_proj.weight,
            out_bias=attention.o_proj.bias,
            norm=norm.weight,
            gate_up=gate_up,
            down=layer.mlp.down_proj.weight if is_gated else None,
            eps=float(norm.variance_epsilon),
            mlp=None if is_gated else layer.mlp,
        ),
    )


@torch.no_grad()
def fuse(linears: Sequence[nn.Linear]) -> tuple[Tensor, Tensor | None]:
    """One weight and bias for several products of one input; the modules' own become views of it."""
    weight = torch.cat([linear.weight for linear in linears])
    bias = None if linears[0].bias is None else torch.cat([linear.bias for linear in linears])
    at = 0
    for linear in linears:
        rows = slice(at, at + linear.weight.shape[0])
        linear.weight = nn.Parameter(weight[rows], requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias[rows], requires_grad=False)
        at = rows.stop
    return weight, bias
