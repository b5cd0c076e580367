"""What a peer's formats cost, by the definitions and on the text of `mixlocal quality`: Markdown on stdout.

    python tests/benchmarks/quality_against_peer.py --peer-python peer-venv/bin/python --tokenizer smolmix:bf16
        reference.gguf q4_0.gguf q4_1.gguf [--threads 2]

Files made by to_gguf.py of one checkpoint, the first with bf16 experts: each is compared with what llama.cpp itself
computes of that. The tokenizer is that of an installed model of the same checkpoint.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from mixlocal.app.installed import find_store
from mixlocal.app.quality.divergence import divergence, join, perplexity, score
from mixlocal.app.quality.text import Chunks, cut, n_scored, read_text
from mixlocal.app.tokenizers import load_tokenizer
from mixlocal.store.paths import home

PEER = Path(__file__).parent / "peer_logits.py"


def logits(args: argparse.Namespace, model: str, chunks: Chunks, vocab_size: int) -> Iterator[torch.Tensor]:
    """Of each chunk's scored half, float32 [T, V]."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([chunks.chunk(number) for number in range(chunks.count)], file)
        file.flush()
        command = [args.peer_python, str(PEER), model, file.name, "--threads", str(args.threads)]
        rows = n_scored(chunks.context)
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            for _ in range(chunks.count):
                data = bytearray(process.stdout.read(4 * rows * vocab_size))
                yield torch.frombuffer(data, dtype=torch.float32).view(rows, vocab_size)
        if process.returncode != 0:
            raise SystemExit(f"{model}: the peer failed")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="GGUF files; the first is the reference")
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--tokenizer", default="smolmix", help="an installed model")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    tokenizer = load_tokenizer(find_store(args.tokenizer, home()))
    chunks = cut(read_text(args.text), tokenizer, args.ctx, None, args.tokenizer)
    reference = list(logits(args, args.models[0], chunks, tokenizer.vocab_size))
    half = args.ctx // 2
    print("| file | bytes | perplexity | mean KL | same top | tokens |\n|---|---|---|---|---|---|")
    for model in args.models:
        parts = []
        for number, found in enumerate(logits(args, model, chunks, tokenizer.vocab_size)):
            targets = torch.tensor(chunks.chunk(number)[half + 1 :])
            parts.append(score(found, targets, reference[number]))
        scores = join(parts)
        value, off = perplexity(scores), divergence(scores)
        size = Path(model).stat().st_size / 1e6
        print(
            f"| {Path(model).name} | {size:.0f} MB | {value.value:.3f} ± {value.error:.3f} | "
            f"{off.mean_kl:.5f} ± {off.mean_kl_error:.5f} | {100 * off.same_top:.1f} % | {len(scores.nll)} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
