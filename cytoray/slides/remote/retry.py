"""When a download fails: try again, wait, or say what is wrong."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from cytoray.errors import SlideError
from cytoray.slides.remote.urls import redact, store_of, where_credentials

_NO_CREDENTIALS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "SSOTokenLoadError",
    "UnauthorizedSSOTokenError", "TokenRetrievalError", "DefaultCredentialsError",
    "ClientAuthenticationError",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DownloadPolicy:
    """How much trouble is taken over a download.

    Attributes:
        tries: attempts in a row without a single new byte before it is given up.
        first_wait_s: wait before the second attempt; doubled each time, and up to half as long
            again by chance, so that a crowd of readers does not come back at the same moment.
        max_wait_s: the longest wait.
        checksum_tries: whole downloads made while the checksum does not agree.
        block_bytes: bytes asked for at a time, and lost at most when a connection breaks.
    """

    tries: int = 5
    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    checksum_tries: int = 3
    block_bytes: int = 8 << 20


# A store that gave no answer to all tries of one slide is tried once for each of the next slides,
# for so long. Else a store that is down costs every slide of a cohort all its tries.
SILENT_FOR_S = 60.0
_silent_since: dict[str, float] = {}


class Attempts:
    """Counts failures of one download, waits between them, and says when it is enough."""

    def __init__(self, url: str, policy: DownloadPolicy) -> None:
        self.url = url
        self.policy = policy
        self.failures = 0

    def failed(self, error: Exception, *, progressed: bool = False) -> None:
        """Wait before the next try; a try that brought something starts the count anew.

        Raises:
            SlideError: trying again is of no use (`missing_file`, `access_denied`), or it was
                tried often enough (`download_failed`; `checksum_mismatch` when it was the
                client library that compared). Once is enough of a store that has just left all
                tries of another slide without an answer.
        """
        final = refusal(error, self.url)
        if final is not None:
            raise final from None
        self.failures = 1 if progressed else self.failures + 1
        causes = list(_causes(error))
        corrupt = "checksum" in type(error).__name__.lower()
        answered = progressed or corrupt or any(_http_status(cause) for cause in causes)
        given_up = not answered and self._store_is_silent()
        if given_up or self.failures >= self.policy.tries:
            if not answered:
                _silent_since[store_of(self.url)] = time.monotonic()
            tries = f"{self.failures} tries"
            if given_up:
                tries = "1 try (an earlier slide got no answer either)"
            raise SlideError(
                "checksum_mismatch" if corrupt else "download_failed",
                f"{redact(self.url)} could not be read in {tries}; the last one: "
                f"{_in_a_line(causes[-1])}",
            ) from None
        wait_s = self.policy.first_wait_s * 2 ** (self.failures - 1)
        time.sleep(min(self.policy.max_wait_s, wait_s) * random.uniform(1.0, 1.5))

    def _store_is_silent(self) -> bool:
        since = _silent_since.get(store_of(self.url))
        return since is not None and time.monotonic() - since < SILENT_FOR_S

    def succeeded(self) -> None:
        """The store answers (again): its next slides get all their tries."""
        _silent_since.pop(store_of(self.url), None)


def refusal(error: Exception, url: str) -> SlideError | None:
    """What a failure means when trying again is of no use; None when it may pass."""
    shown = redact(url)
    for cause in reversed(list(_causes(error))):
        status = _http_status(cause)
        denied = isinstance(cause, PermissionError) or status in (401, 403)
        if denied or type(cause).__name__ in _NO_CREDENTIALS:
            return SlideError(
                "access_denied",
                f"{shown} may not be read (or, where listing is not allowed either, is not there: "
                f"{_in_a_line(cause)}); look at {where_credentials(url)}",
            )
        if status in (404, 410) or (status is None and isinstance(cause, FileNotFoundError)):
            return SlideError("missing_file", f"no file at {shown}; check the manifest's path")
        if status is not None or not isinstance(cause, FileNotFoundError):
            return None
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _http_status(error: BaseException) -> int | None:
    """The HTTP status an exception of any client library carries."""
    response = getattr(error, "response", None)
    if isinstance(response, Mapping):
        found = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    else:
        names = ("status", "status_code", "code")
        found = next((getattr(error, n) for n in names if hasattr(error, n)), None)
        found = getattr(response, "status_code", found)
    text = str(found)
    return int(text) if text.isdigit() and 100 <= int(text) < 600 else None


def _in_a_line(error: BaseException) -> str:
    text = " ".join(str(error).split())[:300]
    return redact(f"{type(error).__name__}: {text}" if text else type(error).__name__)
