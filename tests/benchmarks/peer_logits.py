"""llama.cpp's logits of the second half of some chunks, for quality_against_peer.py: float32 [tokens, V] on stdout.

    peer-venv/bin/python peer_logits.py MODEL.gguf CHUNKS.json [--threads 2]

CHUNKS.json: a list of lists of token ids, all as long; of each, the tokens from the middle to the last but one are
scored. Needs llama-cpp-python and NumPy, and nothing of ours.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import sys
from pathlib import Path

import llama_cpp as peer
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("chunks", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    chunks = json.loads(args.chunks.read_text())
    size = len(chunks[0])
    quiet = peer.llama_log_callback(lambda *_: None)
    peer.llama_log_set(quiet, ctypes.c_void_p(0))
    peer.llama_backend_init()
    model = peer.llama_model_load_from_file(args.model.encode(), peer.llama_model_default_params())
    params = peer.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = size
    params.n_threads = params.n_threads_batch = args.threads
    context = peer.llama_init_from_model(model, params)
    vocab = peer.llama_vocab_n_tokens(peer.llama_model_get_vocab(model))
    for chunk in chunks:
        peer.llama_memory_clear(peer.llama_get_memory(context), True)
        batch = peer.llama_batch_init(size, 0, 1)
        batch.n_tokens = size - 1
        for position, token in enumerate(chunk[:-1]):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = position >= size // 2
        if peer.llama_decode(context, batch) != 0:
            raise SystemExit("llama_decode failed")
        for position in range(size // 2, size - 1):
            row = np.ctypeslib.as_array(peer.llama_get_logits_ith(context, position), shape=(vocab,))
            sys.stdout.buffer.write(row.astype(np.float32).tobytes())
        peer.llama_batch_free(batch)


if __name__ == "__main__":
    main()
