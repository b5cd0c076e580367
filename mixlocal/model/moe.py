"""The mixture-of-experts layer.  T = tokens, D = dim, E = experts, K = experts per token."""

from __future__ import annotations

import torch

from mixlocal.experts.runtime import ExpertRuntime, Routing


def route(hidden: torch.Tensor, router: torch.Tensor, top_k: int) -> Routing:
    """Softmax over all experts, the K largest, renormalised (Mixtral, arXiv 2401.04088, section 2.1).

    hidden: [T, D].  router: float32 [E, D].  Softmax over the K largest logits alone would give the same weights.
    """
    scores = torch.softmax(hidden @ router.T, dim=-1)
    weights, experts = scores.topk(top_k, dim=-1)
    return Routing(experts, weights / weights.sum(-1, keepdim=True))


def moe_layer(
    hidden: torch.Tensor, router: torch.Tensor, top_k: int, layer: int, experts: ExpertRuntime
) -> torch.Tensor:
    """[T, D] -> [T, D]."""
    return experts.apply(layer, hidden, route(hidden, router, top_k))
