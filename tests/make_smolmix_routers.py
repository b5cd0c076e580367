"""Make mixlocal/data/smolmix_routers.safetensors: what each of smolmix's routers sends where.

    python tests/make_smolmix_routers.py WHEEL_FOLDER/SmolLM2-135M-Instruct.Q4_1.gguf

A router's rows are k-means centroids, by cosine, of the hidden states that its layer sees while the dense model reads a
text. The hidden states share a large mean; its direction is projected out first, so a row times a hidden state needs no
bias. One factor per layer then sets how decided the router is.

Shapes: L = layers, E = experts, D = hidden size, N = tokens of the text, K = restarts of k-means.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch.nn.functional import normalize, one_hot
from transformers import MixtralForCausalLM

import mixlocal
from mixlocal.app.smolmix import ROUTERS, build_checkpoint

TEXT = Path(mixlocal.__file__).parent / "data" / "calibration.txt"
N_EXPERTS = 8
CHUNK = 512  # tokens that are read together
RESTARTS = 32
ITERATIONS = 25
LEAST_LOAD, MOST_LOAD = 0.07, 0.16  # of all choices, on the text; another text strays by a few points
FIRST_WEIGHT = 0.65  # mean weight of the first of the two experts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path, help="the model, with its LICENSE beside it")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--out", type=Path, default=ROUTERS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)  # so that sums, and the file, are the same on machines with more cores
    generator = torch.Generator().manual_seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        for _ in build_checkpoint(args.gguf, Path(folder), n_experts=1, dither=0):
            pass
        states = hidden_states(Path(folder), args.text)
    routers = torch.stack([layer_router(layer, generator) for layer in states]).to(torch.float16)
    args.out.write_bytes(save({"routers": routers}))
    for layer, (state, router) in enumerate(zip(states, routers, strict=True)):
        shares = " ".join(f"{share:5.1%}" for share in loads(state @ router.float().T).sort().values)
        print(f"layer {layer:2}: {shares}")


@torch.inference_mode()
def hidden_states(checkpoint: Path, text: Path) -> torch.Tensor:
    """What every router would see, [L, N, D]."""
    model = MixtralForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode(text.read_text(encoding="utf-8")).ids
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    for layer, states in zip(model.model.layers, seen, strict=True):
        layer.mlp.register_forward_pre_hook(lambda _, args, states=states: states.append(args[0][0]))
    for chunk in torch.tensor(ids).split(CHUNK):
        model(chunk[None])
    return torch.stack([torch.cat(states) for states in seen])


def layer_router(states: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """States [N, D] -> the weight of one router, [E, D]."""
    axis = normalize(states.mean(dim=0), dim=0)
    directions = normalize(without(states - states.mean(dim=0), axis), dim=1)
    runs = kmeans(directions, generator)
    rows = min(runs, key=lambda centroids: shortcomings(directions @ centroids.T))
    rows = normalize(without(rows, axis), dim=1)
    return rows * decided(states @ rows.T)


def without(vectors: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """[N, D] less its components along the unit vector `axis` [D]."""
    return vectors - (vectors @ axis)[:, None] * axis


def kmeans(directions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Spherical k-means (Dhillon and Modha 2001) from K starts: unit vectors [N, D] -> unit centroids [K, E, D]."""
    picks = [torch.randperm(len(directions), generator=generator)[:N_EXPERTS] for _ in range(RESTARTS)]
    centroids = directions[torch.cat(picks)]  # [K * E, D]
    for _ in range(ITERATIONS):
        nearest = (directions @ centroids.T).view(-1, RESTARTS, N_EXPERTS).argmax(dim=2)
        members = one_hot(nearest, N_EXPERTS).flatten(1).float()  # [N, K * E]
        sums = members.T @ directions
        centroids = normalize(torch.where(sums.any(dim=1, keepdim=True), sums, centroids), dim=1)
    return centroids.view(RESTARTS, N_EXPERTS, -1)


def loads(logits: torch.Tensor) -> torch.Tensor:
    """Each expert's share of all top-2 choices, [E], from logits [N, E]."""
    return logits.topk(2, dim=1).indices.flatten().bincount(minlength=N_EXPERTS) / (2 * len(logits))


def shortcomings(similarities: torch.Tensor) -> tuple[float, float]:
    """What makes one run worse than another, from [N, E]: loads out of bounds, and then loose clusters."""
    shares = loads(similarities)
    excess = max(shares.max().item() - MOST_LOAD, LEAST_LOAD - shares.min().item(), 0.0)
    return excess, -similarities.amax(dim=1).mean().item()


def decided(logits: torch.Tensor) -> float:
    """The factor on logits [N, E] for which the first expert's weight averages FIRST_WEIGHT."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    low, high = 0.0, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        too_high = torch.sigmoid((first - second) * middle).mean().item() > FIRST_WEIGHT
        low, high = (low, middle) if too_high else (middle, high)
    return low


if __name__ == "__main__":
    main()
