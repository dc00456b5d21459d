"""Bad input: exit code 2, a message that names what is wrong, and no traceback."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from cytoray import __version__
from pipelines.cli import JOBS, main

from ..conftest import TINY_VIT

GOOD = "slide_id,path\na,a.svs\n"


@pytest.fixture
def refused(cytoray):
    """refused(...) -> what was said on standard error by a command that must exit with 2.

    On one line: what is wrong with a flag stands in a box, broken to its width.
    """

    def run(*argv: object) -> str:
        outcome = cytoray(*argv)
        said = " ".join(re.sub("[│╭╮╰╯─]|---+", " ", outcome.err).split())
        assert outcome.code == 2, said
        assert said.startswith(("error: ", "Value error Error parsing"))
        assert "Traceback" not in outcome.err + outcome.out
        return said

    return run


@pytest.fixture
def tiny_flags(indexed, tmp_path) -> list[object]:
    """A pretraining small enough for any test."""
    return [
        "--index", indexed.out, "--out", tmp_path / "run", "--ssl.batch-size", 8,
        "--ssl.total-steps", 4, "--ssl.optim.warmup-steps", 1, "--ssl.crops.global-px", 32,
        "--ssl.crops.local-px", 16, "--ssl.backbone.kwargs",
        *(part for pair in TINY_VIT.items() for part in pair),
        "--tracking-uri", f"sqlite:///{tmp_path}/m.db",
    ]  # fmt: skip


def test_usage_names_every_job(cytoray) -> None:
    for argv in ([], ["--help"], ["help"]):
        outcome = cytoray(*argv)
        assert outcome.code == 0
        assert all(f"  {job} " in outcome.out for job in JOBS)
    assert cytoray("--version").out == f"cytoray {__version__}\n"


@pytest.mark.parametrize("job", list(JOBS))
def test_every_job_has_help(cytoray, job: str) -> None:
    outcome = cytoray(job, "--help")
    assert outcome.code == 0
    assert "--address" in outcome.out or job in ("bags", "plan")  # which need no cluster


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"]])
def test_whoever_reads_may_leave(argv: list[str]) -> None:
    """As with `| head`: no traceback."""
    command = [sys.executable, "-m", "pipelines.cli", *argv]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None
        running.stdout.close()
        said = running.communicate()[1].decode()
    assert (running.returncode, said) == (141, "")


def test_unknown_job(refused) -> None:
    text = refused("indx", "--out", "x")
    assert "unknown job 'indx'" in text
    assert all(job in text for job in JOBS)


@pytest.mark.parametrize(
    "argv",
    [
        ["index"],
        ["index", "--manifest", "m.csv", "--out", "o", "--no-such-flag", "1"],
        ["index", "--manifest", "m.csv", "--out", "o", "--tile-px", "many"],
        ["embed", "--index", "i"],
    ],
)
def test_wrong_flags(cytoray, argv: list[str]) -> None:
    outcome = cytoray(*argv)
    assert outcome.code == 2
    assert "Traceback" not in outcome.err
    assert argv[-1].lstrip("-") in outcome.err + outcome.out or "required" in outcome.err.lower()


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["tune", "--bags", "b", "--index", "i", "--lora-ranks", "0", "-4"], "--lora-ranks"),
        (["pretrain", "--index", "i", "--ssl.two-views.hidden-dim", "-1"], "--ssl.two-views"),
        (["pretrain", "--index", "i", "--max-failures", "-1"], "--max-failures"),
        (["finetune", "--cells", "c", "--encoders", "vit", "--alpha", "-1"], "--alpha"),
        (["vpu", "--index", "i", "--encoder", "e", "--vpu.weight-decay", "-1"], "--vpu.weight"),
        (["quickstart", "--seed", "-1"], "--seed"),
    ],
)
def test_no_flag_takes_a_number_below_zero(refused, tmp_path, argv: list[str], flag: str) -> None:
    said = refused(*argv, "--out", tmp_path / "o")
    assert flag in said
    assert "must be" in said
    assert not (tmp_path / "o").exists()


def manifest(folder: Path, text: str | bytes) -> Path:
    path = folder / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("slide,file\na,b\n", "column `slide_id` is missing (columns found: slide, file)"),
        ("slide_id,path\na,x.svs\nb,x.svs\na,y.svs\n", "slide_id 'a' occurs 2 times (lines 2, 4)"),
        ("slide_id,path\n", "it has no rows"),
        ("", "cannot be read"),
        (b"slide_id,path\na,\xff\xfe.svs\n", "save the file as UTF-8"),
        ("slide_id,path\na,x.svs,1,2\n", "line 2: 4 fields where the header has 2"),
        (GOOD, "none of the 1 files exists"),
    ],
)
def test_manifest(refused, tmp_path, text, message: str) -> None:
    path = manifest(tmp_path, text)
    said = refused("index", "--manifest", path, "--out", tmp_path / "o")
    assert message in said
    assert str(path) in said
    assert not (tmp_path / "o").exists()


def test_manifest_that_is_not_there(refused, tmp_path) -> None:
    said = refused("index", "--manifest", tmp_path / "m.csv", "--out", tmp_path / "o")
    assert f"no manifest at {tmp_path}/m.csv" in said


def test_fewest_nuclei_without_a_detector(refused, tmp_path) -> None:
    flags = ["index", "--manifest", tmp_path / "m.csv", "--out", tmp_path / "o"]
    said = refused(*flags, "--min-nuclei", 2, "--detector", "none", "--keep-share", 2)
    assert "--min-nuclei needs nuclei: choose a --detector other than none" in said
    assert "--keep-share must be from 0 to 1, not 2" in said


def test_unknown_detector(refused, tmp_path) -> None:
    path = manifest(tmp_path, GOOD)
    said = refused("index", "--manifest", path, "--out", tmp_path / "o", "--detector", "clasical")
    assert "unknown detector 'clasical'" in said
    assert "classical" in said
    assert "none" in said


def test_grid_out_of_range(refused, tmp_path) -> None:
    path = manifest(tmp_path, GOOD)
    flags = ["index", "--manifest", path, "--out", tmp_path / "o"]
    said = refused(*flags, "--tile-px", 4, "--mpp", 99)
    assert "tile_px must be between 16 and 1024, not 4" in said
    assert "mpp must be between" in said
    assert "magnification" in refused(*flags, "--magnification", 0)
    both = refused(*flags, "--magnification", 40, "--mpp", 0.5)
    assert "--magnification 40 is 0.25 um/px, --mpp says 0.5" in both


@pytest.mark.parametrize("job", ["pretrain", "embed", "tune"])
def test_no_index(refused, tmp_path, job: str) -> None:
    flags = {
        "pretrain": [],
        "embed": ["--encoder", "vit_tiny_patch16_224", "--no-pretrained"],
        "tune": ["--encoder", "vit_tiny_patch16_224", "--bags", tmp_path / "bags"],
    }[job]
    said = refused(job, "--index", tmp_path / "index", "--out", tmp_path / "o", *flags)
    if job == "tune":
        assert f"no folder of bags at {tmp_path}/bags; make one with `embed`" in said
    else:
        assert f"no slide table at {tmp_path}/index/slides.parquet; run `cytoray index`" in said
    assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--aggregators", "mean", "abmill"], "unknown aggregator 'abmill'; valid: "),
        (["--lora-ranks", "-1"], "--lora-ranks must be 0 or more, not -1"),
        (["--mil.options", "gated", "1"], "options.gated is not one of mean's"),
        (["--val-fraction", "1.5"], "--val-fraction must be above 0 and below 1, not 1.5"),
        (["--cpus-per-trial", "0"], "--cpus-per-trial must be above 0"),
        (["--lora-epochs", "0"], "--lora-epochs must be 1 or more, not 0"),
    ],
)
def test_grids_that_cannot_be(refused, tmp_path, flags: list[str], message: str) -> None:
    said = refused(
        "tune", "--index", tmp_path, "--bags", tmp_path, "--encoder", "e", "--out",
        tmp_path / "o", *flags,
    )  # fmt: skip
    assert message in said
    if "abmill" in flags:
        assert "abmil," in said
    assert not (tmp_path / "o").exists()


def test_named_runs(refused, tmp_path) -> None:
    paths = ["--index", tmp_path, "--out", tmp_path / "o"]
    said = refused("pretrain", "smok", *paths)
    assert "unknown named run 'smok'; valid: " in said
    assert "smoke" in said
    assert "no named runs" in refused("embed", "small", *paths)
    assert "no slide table" in refused("pretrain", "smoke", *paths)


def test_config_files(refused, tmp_path) -> None:
    assert "cannot read the config /gone.yaml" in refused("index", "--config", "/gone.yaml")
    assert "--config needs a file" in refused("index", "--config")
    path = tmp_path / "c.yaml"
    path.write_text("manifest: m.csv\nout: o\ntile: 3\ndetektor: x\n")
    said = refused("index", f"--config={path}")
    assert "tile is not a field; valid: manifest, out, tile_px" in said
    assert "detektor is not a field" in said
    path.write_text("manifest: [\n")
    assert "not valid YAML" in refused("index", "--config", path)
    path.write_text("manifest: m.csv\nout: o\ntile_px: wide\n")
    assert "tile_px: 'wide' is not int" in refused("index", "--config", path)


def test_flags_win_over_a_config_file(refused, tmp_path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"manifest: {tmp_path}/a.csv\nout: {tmp_path}/o\n")
    assert "no manifest at" in refused("index", "--config", path)
    assert f"{tmp_path}/b.csv" in refused(
        "index", "--config", path, "--manifest", tmp_path / "b.csv"
    )


def test_address_nobody_answers_at(tmp_path) -> None:
    """In a process of its own: this one is connected."""
    path = manifest(tmp_path, GOOD)
    (tmp_path / "a.svs").write_text("x")
    done = subprocess.run(
        [sys.executable, "-m", "pipelines.cli", "index", "--manifest", path, "--out",
         tmp_path / "o", "--address", "127.0.0.1:1"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Ray cluster answers at '127.0.0.1:1'")
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.ray
class TestWithAnIndex:
    """Mistakes that show when there is an index and a cluster."""

    def test_unknown_encoder(self, refused, indexed, tmp_path) -> None:
        flags = ["embed", "--index", indexed.out, "--out", tmp_path / "o", "--encoder"]
        said = refused(*flags, "vit_tiny_patch16_22")
        assert "encoder 'vit_tiny_patch16_22' is neither a folder" in said
        assert "did you mean vit_tiny_patch16_224" in said
        assert "vit_" in refused(*flags, "vit_timy_patch16_224")
        said = refused(*flags, indexed.out)
        assert "is not an encoder folder: model.safetensors and encoder.json not there" in said

    def test_unknown_backbone(self, refused, tiny_flags) -> None:
        said = refused("pretrain", *tiny_flags, "--ssl.backbone.name", "vit_tinny_patch16_224")
        assert "unknown backbone 'vit_tinny_patch16_224'; did you mean vit_tiny" in said

    def test_crops_and_other_numbers_all_at_once(self, refused, tiny_flags) -> None:
        said = refused(
            "pretrain", *tiny_flags, "--ssl.crops.local-px", 30, "--ssl.crops.global-px", 50,
            "--ssl.method", "dinov9", "--ssl.batch-size", 1,
        )  # fmt: skip
        assert "crops.local_px 30 is not a multiple of the patch of 16 px; take 16 or 32" in said
        assert "crops.global_px 50 is not a multiple of the patch of 16 px; take 48 or 64" in said
        assert "method 'dinov9' is none of" in said
        assert "batch_size must be at least 2" in said

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (["--workers", 8], "CPU: 4.5 needed at once, the cluster has 4 (0.5 missing)"),
            (["--cpus-per-worker", 9], "CPU: 9.5 needed at once, the cluster has 4 (5.5 missing)"),
            (["--use-gpu", "True"], "GPU: 1 needed at once, the cluster has 0 (1 missing)"),
            (["--workers", 0], "--workers must be 1 or more, not 0"),
            (["--workers", 3], "a batch of 8 tiles cannot be shared equally by 3 workers"),
            (["--splits", "trian"], "no usable slide"),
            (["--nuclei", "tabel"], "unknown nuclei source 'tabel'; valid: auto, detect, table"),
            (["--detector", "x"], "unknown detector 'x'; valid: "),
            (["--ssl.backbone.init-from", "/no.pth"], "neither folder nor file at /no.pth"),
            (["--ssl.backbone.lora.rank", 4], "set backbone.pretrained or"),
            (["--epochs", 0], "--epochs must be above 0"),
            (["--checkpoint-every", 0], "--checkpoint-every must be 1 or more, not 0"),
            (["--log-every", 0], "--log-every must be 1 or more, not 0"),
            (["--shuffle-chunks", 0], "--shuffle-chunks must be 1 or more, not 0"),
            (["--perturb.radius-um", -1], "perturb.radius_um"),
            (["--perturb.retain-fraction", 0.9, 0.1], "perturb.retain_fraction"),
        ],
    )
    def test_pretraining_that_cannot_be(self, refused, tiny_flags, tmp_path, flags, message):
        """Said before anything is started or written, instead of hanging."""
        assert message in refused("pretrain", *tiny_flags, *flags)
        assert not (tmp_path / "run").exists()

    def test_more_encoders_than_the_cluster_has(self, refused, indexed, tmp_path) -> None:
        said = refused(
            "embed", "--index", indexed.out, "--out", tmp_path / "o", "--no-pretrained",
            "--encoder", "vit_tiny_patch16_224", "--encoders", 40,
        )  # fmt: skip
        assert "the cluster has 4" in said
        assert "40 x encoder" in said

    def test_folder_of_another_run(self, refused, manifest, indexed, tmp_path) -> None:
        flags = ["index", "--manifest", manifest, "--tile-px", 64, "--mpp", 0.5, "--out"]
        assert "pass --resume to go on" in refused(*flags, indexed.out)
        said = refused(
            "embed", "--index", indexed.out, "--out", indexed.out, "--no-pretrained",
            "--encoder", "vit_tiny_patch16_224", "--resume",
        )  # fmt: skip
        assert "belongs to a run of `index`, not `embed`" in said
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("precious")
        assert "is not a cytoray run and is not empty (thesis.txt)" in refused(
            *flags, tmp_path / "mine"
        )

    def test_resume_with_another_config(self, refused, manifest, indexed) -> None:
        said = refused(
            "index", "--manifest", manifest, "--out", indexed.out, "--resume", "--tile-px", 96,
            "--mpp", 0.5, "--keep-share", 0.1,
        )  # fmt: skip
        assert "was started with another config" in said
        assert "tile_px: 64 -> 96" in said
        assert "keep_share: 0.02 -> 0.1" in said
        assert "mpp" not in said.replace(str(indexed.out), "")


@pytest.mark.parametrize(
    ("job", "needed", "flags"),
    [
        ("vpu", "--index i --encoder e --out o",
         ["--split-seed", "--cpus-per-task", "--gpus-per-task", "--tracking-wait-s"]),
        ("evaluate", "--cells c --encoders e --out o",
         ["--split-seed", "--shot-seeds", "--cpus-per-task", "--gpus-per-task"]),
        ("tune", "--index i --bags b --encoder e --out o",
         ["--seed", "--max-concurrent", "--tracking-wait-s"]),
        ("finetune", "--cells c --encoders e --out o",
         ["--seeds", "--split-seed", "--max-concurrent"]),
    ],
)  # fmt: skip
def test_negative_numbers_are_named(job: str, needed: str, flags: list[str], capsys) -> None:
    for flag in flags:
        with pytest.raises(SystemExit) as stopped:
            main([job, *needed.split(), flag, "-3"])
        assert stopped.value.code == 2
        said = capsys.readouterr().err
        assert flag in said
        assert "0 or more" in said
