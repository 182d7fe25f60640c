"""An independent dense reference: the same mathematics in float64, written plainly, sharing no code with the product.

Full weights by logical name; no tensor parallelism, no chunks, no fused loss, no padding of the vocabulary.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def logits(
    weights: dict[str, Tensor],
    shape,
    ids: Tensor,
    position_ids: Tensor,
    document_ids: Tensor | None = None,
    visibility: Tensor | None = None,
    mixture: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """[B, L] -> [B, L, V], every token seeing every token of its document, or those that `visibility` lets it.

    mixture: ids and shares [B, L, K] whose embeddings are added up instead of those of `ids`.
    """
    batch, length = ids.shape
    d = shape.hidden_size // shape.num_heads

    def norm(x: Tensor, gain: Tensor) -> Tensor:
        return x / (x.pow(2).mean(-1, keepdim=True) + shape.norm_eps).sqrt() * gain

    frequency = torch.tensor([shape.rope_theta ** (-2 * i / d) for i in range(d // 2)], dtype=torch.float64)
    angle = position_ids.double()[..., None] * frequency

    def rotate(x: Tensor) -> Tensor:  # [B, L, heads, d]: pairs (i, i + d/2) turn by the angle
        a, b = x[..., : d // 2], x[..., d // 2 :]
        c, s = angle.cos()[:, :, None], angle.sin()[:, :, None]
        return torch.cat((a * c - b * s, b * c + a * s), -1)

    x = weights["embedding.weight"][ids]
    if mixture is not None:
        x = (weights["embedding.weight"][mixture[0]] * mixture[1].double()[..., None]).sum(2)
    hidden = torch.zeros(batch, length, length, dtype=torch.bool)
    if document_ids is not None:
        hidden |= document_ids[:, :, None] != document_ids[:, None, :]
    if visibility is not None:
        rank, reach, group = visibility.unbind(-1)
        of_group = (group[:, :, None] == group[:, None, :]) & (group[:, :, None] >= 0)
        hidden |= (rank[:, None, :] > reach[:, :, None]) & ~of_group
    for i in range(shape.num_layers):
        w = {
            k: weights[f"blocks.{i}.{k}.weight"]
            for k in (
                "attention_norm",
                "q_proj",
                "k_proj",
                "v_proj",
                "o_proj",
                "ffn_norm",
                "gate_proj",
                "up_proj",
                "down_proj",
            )
        }
        y = norm(x, w["attention_norm"])
        q = rotate((y @ w["q_proj"].T).view(batch, length, shape.num_heads, d))
        k = rotate((y @ w["k_proj"].T).view(batch, length, shape.num_kv_heads, d))
        v = (y @ w["v_proj"].T).view(batch, length, shape.num_kv_heads, d)
        group = shape.num_heads // shape.num_kv_heads
        heads = []
        for h in range(shape.num_heads):
            scores = q[:, :, h] @ k[:, :, h // group].transpose(1, 2) / d**0.5
            scores = scores.masked_fill(hidden, float("-inf"))
            heads.append(scores.softmax(-1) @ v[:, :, h // group])
        x = x + torch.cat(heads, -1) @ w["o_proj"].T
        y = norm(x, w["ffn_norm"])
        gate = y @ w["gate_proj"].T
        x = x + (gate / (1 + (-gate).exp()) * (y @ w["up_proj"].T)) @ w["down_proj"].T
    head = weights.get("head.weight", weights["embedding.weight"])
    return norm(x, weights["final_norm.weight"]) @ head.T


def loss(weights: dict[str, Tensor], shape, batch: dict[str, Tensor], normalizer: float, values=None) -> Tensor:
    """sum over masked tokens of weight * value, divided by the normaliser.

    values: (probabilities [n, V], target, current, alpha [n]) -> [n]; None: cross-entropy.
    """
    mixture = (batch["soft_ids"], batch["soft_weights"]) if "soft_ids" in batch else None
    z = logits(
        weights,
        shape,
        batch["noisy_ids"],
        batch["position_ids"],
        batch["document_ids"],
        batch.get("visibility"),
        mixture,
    ).flatten(0, 1)
    target = batch["target_ids"].flatten()
    if values is None:
        value = F.cross_entropy(z, target, reduction="none")
    else:
        alpha = batch["alpha"].flatten().double() if "alpha" in batch else None
        value = values(z.softmax(-1), target, batch["noisy_ids"].flatten(), alpha)
    return (value.view_as(batch["weight"]) * batch["weight"].double() * batch["masked"]).sum() / normalizer


class AdamW:
    """Decoupled weight decay on matrices only, bias-corrected moments, global-norm clipping; all float64."""

    def __init__(self, weights: dict[str, Tensor], betas: tuple[float, float], eps: float, decay: float, clip: float):
        self.weights, self.betas, self.eps, self.decay, self.clip = weights, betas, eps, decay, clip
        self.m = {k: torch.zeros_like(w) for k, w in weights.items()}
        self.v = {k: torch.zeros_like(w) for k, w in weights.items()}
        self.steps = 0

    def step(self, gradients: dict[str, Tensor], lr: float) -> float:
        """Updates the weights in place; returns the gradient norm before clipping."""
        self.steps += 1
        norm = sum(float((g * g).sum()) for g in gradients.values()) ** 0.5
        scale = min(1.0, self.clip / norm) if self.clip else 1.0
        b1, b2 = self.betas
        with torch.no_grad():
            for name, w in self.weights.items():
                g = gradients[name] * scale
                if w.dim() > 1:
                    w.mul_(1 - lr * self.decay)
                self.m[name].mul_(b1).add_(g, alpha=1 - b1)
                self.v[name].mul_(b2).add_(g * g, alpha=1 - b2)
                m, v = self.m[name] / (1 - b1**self.steps), self.v[name] / (1 - b2**self.steps)
                w.sub_(lr * m / (v.sqrt() + self.eps))
        return norm


def gradients(weights: dict[str, Tensor], value: Tensor) -> dict[str, Tensor]:
    return dict(zip(weights, torch.autograd.grad(value, list(weights.values()))))
