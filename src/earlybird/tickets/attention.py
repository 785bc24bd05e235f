"""torch.nn.MultiheadAttention with fewer heads than its width holds: the heads that stay keep their size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrunedAttention(nn.MultiheadAttention):
    """What `torch.nn.MultiheadAttention` becomes when heads are cut: same parameters, same call, same answers.

    Its own forward pass takes the size of a head from the input's width, ``embed_dim / num_heads``, and cannot be used.
    Made by `earlybird.shrink`, never built; ``torch.nn.TransformerEncoderLayer`` calls it instead of its fused kernel.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See `torch.nn.MultiheadAttention.forward`."""
        batched, batch_first = query.dim() == 3, self.batch_first
        if not batched:
            query, key, value = (tensor.unsqueeze(0) for tensor in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not batch_first:
            query, key, value = (tensor.transpose(0, 1) for tensor in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask = self._mask(query, k, attn_mask, key_padding_mask, is_causal)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = (functional.pad(tensor, (0, 0, 0, 1)) for tensor in (k, v))
        if mask is not None:
            mask = functional.pad(mask, (0, k.shape[1] - mask.shape[-1]))  # what was appended is seen by all
        q, k, v = (tensor.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2) for tensor in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            logits = q @ k.transpose(-1, -2) * self.head_dim**-0.5  # (N, heads, L, S)
            weights = (logits if mask is None else logits + mask).softmax(dim=-1)
            weights = functional.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            heads = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        output = self.out_proj(heads.transpose(1, 2).flatten(2))  # (N, L, E)
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output if batch_first else output.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        fused = self._parameters["in_proj_weight"]
        apart = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        weights = apart if fused is None else fused.chunk(3)
        return [functional.linear(*parts) for parts in zip((query, key, value), weights, biases)]

    def _mask(
        self, query: Tensor, k: Tensor, attn_mask: Tensor | None, key_padding_mask: Tensor | None, is_causal: bool
    ) -> Tensor | None:
        """Return what is added to the logits, broadcastable to (N, heads, L, S)."""
        if is_causal and attn_mask is None:
            raise RuntimeError("Need attn_mask if specifying the is_causal hint.")
        total: Tensor | None = None
        if attn_mask is not None:
            if attn_mask.dim() == 3:  # (N * heads, L, S): of the heads that were there, nobody knows which stayed
                if attn_mask.shape[0] != len(query) * self.num_heads:
                    raise RuntimeError(
                        f"attn_mask is for {attn_mask.shape[0] // len(query)} heads, and {self.num_heads} are left"
                    )
                attn_mask = attn_mask.unflatten(0, (len(query), self.num_heads))
            total = _added(attn_mask, query)
        if key_padding_mask is not None:
            padding = _added(key_padding_mask, query)[:, None, None, :]
            total = padding if total is None else total + padding
        return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))
