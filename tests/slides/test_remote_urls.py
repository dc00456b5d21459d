from __future__ import annotations

import pytest

from cytoray.errors import InputError
from cytoray.slides.quarantine import quarantine_row
from cytoray.slides.remote import check_urls, is_remote, local_path, redact
from cytoray.slides.remote.retry import refusal
from cytoray.slides.remote.urls import open_filesystem, protocol_of


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://bucket/a b/c.svs", "s3://bucket/a b/c.svs"),
        ("s3://bucket/a@b.svs?versionId=7", "s3://bucket/a@b.svs?versionId=7"),
        ("http://127.0.0.1:80/a@b.svs", "http://127.0.0.1:80/a@b.svs"),
        ("abfs://images@account.dfs.core.windows.net/a", "abfs://images@account.dfs.core.windows.net/a"),
        ("s3://KEY:SE/CR+ET=@bucket/c.svs", "s3://***@bucket/c.svs"),
        ("https://me:hush@host:8443/c.svs", "https://***@host:8443/c.svs"),
        ("https://token@host/c.svs", "https://***@host/c.svs"),
        (
            "no https://h/my slide.svs?X-Amz-Signature=abc&id=4, really",
            "no https://h/my slide.svs?X-Amz-Signature=***&id=*** really",
        ),
        ("zip://a.svs::https://u:p@h/z.zip?sig=x", "zip://a.svs::https://***@h/z.zip?sig=***"),
        ("tile 3 of a.svs?x=1", "tile 3 of a.svs?x=1"),
    ],
)  # fmt: skip
def test_secrets_are_starred_out(text, shown):
    assert redact(text) == shown


def test_what_is_remote_and_what_is_local(tmp_path):
    assert is_remote("s3://b/a.svs")
    assert is_remote("memory://a.svs")
    assert not is_remote(f"file://{tmp_path}/a.svs")
    assert not is_remote(str(tmp_path))
    assert local_path(f"file://{tmp_path}/a b.svs") == f"{tmp_path}/a b.svs"
    assert local_path("/x/y") == "/x/y"
    assert protocol_of("zip://a.svs::gs://b/z.zip") == "gs"


def test_urls_of_a_manifest_are_checked_without_a_store():
    check_urls(["/a.svs", "http://nowhere.invalid/a.svs", "memory://a", "", "file:///b.svs"])
    with pytest.raises(InputError) as caught:
        check_urls(["htps://h/a.svs", "gs://b/a.svs", "https://me:hush@h/a.svs", "gs://b/c.svs"])
    text = str(caught.value)
    assert "the protocol htps://" in text
    assert "gs:// needs a package that is not here: pip install gcsfs" in text
    assert "https://***@h/a.svs carries credentials" in text
    assert "hush" not in text
    assert len(caught.value.problems) == 3
    with pytest.raises(InputError, match="pip install gcsfs"):
        open_filesystem("gs://b/a.svs")


class StatusError(Exception):
    """As client libraries have them: a status, and the URL in the text."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, url='https://me:hush@h/a.svs?sig=abc'")
        self.status = status


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (FileNotFoundError("x"), "missing_file"),
        (StatusError(404), "missing_file"),
        (caused(FileNotFoundError("x"), StatusError(404)), "missing_file"),
        (PermissionError("no"), "access_denied"),
        (StatusError(403), "access_denied"),
        (caused(FileNotFoundError("x"), StatusError(401)), "access_denied"),
        (type("NoCredentialsError", (Exception,), {})("none"), "access_denied"),
        (caused(FileNotFoundError("x"), StatusError(503)), None),
        (caused(FileNotFoundError("x"), ConnectionResetError()), None),
        (StatusError(429), None),
        (TimeoutError(), None),
        (OSError(5, "slow down"), None),
    ],
)
def test_what_failures_mean(error, code):
    """fsspec's web file system says 'not found' to everything; the cause tells."""
    refused = refusal(error, "s3://b/a.svs")
    assert (refused.code if refused else None) == code
    if refused:
        assert "hush" not in refused.message
        assert "abc" not in refused.message
    if code == "access_denied":
        assert "AWS_ACCESS_KEY_ID" in refused.message


def test_the_quarantine_shows_no_secret():
    row = quarantine_row("a", "https://u:hush@h/a?sig=abc", "index", "c", "at https://h/a?sig=abc")
    assert row["path"] == "https://***@h/a?sig=***"
    assert row["message"] == "at https://h/a?sig=***"
