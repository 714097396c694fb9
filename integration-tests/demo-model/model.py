"""The demo model: a small Llama, written out so that it compiles to few kernels on a CPU."""
import dataclasses

import torch
import torch.nn.functional as F
from torch import nn


@dataclasses.dataclass(frozen=True)
class Shape:
    vocab_size: int = 2048
    hidden_size: int = 256
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    intermediate_size: int = 512
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    max_positions: int = 2048


def rotate(x, cos, sin):
    """Rotary embedding with the two halves of a head as pairs, as Hugging Face checkpoints have it."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def attend(query, key, value):
    """Causal attention, [batch, heads, length, head_dim]."""
    batch, heads, length, head_dim = query.shape
    if length > 128:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    # On a CPU, torch's flash kernel takes 2.5 times as long as this for short rows (93 against 37 ms, 64 rows of 128).
    query, key, value = (x.reshape(batch * heads, length, head_dim) for x in (query * head_dim**-0.5, key, value))
    future = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    weights = torch.bmm(query, key.transpose(1, 2)).float().masked_fill(future, -1e9).softmax(-1).bfloat16()
    return torch.bmm(weights, value).view(batch, heads, length, head_dim)


class Norm(nn.Module):
    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight).to(torch.bfloat16)


def linear(rows, columns, scale=1.0):
    weight = torch.empty(rows, columns)
    nn.init.normal_(weight, std=scale * columns**-0.5)
    return nn.Parameter(weight)


class Layer(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        hidden, kv = shape.hidden_size, shape.num_kv_heads * shape.head_dim
        self.attention_norm = Norm(hidden, shape.norm_eps)
        self.q = linear(shape.num_heads * shape.head_dim, hidden)
        self.k = linear(kv, hidden)
        self.v = linear(kv, hidden)
        self.o = linear(hidden, shape.num_heads * shape.head_dim, 0.2)
        self.mlp_norm = Norm(hidden, shape.norm_eps)
        self.gate = linear(shape.intermediate_size, hidden)
        self.up = linear(shape.intermediate_size, hidden)
        self.down = linear(hidden, shape.intermediate_size, 0.2)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        shape = self.shape
        normed = self.attention_norm(x)
        qkv = F.linear(normed, torch.cat((self.q, self.k, self.v)).bfloat16())
        heads = qkv.view(batch, length, -1, shape.head_dim).transpose(1, 2)
        query, key, value = heads.split((shape.num_heads, shape.num_kv_heads, shape.num_kv_heads), dim=1)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        groups = shape.num_heads // shape.num_kv_heads
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        attended = attend(query, key, value)
        x = x + F.linear(attended.transpose(1, 2).reshape(batch, length, -1), self.o.bfloat16())
        normed = self.mlp_norm(x)
        gate, up = F.linear(normed, torch.cat((self.gate, self.up)).bfloat16()).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down.bfloat16())


class Model(nn.Module):
    """Parameters in f32, computation in bf16 (what both the CPU's and a GPU's matrix units want), norms and loss in f32."""

    def __init__(self, shape):
        super().__init__()
        self.shape = shape
        self.embedding = nn.Parameter(torch.empty(shape.vocab_size, shape.hidden_size).normal_(std=0.05))
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_layers))
        self.norm = Norm(shape.hidden_size, shape.norm_eps)
        frequencies = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        angles = torch.outer(torch.arange(shape.max_positions).float(), frequencies)
        self.register_buffer("cos", angles.cos().bfloat16(), persistent=False)
        self.register_buffer("sin", angles.sin().bfloat16(), persistent=False)

    def hidden(self, tokens):
        x = F.embedding(tokens, self.embedding).bfloat16()
        cos, sin = self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]]
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.norm(x)

    def logits(self, hidden):
        return F.linear(hidden, self.embedding.bfloat16()).float()
