"""A finished bf16 store as the source of a quantized one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import tiny

from mixlocal.app.install import QuantizeRequest, quantize_model
from mixlocal.app.progress import Progress
from mixlocal.errors import CorruptError, MixlocalError, NotFoundError, RefusedError
from mixlocal.store.expert_file import EXPERTS_FILE
from mixlocal.store.manifest import Recipe
from mixlocal.store.model_store import TRUNK_FILE, ModelStore
from mixlocal.store.paths import home

BF16 = Recipe("bf16", 16, "bf16")
RECIPES = {"q4": Recipe("nf4", 16, "bf16"), "q8": Recipe("int8", 16, "int8")}


def run(target: str, folder: Path, variant: str, recipe: Recipe, out: Path | None = None) -> ModelStore:
    work = quantize_model(QuantizeRequest(target, variant, recipe, out), home(folder))  # type: ignore[arg-type]
    while True:
        try:
            next(work)
        except StopIteration as end:
            return end.value


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return tiny.write_checkpoint(tmp_path / "tiny", shards=2)


@pytest.mark.parametrize("target", ["tiny:bf16", "tiny", "folder", "elsewhere"])
@pytest.mark.parametrize("variant", RECIPES)
@pytest.mark.parametrize("tied", [False, True])
def test_it_gives_what_the_checkpoint_gives(
    target: str, variant: str, tied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = tiny.write_checkpoint(tmp_path / "tiny", shards=3, tie_word_embeddings=tied)
    direct = run(str(checkpoint), tmp_path / "direct", variant, RECIPES[variant])
    out = tmp_path / "made" if target == "elsewhere" else None
    bf16 = run(str(checkpoint), tmp_path / "home", "bf16", BF16, out)
    shutil.rmtree(checkpoint)
    monkeypatch.chdir(tmp_path)
    named = target if target.startswith("tiny") else str(bf16.folder)
    adopted = run(named, tmp_path / "home", variant, RECIPES[variant])
    assert adopted.folder == tmp_path / "home" / "models" / "tiny" / variant
    assert contents(adopted.folder) == contents(direct.folder)
    assert bf16.folder.is_dir()


def test_a_checkpoint_folder_is_taken_and_not_the_store_of_its_name(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(str(checkpoint), tmp_path, "bf16", BF16)
    other = tiny.write_checkpoint(tmp_path / "other" / "tiny", seed=5)
    expected = run(str(other), tmp_path / "expected", "q4", RECIPES["q4"])
    monkeypatch.chdir(other.parent)
    assert contents(run("tiny", tmp_path, "q4", RECIPES["q4"]).folder) == contents(expected.folder)


def test_licence_and_template_are_taken_over(checkpoint: Path, tmp_path: Path) -> None:
    from mixlocal.app.quantization import StoreJob
    from mixlocal.app.quantize import QuantizeJob, quantize_checkpoint

    out = home(tmp_path).store("mine", "bf16")
    job = StoreJob(out, "mine", "bf16", BF16, licence="Apache-2.0", template="mistral")
    out.parent.mkdir(parents=True)
    for _ in quantize_checkpoint(QuantizeJob(checkpoint, job, "org/repo", "a" * 40)):
        pass
    manifest = run("mine:bf16", tmp_path, "q4", RECIPES["q4"]).manifest
    assert (manifest.name, manifest.licence, manifest.template) == ("mine", "Apache-2.0", "mistral")
    assert (manifest.source.name, manifest.source.revision) == ("org/repo", "a" * 40)


def test_it_goes_on_where_it_was(checkpoint: Path, tmp_path: Path) -> None:
    expected = run(str(checkpoint), tmp_path / "direct", "q4", RECIPES["q4"])
    run(str(checkpoint), tmp_path, "bf16", BF16)
    request = QuantizeRequest("tiny:bf16", "q4", RECIPES["q4"])
    work = quantize_model(request, home(tmp_path))
    seen: list[Progress] = []
    while len(seen) < 20:
        step = next(work)
        seen += [step] if step.stage == "quantize" else []
    work.close()
    first = next(step for step in quantize_model(request, home(tmp_path)) if step.stage == "quantize")
    assert first.done == seen[-1].done > 0
    assert contents(run("tiny:bf16", tmp_path, "q4", RECIPES["q4"]).folder) == contents(expected.folder)


@pytest.mark.parametrize("recipe", [RECIPES["q4"], Recipe("bf16", 16, "int8")])
def test_what_is_quantized_already_is_refused(recipe: Recipe, checkpoint: Path, tmp_path: Path) -> None:
    variant = "q4" if recipe.experts == "nf4" else "bf16"
    store = run(str(checkpoint), tmp_path, variant, recipe)
    for target in (f"tiny:{variant}", str(store.folder)):
        with pytest.raises(RefusedError, match="quantized already"):
            run(target, tmp_path, "q8", RECIPES["q8"])
    assert not home(tmp_path).store("tiny", "q8").exists()


@pytest.mark.parametrize("name", [EXPERTS_FILE, TRUNK_FILE])
def test_damage_is_found_before_anything_is_made_of_it(name: str, checkpoint: Path, tmp_path: Path) -> None:
    store = run(str(checkpoint), tmp_path, "bf16", BF16)
    data = bytearray((store.folder / name).read_bytes())
    for at in (9, len(data) - 1):  # of the trunk: in its header, and in its data
        damaged = bytearray(data)
        damaged[at] ^= 1
        (store.folder / name).write_bytes(damaged)
        with pytest.raises(CorruptError, match="damaged"):
            run("tiny:bf16", tmp_path, "q4", RECIPES["q4"])
    assert not list((tmp_path / "models" / "tiny").glob("q4*"))


@pytest.mark.parametrize(
    ("target", "error", "says"),
    [
        ("tiny:bf16", NotFoundError, "no model is called tiny"), ("smolmix:bf16", NotFoundError, "not installed"),
        ("nobody", NotFoundError, "no model is called nobody"), ("mixtral:q5", MixlocalError, "no variant 'q5'"),
        ("./nowhere", NotFoundError, "no such folder"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_named(target: str, error: type[MixlocalError], says: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=says):
        run(target, tmp_path, "q4", RECIPES["q4"])
