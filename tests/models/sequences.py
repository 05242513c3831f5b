"""Recurrent models and transformers."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LSTMModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.lstm = nn.LSTM(6, 8, num_layers=2, dropout=0.2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(16, 9)

    def forward(self, ids: Tensor) -> Tensor:
        out, (h, c) = self.lstm(self.embed(ids))
        last = c[-1].unsqueeze(1).expand(-1, ids.size(1), -1)
        return self.head(torch.cat([self.norm(out), last + h[0].unsqueeze(1)], dim=-1))


class GRUModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(4, 6)
        self.gru = nn.GRU(6, 4, bidirectional=True)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.gru(torch.tanh(self.inp(x)).transpose(0, 1))
        return self.head(y.transpose(0, 1)[:, -1])


class TransformerModel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, dim_feedforward=12, dropout=0.1, batch_first=True)
            for _ in range(2)
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(1))


class CausalAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, c = x.size()
        q, k, v = self.qkv(x).split(c, dim=2)
        q = q.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        k = k.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        v = v.view(b, t, self.heads, c // self.heads).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(~mask[:t, :t], float("-inf"))
        y = self.dropout(F.softmax(att, dim=-1)) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(b, t, c))


class GPTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln1 = nn.LayerNorm(8)
        self.attn = CausalAttention(8, 2)
        self.ln2 = nn.LayerNorm(8)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = x + self.attn(self.ln1(x), mask)
        return x + self.mlp(self.ln2(x))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 8)
        self.wpe = nn.Embedding(8, 8)
        self.blocks = nn.ModuleList(GPTBlock() for _ in range(3))
        self.ln = nn.LayerNorm(8)
        self.head = nn.Linear(8, 11, bias=False)
        self.wte.weight = self.head.weight

    def forward(self, ids: Tensor) -> Tensor:
        t = ids.shape[1]
        mask = torch.tril(torch.ones(t, t, dtype=torch.bool, device=ids.device))
        pos = torch.arange(0, t, dtype=torch.long, device=ids.device)
        x = self.wte(ids) + self.wpe(pos)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.ln(x))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin


class RotaryAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8, bias=False)
        self.k = nn.Linear(8, 8, bias=False)
        self.v = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True
        )
        return x + y.transpose(1, 2).flatten(2)


class RotaryModel(nn.Module):
    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.register_buffer(
            "inv_freq", 1.0 / (100.0 ** (torch.arange(0, 4, 2).float() / 4)), persistent=False
        )
        self.layers = nn.ModuleList(RotaryAttention() for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            freqs = torch.outer(
                torch.arange(x.size(1), device=x.device).to(self.inv_freq), self.inv_freq
            )
            angles = torch.cat((freqs, freqs), dim=-1)
            cos, sin = angles.cos(), angles.sin()
        h = self.embed(x)
        for layer in self.layers:
            h = layer(h, cos, sin)
        return self.head(h)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp = nn.Linear(5, 8)
        self.memory = nn.Linear(4, 8)
        self.attn = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        query, memory = self.inp(x), self.memory(memory)
        y, weights = self.attn(query, memory, memory, need_weights=True)
        return self.head(self.norm(query + y)), weights


class TimeLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.cell = nn.GRUCell(6, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        h = torch.zeros(x.shape[0], 6, dtype=x.dtype, device=x.device)
        for t in range(x.shape[1]):
            h = self.cell(x[:, t], h)
        return self.head(h)


class UnbindLoop(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 6)
        self.step = nn.Linear(12, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        state = torch.zeros_like(x[:, 0])
        outputs = []
        for step in x.unbind(1):
            state = torch.tanh(self.step(torch.cat([step, state], -1)))
            outputs.append(state)
        return self.head(torch.stack(outputs, dim=1))
