from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ray.job_submission import JobSubmissionClient

from cytoray.config import to_plain
from cytoray.models.encoder import load_encoder
from cytoray.runs import read_events
from pipelines import pretrain

from ..conftest import tiny_ssl

ROOT = Path(__file__).parents[2]


def test_flags_of_submit_itself(cytoray) -> None:
    outcome = cytoray("submit", "--help")
    assert outcome.code == 0
    assert "--working-dir" in outcome.out
    for argv, message in [
        (["submit"], "name the job to submit"),
        (["submit", "pretain"], "unknown job 'pretain'; valid: "),
        (["submit", "doctor"], "unknown job 'doctor'"),
        (["submit", "--adress", "x", "index"], "unknown flag --adress"),
        (["submit", "--address"], "--address needs a value"),
        (["submit", "--working-dir", "/nowhere", "index"], "/nowhere is not a folder"),
        (["submit", "--address=http://127.0.0.1:1", "index"], "no Ray job server answers at"),
    ]:
        outcome = cytoray(*argv)
        assert outcome.code == 2
        assert message in outcome.err
        assert "Traceback" not in outcome.err


@pytest.mark.ray
@pytest.mark.drill
def test_a_pretraining_on_a_running_head(cytoray, head, indexed, tracking_uri, tmp_path) -> None:
    """Followed to its end, with its exit code; a command that fails hands back its own."""
    submit = ["submit", "--address", head.server, "--working-dir", ROOT]
    missing = tmp_path / "none.csv"
    failed = cytoray(*submit, "index", "--manifest", missing, "--out", tmp_path / "index")
    assert failed.code == 2
    assert f"error: no manifest at {missing}" in failed.out
    assert "FAILED" in failed.err

    config = pretrain.Config(
        index=indexed.out,
        out=tmp_path / "run",
        ssl=tiny_ssl(total_steps=6),
        shuffle_chunks=4,
        log_every=1,
        tracking_uri=tracking_uri,
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(to_plain(replace(config, resume=True))))
    done = cytoray(*submit, "--submission-id", "first", "pretrain", "--config", path)
    assert done.code == 0, done.out + done.err
    assert "submitted as first" in done.out
    assert "6/6 steps (100 %)" in done.out
    steps = [e for e in read_events(config.out / "events.jsonl") if e["event"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6]
    assert load_encoder(config.out / "encoder").embed_dim == 64
    info = JobSubmissionClient(head.server).get_job_info("first")
    assert (info.status, info.metadata) == ("SUCCEEDED", {"cytoray_job": "pretrain"})

    again = cytoray(*submit, "--submission-id", "first", "index")
    assert again.code == 2
    assert "the job was not accepted" in again.err
