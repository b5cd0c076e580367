"""`quality`: models read a text one after the other, and each is told apart from a reference that read it first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from mixlocal.app.budgets import RunOptions
from mixlocal.app.measure import Running
from mixlocal.app.quality.divergence import Divergence, TokenScores, divergence, join, perplexity, score
from mixlocal.app.quality.reading import Reading
from mixlocal.app.quality.reference import Reference
from mixlocal.app.quality.subject import Subject
from mixlocal.app.quality.text import LEAST_CONTEXT, Text, n_scored, read_text
from mixlocal.errors import UsageError
from mixlocal.store.logit_file import LogitReader
from mixlocal.store.paths import Home


@dataclass(frozen=True, slots=True)
class QualityRequest:
    """What is measured: every model with each number of experts per token (None: as trained).

    against: the reference, which runs as trained. text: None for the package's own. context: tokens of a chunk.
    logits: where the reference's are kept, by default in the cache. chunks: the most that are read.
    """

    models: tuple[str, ...]
    against: str | None = None
    text: Path | None = None
    context: int = 512
    experts_per_token: tuple[int | None, ...] = (None,)
    logits: Path | None = None
    chunks: int | None = None

    def __post_init__(self) -> None:
        """Raises `UsageError` for what cannot be measured."""
        if not self.models or not self.experts_per_token:
            raise UsageError("no model is left to be measured", "for example: mixlocal quality smolmix")
        if self.context < LEAST_CONTEXT:
            raise UsageError(f"--ctx {self.context} is below {LEAST_CONTEXT}, too few tokens to score")
        if self.chunks is not None and self.chunks < 1:
            raise UsageError(f"--chunks {self.chunks} is below 1")
        if self.logits is not None and self.against is None:
            raise UsageError("--logits needs --against: it is the reference's logits that are kept")


@dataclass(frozen=True, slots=True)
class QualityRow:
    """One model on one text, unrounded; what the figures mean is in `divergence`.

    nbytes: on disk. bits_per_weight: of all its files per parameter; expert_bits_per_weight: of the experts' records.
    text: the file's name. tokens: scored ones, of `chunks` chunks of `context` each. against: name:variant of the
    reference; without one all from mean_kl to log_ratio_error is None. same_top, rms_dp and rms_top_dp are shares, 0 to
    1. seconds: to read the text, loading not counted.
    """

    model: str
    variant: str
    experts_per_token: int
    nbytes: int
    bits_per_weight: float
    expert_bits_per_weight: float
    text: str
    context: int
    chunks: int
    tokens: int
    perplexity: float
    perplexity_error: float
    against: str | None
    mean_kl: float | None
    mean_kl_error: float | None
    median_kl: float | None
    kl_90: float | None
    kl_95: float | None
    kl_99: float | None
    max_kl: float | None
    same_top: float | None
    same_top_error: float | None
    rms_dp: float | None
    rms_dp_error: float | None
    rms_top_dp: float | None
    log_ratio: float | None
    log_ratio_error: float | None
    seconds: float


def run_quality(request: QualityRequest, options: RunOptions, folders: Home) -> Iterator[Running | QualityRow]:
    """A row for each model and number of experts. All that can be refused is refused before the first is loaded."""
    return prepare_quality(request, options, folders).run()


def prepare_quality(request: QualityRequest, options: RunOptions, folders: Home) -> QualityJob:
    """Raises `NotFoundError` for a model that is not here, `UsageError` for a text without a chunk, a context or number
    of experts that a model does not have, `RefusedError` for a text that is none, tokenizers that differ and a
    reference from another text, `MemoryBudgetError` and `DiskFullError` for what would not fit."""
    text = read_text(request.text)
    options = replace(options, context=request.context, sequences=1)
    against = Subject.of(request.against, text, options, folders, request.chunks) if request.against else None
    subjects = []
    for model in request.models:
        subject = Subject.of(model, text, options, folders, request.chunks)
        if against is not None:
            subject.check_comparable(against)
        subjects += [subject.with_experts(count) for count in request.experts_per_token]
    reference = None
    if against is not None:
        reference = Reference.of(against.head(text), against.chunks.count, request.logits, folders)
        reference.check_disk()
    return QualityJob(text, tuple(subjects), against, reference)


class QualityJob:
    """Ready to `run`. warnings: for the user; more may come until the run's end."""

    def __init__(
        self, text: Text, subjects: tuple[Subject, ...], against: Subject | None, reference: Reference | None
    ) -> None:
        """Raises as `ModelRun` for a model that cannot run."""
        self._text, self._subjects, self._against, self._reference = text, subjects, against, reference
        self.warnings: list[str] = []
        for subject in subjects:
            self._warn(subject.run().warnings)

    @property
    def description(self) -> str:
        """What is measured, and what becomes of the disk, for people."""
        chunks = self._subjects[0].chunks
        many = f"{chunks.count} chunk{'s' if chunks.count > 1 else ''}"
        scored = chunks.count * n_scored(chunks.context)
        text = f"{self._text.name}: {many} of {chunks.context} tokens, {scored} of them scored"
        return f"{text}; {self._reference.description()}" if self._reference else text

    @property
    def names(self) -> tuple[str, ...]:
        """name:variant of each row to come."""
        return tuple(subject.name for subject in self._subjects)

    def run(self) -> Iterator[Running | QualityRow]:
        """Stopped at any moment, it leaves a reference that another run goes on with."""
        if self._against is None or self._reference is None:
            for subject in self._subjects:
                yield from self._measure(subject, None)
            return
        yield from self._make_reference(self._against, self._reference)
        with self._reference.open() as reader:
            for subject in self._subjects:
                yield from self._measure(subject, reader)

    def _make_reference(self, against: Subject, reference: Reference) -> Iterator[Running]:
        if reference.count_ready() == reference.chunks:
            return
        with reference.writing() as (ready, writer):
            reading = Reading(against, f"{against.name}, the reference")
            for event in reading.pieces(range(ready, reference.chunks)):
                if isinstance(event, Running):
                    yield event
                    continue
                writer.write(event.logits)
                if event.last:
                    writer.end_chunk()
            self._warn(reading.warnings)

    def _measure(self, subject: Subject, reader: LogitReader | None) -> Iterator[Running | QualityRow]:
        reading, parts = Reading(subject, subject.name), []
        for event in reading.pieces(range(subject.chunks.count)):
            if isinstance(event, Running):
                yield event
                continue
            expected = reader.read(event.chunk, event.first, len(event.logits)) if reader else None
            parts.append(score(event.logits, event.targets, expected))
        self._warn(reading.warnings)
        yield self._row(subject, join(parts), reading.seconds)

    def _row(self, subject: Subject, scores: TokenScores, seconds: float) -> QualityRow:
        manifest, found = subject.store.manifest, perplexity(scores)
        nothing = dict.fromkeys(field.name for field in fields(Divergence))
        return QualityRow(
            manifest.name, manifest.variant, subject.top_k, manifest.nbytes, subject.bits_per_weight,
            subject.expert_bits_per_weight, self._text.name, subject.chunks.context, subject.chunks.count,
            len(scores.nll), found.value, found.error,
            against=self._against.name if self._against else None,
            **asdict(divergence(scores)) if self._against else nothing,
            seconds=seconds,
        )  # fmt: skip

    def _warn(self, warnings: tuple[str, ...]) -> None:
        self.warnings += [warning for warning in warnings if warning not in self.warnings]
