"""A batch from its rows to its output, interrupted, changed and mixed up in every way, with a double for the model."""

from __future__ import annotations

import json
import random
import resource
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import pytest
from batch_double import Behaviour, Double, text_of

from mixlocal.app.batch import fingerprint as fingerprint_module
from mixlocal.app.batch.engine import Pulse, Reply, Request
from mixlocal.app.batch.job import Batch, Progress
from mixlocal.app.batch.opening import Terms
from mixlocal.app.batch.row_template import RowTemplate
from mixlocal.app.batch.setup import Setup
from mixlocal.app.batch.source import Source
from mixlocal.app.json_form import ANY_OBJECT, JsonForm
from mixlocal.engine.params import SamplingParams
from mixlocal.errors import MixlocalError, NetworkError, RefusedError
from mixlocal.store.batch_folder import batch_folder


@dataclass
class Bench:
    """Runs batches whose input and output lie in `place`."""

    place: Path
    setup: Setup = field(default_factory=lambda: Setup("jsonl"))

    @property
    def out(self) -> Path:
        return self.place / "out.jsonl"

    def write(self, *rows: Any) -> None:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.place / "in.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def go(
        self, double: Double | None = None, *, order: Any = "input", limit: int | None = None,
        during: Callable[[Batch, Progress], None] | None = None, **terms: Any,
    ) -> Outcome:  # fmt: skip
        """To the end, or until the batch was stopped."""
        double = double or Double()
        source = Source(self.place / "in.jsonl", "in.jsonl", self.setup, limit)
        wanted = Terms(double.identity, terms.pop("defaults", double.defaults), **{"seed": 1} | terms)
        with batch_folder(self.out) as folder, Batch(folder, source, source.survey(), wanted) as job:
            if job.left and not job.stopped:
                for progress in job.run(double.open()):
                    if during:
                        during(job, progress)
            written = None if job.left else job.publish(order)
        return Outcome(job, double, written)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.read_text().splitlines()]

    def texts(self) -> dict[str, str]:
        return {line["custom_id"]: content(line) for line in self.lines()}


@dataclass
class Outcome:
    job: Batch
    double: Double
    written: bool | None

    @property
    def asked(self) -> list[str]:
        return sorted(request.id for request in self.double.requests)


def content(line: dict[str, Any]) -> str:
    if line["error"]:
        return f"error {line['error']['code']}"
    choice = line["response"]["body"]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


def rows(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{n}", "prompt": f"question {n}"} for n in range(count)]


def same(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without what differs between two runs."""
    return [without(without(line, "timings"), "created") for line in lines]


def without(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        return {key: without(inner, name) for key, inner in value.items() if key != name}
    return value


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_every_row_has_one_line_in_order(bench: Bench) -> None:
    bench.write(*rows(50))
    outcome = bench.go(Double(Behaviour(delay=0.002)))
    assert [line["custom_id"] for line in bench.lines()] == [f"r{n}" for n in range(50)]
    assert bench.texts() == {request.id: text_of(request) for request in outcome.double.requests}
    assert outcome.double.most_in_flight == 4
    assert len({request.params.seed for request in outcome.double.requests}) == 50
    assert outcome.job.progress == replace(outcome.job.progress, total=50, done=50, failed=0, answered=50, running=0)
    assert (outcome.job.progress.read, outcome.job.progress.generated) == (500, 250)


def test_a_line_is_as_openai_writes_it(bench: Bench) -> None:
    bench.write({"id": "a", "prompt": "x", "logprobs": 1}, {"id": "b", "prompt": "x", "raw": True, "logprobs": 1})
    bench.go()
    chat, text = bench.lines()
    body = chat["response"]["body"]
    assert (chat["response"]["status_code"], chat["error"], body["object"]) == (200, None, "chat.completion")
    assert abs(body["created"] - time.time()) < 60
    assert body["model"] == "double:v1"
    assert body["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}
    choice = body["choices"][0]
    assert (choice["index"], choice["finish_reason"], choice["message"]["role"]) == (0, "stop", "assistant")
    first, second = choice["logprobs"]["content"]
    assert first == {"token": "an", "bytes": [97, 110], "logprob": -0.5, "top_logprobs": [{"token": "an", "bytes": [97, 110], "logprob": -0.5}]}  # fmt: skip # noqa: E501
    assert (second["token"], second["bytes"], second["logprob"]) == ("\ufffd", [255], -9999.0)
    assert chat["timings"] == {"ttft_s": 0.1, "total_s": 0.2}
    choice = text["response"]["body"]["choices"][0]
    assert text["response"]["body"]["object"] == "text_completion"
    assert choice["logprobs"] == {
        "tokens": ["an", "\ufffd"], "token_logprobs": [-0.5, -9999.0], "top_logprobs": [{"an": -0.5}, {}],
        "text_offset": [0, 2],
    }  # fmt: skip


def test_odd_text_stays_on_one_line(bench: Bench) -> None:
    odd = 'quote " newline \n return \r NUL \0 \u2028 \x9b31m 🙂 ' + "x" * 100_000
    bench.write({"id": odd[:60], "prompt": odd})
    bench.go()
    data = bench.out.read_bytes()
    assert data.count(b"\n") == 1
    assert data.isascii()
    assert bench.lines()[0]["custom_id"] == odd[:60]


def test_bad_rows_fail_and_the_others_are_answered(bench: Bench) -> None:
    bench.write(*rows(3), "{broken", {"id": "u", "prompt": "", "frobnicate": 1}, *[{"id": "z", "prompt": ""}])
    outcome = bench.go(Double(Behaviour(fails="^r1$")))
    errors = {line["custom_id"]: line["error"] for line in bench.lines() if line["error"]}
    assert errors.keys() == {"r1", None, "u"}
    assert errors["r1"] == {"code": "context_overflow", "message": "too long (shorten it)"}
    assert errors["u"]["message"] == "line 5: object contains unknown field `frobnicate`"
    assert errors[None]["message"].startswith("line 4: ")
    assert [line["custom_id"] for line in bench.lines()] == ["r0", "r1", "r2", None, "u", "z"]
    assert outcome.asked == ["r0", "r1", "r2", "z"]
    again = bench.go()
    assert (again.asked, again.written) == ([], False)


def test_retry_errors(bench: Bench) -> None:
    bench.write(*rows(4), "{broken")
    bench.go(Double(Behaviour(fails="r[13]")))
    assert bench.go(Double(Behaviour(fails="r3"))).asked == []
    assert bench.go(Double(Behaviour(fails="r3")), retry=True).asked == ["r1", "r3"]
    assert [n for n, line in enumerate(bench.lines()) if line["error"]] == [3, 4]
    assert bench.go(retry=True).asked == ["r3"]
    assert [n for n, line in enumerate(bench.lines()) if line["error"]] == [4]


def test_order_done(bench: Bench) -> None:
    bench.write(*rows(30))
    bench.go(Double(Behaviour(delay=0.005)), order="done")
    done = [line["custom_id"] for line in bench.lines()]
    assert sorted(done) == sorted(f"r{n}" for n in range(30))
    assert done != [f"r{n}" for n in range(30)]
    assert bench.go(order="input").written
    assert [line["custom_id"] for line in bench.lines()] == [f"r{n}" for n in range(30)]


def test_limit(bench: Bench) -> None:
    bench.write(*rows(10))
    assert len(bench.go(limit=3).asked) == 3
    assert len(bench.lines()) == 3
    assert len(bench.go().asked) == 7
    assert len(bench.lines()) == 10


def test_max_failures(bench: Bench) -> None:
    """It stops with those in flight finished, and each run may have as many."""
    bench.write(*rows(40))
    flaky = Behaviour(fails=r"r\d*[05]$")
    first = bench.go(Double(flaky), max_failures=3)
    assert first.written is None
    assert first.job.stopped
    assert len(first.asked) <= 10 + 4 + 1
    assert not bench.out.exists()
    assert first.job.progress.failed >= 3
    second = bench.go(Double(flaky), max_failures=3)
    assert not set(first.asked) & set(second.asked)
    bench.go(Double(flaky))
    assert len(bench.lines()) == 40


def test_rows_that_cannot_be_asked_count_as_failures_before_anything_is_loaded(bench: Bench) -> None:
    bench.write("{", "{{", *rows(3))
    outcome = bench.go(max_failures=2)
    assert (outcome.double.opened, outcome.written) == (0, None)


def test_an_empty_input_has_an_empty_output(bench: Bench) -> None:
    bench.write()
    assert bench.go().double.opened == 0
    assert bench.out.read_bytes() == b""


def test_stop_finishes_what_is_in_flight(bench: Bench) -> None:
    bench.write(*rows(40))
    seen: list[Progress] = []

    def stop(job: Batch, progress: Progress) -> None:
        seen.append(progress)
        if progress.done == 10:
            job.stop()

    outcome = bench.go(Double(Behaviour(delay=0.002)), during=stop)
    assert 10 <= seen[-1].done <= 14
    assert seen[-1].running == 0
    assert outcome.job.left == 40 - seen[-1].done == 40 - outcome.double.taken
    assert len(bench.go().asked) == outcome.job.left


def test_an_engine_that_breaks_loses_nothing(bench: Bench) -> None:
    bench.write(*rows(20))
    with pytest.raises(NetworkError):
        bench.go(Double(Behaviour(raises_after=7)))
    assert not bench.out.exists()
    assert len(bench.go().asked) == 13
    assert len(bench.lines()) == 20


def test_what_was_in_flight_at_most_is_asked_again(bench: Bench) -> None:
    """Left in the middle, many times over: the output is that of an undisturbed run."""
    bench.write(*rows(60), "{broken")
    bench.go(Double(Behaviour(delay=0.001)))
    expected = same(bench.lines())
    rng, taken, kills = random.Random(3), 0, 0
    other = Bench(bench.place / "other")
    other.place.mkdir()
    other.write(*rows(60), "{broken")

    class KilledError(BaseException):
        pass

    while not other.out.exists():
        left = rng.randrange(1, 9)

        def strike(job: Batch, progress: Progress, left: int = left) -> None:
            if progress.answered >= left:
                raise KilledError

        double = Double(Behaviour(delay=0.001))
        try:
            other.go(double, during=strike)
        except KilledError:
            kills += 1
        taken += double.taken
    assert same(other.lines()) == expected
    assert kills > 5
    assert taken <= 60 + 4 * kills


# --- mixed up: what may change, and what may not


def test_the_same_again_asks_nothing_and_opens_nothing(bench: Bench) -> None:
    bench.write(*rows(5))
    bench.go()
    before = bench.out.read_bytes(), bench.out.stat().st_mtime_ns
    again = bench.go()
    assert (again.double.opened, again.written) == (0, False)
    assert (bench.out.read_bytes(), bench.out.stat().st_mtime_ns) == before


@pytest.mark.parametrize("harm", [lambda out: out.unlink(), lambda out: out.write_text("edited\n"), lambda out: out.write_bytes(out.read_bytes()[:-9])])  # fmt: skip # noqa: E501
def test_an_output_that_is_gone_or_changed_is_written_anew(bench: Bench, harm: Callable[[Path], None]) -> None:
    bench.write(*rows(5))
    bench.go()
    before = bench.out.read_bytes()
    harm(bench.out)
    again = bench.go()
    assert (again.asked, again.written) == ([], True)
    assert bench.out.read_bytes() == before


def test_input_that_grew(bench: Bench) -> None:
    bench.write(*rows(5))
    bench.go()
    before = bench.lines()
    bench.write(*rows(8))
    assert bench.go().asked == ["r5", "r6", "r7"]
    assert bench.lines()[:5] == before


def test_input_with_rows_removed_and_others_in_front(bench: Bench) -> None:
    bench.write(*rows(5))
    bench.go()
    bench.write({"id": "new", "prompt": "x"}, *rows(5)[3:])
    outcome = bench.go()
    assert outcome.asked == ["new"]
    assert list(bench.texts()) == ["new", "r3", "r4"]
    assert any("gone from the input" in note for note in outcome.job.notes)


def test_input_in_another_order(bench: Bench) -> None:
    bench.write(*rows(9))
    bench.go()
    before = bench.texts()
    bench.write(*reversed(rows(9)))
    assert bench.go().asked == []
    assert list(bench.texts()) == [f"r{n}" for n in range(8, -1, -1)]
    assert bench.texts() == before


@pytest.mark.parametrize("edit", [{"prompt": "other"}, {"temperature": 0.1}, {"seed": 5}, {"raw": True}, {"system": "S"}, {"json_object": True}])  # fmt: skip # noqa: E501
def test_a_row_that_was_edited_is_asked_again(bench: Bench, edit: dict[str, Any]) -> None:
    bench.write(*rows(4))
    bench.go()
    before = bench.texts()
    changed = rows(4)
    changed[2] |= edit
    bench.write(*changed)
    assert bench.go().asked == ["r2"]
    now = bench.texts()
    assert now["r2"] != before["r2"]
    assert now | {"r2": ""} == before | {"r2": ""}
    bench.write(*rows(4))
    assert bench.go().asked == []  # the first answer is still there
    assert bench.texts() == before


def test_a_row_that_was_broken_and_is_mended(bench: Bench) -> None:
    bench.write(*rows(2), '{"id": "r2", "prompt": ')
    bench.go()
    bench.write(*rows(3))
    assert bench.go().asked == ["r2"]
    assert not any(line["error"] for line in bench.lines())


def test_an_answer_edited_by_hand_is_not_believed(bench: Bench) -> None:
    bench.write(*rows(4))
    bench.go()
    before = same(bench.lines())
    journal = bench.place / "out.jsonl.batch" / "journal"
    journal.write_bytes(journal.read_bytes().replace(b"question 2", b"question 9"))
    outcome = bench.go()
    assert outcome.asked == ["r2"]
    assert any("somebody has changed: 1" in note for note in outcome.job.notes)
    assert same(bench.lines()) == before
    assert bench.go().job.notes == ()


def test_answers_of_another_batch_are_not_ours(bench: Bench, tmp_path: Path) -> None:
    """Another seed, another journal: put in the place of ours it answers nothing."""
    bench.write(*rows(3))
    bench.go()
    other = Bench(tmp_path / "other")
    other.place.mkdir()
    other.write(*[row | {"seed": 4} for row in rows(3)])
    other.go()
    stolen = (other.place / "out.jsonl.batch" / "journal").read_bytes()
    (bench.place / "out.jsonl.batch" / "journal").write_bytes(stolen)
    assert bench.go().asked == ["r0", "r1", "r2"]


def test_rows_of_one_id_are_refused_before_anything(bench: Bench) -> None:
    bench.write(*rows(3), rows(1)[0])
    with pytest.raises(RefusedError, match="lines 1 and 4 have the same id, 'r0'"):
        bench.go()
    assert not (bench.place / "out.jsonl.batch").exists()


def test_a_model_that_rows_name_is_told(bench: Bench) -> None:
    bench.setup = Setup("openai")
    body = {"messages": [{"role": "user", "content": "x"}]}
    named = [{"custom_id": f"{n}", "url": "/v1/chat/completions", "body": body | {"model": name}}
             for n, name in enumerate(["gpt-4o", "gpt-4o", "double", "double:v1"])]  # fmt: skip
    bench.write(*named)
    assert bench.go().job.notes == ("rows name the model gpt-4o; double:v1 answers all of them",)


def _other_engine(**changes: str) -> Callable[[Bench], dict[str, Any]]:
    def change(bench: Bench) -> dict[str, Any]:
        return {"double": Double(Behaviour(identity=Behaviour().identity | changes))}

    return change


def _other_setup(**changes: Any) -> Callable[[Bench], dict[str, Any]]:
    def change(bench: Bench) -> dict[str, Any]:
        bench.setup = replace(bench.setup, **changes)
        return {}

    return change


def _other_sampling(name: str, value: Any) -> Callable[[Bench], dict[str, Any]]:
    return _other_setup(sampling={"temperature": 0.9, name: value})


FORM = JsonForm(ANY_OBJECT)
REFUSED: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "engine was double and is other": _other_engine(engine="other"),
    "model was double and is other": _other_engine(model="other"),
    "variant was v1 and is v2": _other_engine(variant="v2"),
    "weights was not set and is 1234": _other_engine(weights="1234"),
    "temperature was 0.9 and is 0.8": _other_sampling("temperature", 0.8),
    "top-p was 0.95 and is 0.5": _other_sampling("top_p", 0.5),
    "top-k was 0 and is 3": _other_sampling("top_k", 3),
    "min-p was 0.0 and is 0.1": _other_sampling("min_p", 0.1),
    "repeat-penalty was 1.0 and is 1.1": _other_sampling("repeat_penalty", 1.1),
    "max-tokens was 512 and is 9": _other_sampling("max_tokens", 9),
    "stop was not set and is 'END'": _other_sampling("stop", ("END",)),
    "top-k was 0 and is 7": lambda _: {"defaults": SamplingParams(temperature=0.5, top_k=7)},
    "seed was 1 and is 2": lambda _: {"seed": 2},
    "system was not set and is Be brief.": _other_setup(system="Be brief."),
    "template was not set and is {prompt}!": _other_setup(template=RowTemplate("{prompt}!")),
    "schema was not set and is {": _other_setup(form=FORM),
    "input format was jsonl and is txt": _other_setup(format="txt"),
}


@pytest.mark.parametrize("says", REFUSED)
def test_another_batch_under_the_same_name_is_refused(bench: Bench, says: str) -> None:
    """The field, both values, and what to do; --fresh does it."""
    bench.setup = replace(bench.setup, sampling={"temperature": 0.9})
    bench.write(*rows(3))
    bench.go()
    before = bench.out.read_bytes()
    changes = REFUSED[says](bench)
    with pytest.raises(RefusedError) as refusal:
        bench.go(**changes)
    assert says in refusal.value.message
    assert "--fresh" in refusal.value.hint
    assert bench.out.read_bytes() == before
    assert len(bench.go(fresh=True, **changes).double.requests) == 3


def test_another_version_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.write(*rows(1))
    bench.go()
    monkeypatch.setattr(fingerprint_module, "__version__", "77.1.0")
    with pytest.raises(RefusedError, match="mixlocal was 0 and is 77"):
        bench.go()


def test_all_that_differs_is_named(bench: Bench) -> None:
    bench.setup = replace(bench.setup, system="a" * 10_000)
    bench.write(*rows(1))
    bench.go()
    bench.setup = replace(bench.setup, system="b" * 10_000, sampling={"top_k": 1})
    with pytest.raises(RefusedError, match="top-k was 0 and is 1; system was 10000 characters, sha256") as refusal:
        bench.go()
    assert len(refusal.value.message) < 500


def test_an_output_that_is_not_ours(bench: Bench) -> None:
    bench.write(*rows(2))
    bench.out.write_text("precious\n")
    with pytest.raises(RefusedError, match="is there already"):
        bench.go()
    assert bench.out.read_text() == "precious\n"
    assert not (bench.place / "out.jsonl.batch").exists()
    bench.go(fresh=True)
    assert len(bench.lines()) == 2


def test_an_output_that_came_while_ours_was_on_its_way(bench: Bench) -> None:
    bench.write(*rows(9))
    with pytest.raises(NetworkError):
        bench.go(Double(Behaviour(raises_after=4)))
    bench.out.write_text("precious\n")
    with pytest.raises(RefusedError, match="is there already"):
        bench.go()
    assert bench.out.read_text() == "precious\n"
    bench.out.unlink()
    assert len(bench.go().asked) == 5


def test_an_output_that_is_a_folder_or_a_link(bench: Bench) -> None:
    bench.write(*rows(1))
    bench.out.mkdir()
    with pytest.raises(RefusedError, match="is a folder"):
        bench.go(fresh=True)
    bench.out.rmdir()
    bench.out.symlink_to(bench.place / "nowhere")
    with pytest.raises(RefusedError, match="is there already"):
        bench.go()
    assert not (bench.place / "nowhere").exists()


def test_fresh_throws_everything_away(bench: Bench) -> None:
    bench.write(*rows(3))
    bench.go()
    assert len(bench.go(fresh=True, seed=9).double.requests) == 3
    assert bench.go(seed=9).asked == []


def test_a_drawn_seed_stays(bench: Bench) -> None:
    bench.write(*rows(6))
    with pytest.raises(NetworkError):
        bench.go(Double(Behaviour(raises_after=3)), seed=None)
    first = bench.go(seed=None)
    second = Bench(bench.place / "second")
    second.place.mkdir()
    second.write(*rows(6))
    second.go(seed=first.job.seed)
    assert same(bench.lines()) == same(second.lines())


def test_an_engine_that_turns_out_to_be_another(bench: Bench) -> None:
    bench.write(*rows(1))
    double = Double()
    source = Source(bench.place / "in.jsonl", "in.jsonl", bench.setup)
    terms = Terms(double.identity | {"model": "expected"}, double.defaults)
    with batch_folder(bench.out) as folder, Batch(folder, source, source.survey(), terms) as job:  # noqa: SIM117
        with pytest.raises(RefusedError, match="model is double and not expected"):
            list(job.run(double))


@pytest.mark.parametrize("edit", [{"prompt": "else"}, None])
def test_an_input_that_changes_while_it_is_read(bench: Bench, edit: dict[str, Any] | None) -> None:
    """Before the engine has come to the row: nothing of another text is taken for it."""
    bench.write(*[row | {"system": "x" * 30_000} for row in rows(40)])

    def change(job: Batch, progress: Progress) -> None:
        if progress.answered == 2:
            data = (bench.place / "in.jsonl").read_text().splitlines()
            data[30] = json.dumps(json.loads(data[30]) | (edit or {}))
            with (bench.place / "in.jsonl").open("r+") as file:  # in place: another file would not be seen
                file.truncate(0)
                file.write("\n".join(data[: 31 if edit is None else 40]) + "\n")

    with pytest.raises(RefusedError, match="was changed while it was read"):
        bench.go(during=change)
    assert not bench.out.exists()


def test_the_manifest_says_what_it_is(bench: Bench) -> None:
    bench.write(*rows(3))
    bench.go()
    manifest = msgspec.json.decode((bench.place / "out.jsonl.batch" / "manifest.json").read_bytes())["batch"]
    assert manifest["fingerprint"]["engine: model"] == "double"
    assert manifest["fingerprint"]["temperature"] == "0.5"
    assert (manifest["input"]["rows"], manifest["seed"]) == (3, 1)


def test_memory_is_flat_over_many_rows(bench: Bench) -> None:
    """20,000 rows, 20 MB in and 20 MB out, read only as the engine has room for them."""
    with (bench.place / "in.jsonl").open("w") as file:
        for n in range(20_000):
            file.write(json.dumps({"id": f"r{n}", "prompt": f"{n} " + "x" * 1000}) + "\n")
    seen: list[int] = []

    class Plain(Double):
        def answer(self, requests: Iterator[Request]) -> Generator[Reply | Pulse, None, None]:
            flight = deque(islice(requests, 16))
            while flight:
                yield Reply(flight.popleft().id, "y" * 500, "stop")
                flight.extend(islice(requests, 1))

    def watch(job: Batch, progress: Progress) -> None:
        if progress.answered % 100 == 0:
            seen.append(resident())

    bench.go(Plain(), during=watch)
    assert len(seen) == 200
    assert max(seen[-3:]) <= 1.05 * max(seen[:3])
    assert bench.out.stat().st_size > 15e6


def resident() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_every_error_can_be_a_row_s(bench: Bench) -> None:
    """Its code and message are in the output, whichever it is."""
    kinds = MixlocalError.__subclasses__()
    bench.write(*rows(len(kinds)))

    class Failing(Double):
        def _reply(self, request: Request) -> Reply:
            kind = kinds[int(request.id[1:])]
            return replace(super()._reply(request), error=kind(f"of {kind.__name__}", "do something"))

    bench.go(Failing())
    assert [line["error"]["message"] for line in bench.lines()] == [f"of {k.__name__} (do something)" for k in kinds]
    codes = {line["error"]["code"] for line in bench.lines()}
    assert codes == {kind.code for kind in kinds} - {"usage"} | {"invalid_request"}
