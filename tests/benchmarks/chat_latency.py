"""How long a chat lets one wait for the first token: fresh, in its second turn, and when it is gone on with.

    .venv/bin/python tests/benchmarks/chat_latency.py smolmix:q8 [--history 1500] [--rounds 7]

The three are taken in turns; medians, and ratios to the fresh one. "Gone on with" counts reading the KV cache from its
file and the first token, not the loading of the model.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from mixlocal.app.chat import Chat
from mixlocal.app.saved_chat import About, SavedChat
from mixlocal.app.session import Session
from mixlocal.engine.params import SamplingParams
from mixlocal.store.paths import home
from mixlocal.store.session_db import SessionDb

TEXT = Path(__file__).parents[2] / "mixlocal" / "data" / "evaluation.txt"
QUESTION = "What happens in it, in one sentence?"
PARAMS = SamplingParams(max_tokens=4, temperature=0, seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--history", type=int, default=1500)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with Session.open(arguments.model) as session, tempfile.TemporaryDirectory() as folder:
        folders = home(Path(folder))
        with SessionDb(folders.sessions_db) as db:
            rounds = [one_round(session, db, folders, arguments.history) for _ in range(arguments.rounds + 1)][1:]
    print(f"{arguments.model}, {rounds[0]['tokens']:.0f} tokens of history, {len(rounds)} rounds")
    fresh = median(one["fresh"] for one in rounds)
    for name in ("fresh", "second turn", "gone on with", "its file read", "without its file"):
        ratios = sorted(one[name] / one["fresh"] for one in rounds)
        print(
            f"{name:18}{1000 * median(one[name] for one in rounds):8.1f} ms   {median(ratios):6.2f} times "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}); medians' ratio {median(one[name] for one in rounds) / fresh:.2f}"
        )


def one_round(session: Session, db: SessionDb, folders, history: int) -> dict[str, float]:
    fresh = first_token(Chat(session, params=PARAMS), QUESTION)
    saved = SavedChat(db, folders, About(session.name, session.variant, "", PARAMS))
    chat = Chat(session, params=PARAMS, record=saved)
    first_token(chat, text_of(session, history))
    tokens = chat.cache.length
    second = first_token(chat, QUESTION)
    saved.save_cache(chat)
    turns = list(chat.turns)
    start = time.perf_counter()
    again = Chat(session, params=PARAMS, turns=turns, record=saved)
    assert not saved.restore_cache(again)
    restored = time.perf_counter() - start
    resumed = restored + first_token(again, QUESTION)
    without = first_token(Chat(session, params=PARAMS, turns=turns), QUESTION)
    return {
        "fresh": fresh, "second turn": second, "gone on with": resumed, "its file read": restored,
        "without its file": without, "tokens": tokens,
    }  # fmt: skip


def first_token(chat: Chat, text: str) -> float:
    """Seconds to it; the answer is taken to its end."""
    start = time.perf_counter()
    first = 0.0
    with chat.send(text) as answer:
        for chunk in answer:
            if chunk.choice is not None and not first:
                first = time.perf_counter() - start
    return first


def text_of(session: Session, tokens: int) -> str:
    ids = session.tokenizer.encode(TEXT.read_text())[:tokens]
    return session.tokenizer.decode(ids)


if __name__ == "__main__":
    main()
