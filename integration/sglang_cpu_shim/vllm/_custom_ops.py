"""The rotary embedding that SGLang takes from vLLM on a CPU, in torch."""

import torch


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    """Rotate ``query`` and ``key`` (tokens, heads * head_size) in place by their positions."""
    cos, sin = cos_sin_cache[positions.flatten()].unsqueeze(1).chunk(2, dim=-1)
    rotated = 2 * cos.shape[-1]
    for states in (query, key):
        if states is None:
            continue
        heads = states.view(states.shape[0], -1, head_size)[..., :rotated]
        if is_neox:
            first, second = heads.chunk(2, dim=-1)
        else:
            first, second = heads[..., ::2], heads[..., 1::2]
        turned = first * cos - second * sin, second * cos + first * sin
        heads.copy_(torch.cat(turned, -1) if is_neox else torch.stack(turned, -1).flatten(-2))
