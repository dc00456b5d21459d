from __future__ import annotations

import socket

import pytest

from cytoray.distributed.submit import client_for, submit
from cytoray.errors import InputError


def test_a_head_nobody_answers_for_is_named() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
        with pytest.raises(InputError, match=rf"no Ray job server answers at '{address}'"):
            client_for(address)


def test_a_working_folder_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        submit("http://127.0.0.1:1", ["index"], working_dir=tmp_path / "gone")
