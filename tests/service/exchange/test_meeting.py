"""Ranks that meet over TCP: on one address, through a socket that was bound before."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).with_name("meeting_rank.py")
HANG_SECONDS = 120.0


def test_ranks_meet_where_they_were_told() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        commands = [["1", "127.0.0.1", port], ["0", "127.0.0.1", port, str(listener.fileno())]]
        ranks = [
            subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                env={**os.environ, "GLOO_SOCKET_IFNAME": "lo"},
                stdout=subprocess.PIPE,
                pass_fds=[listener.fileno()] if arguments[0] == "0" else [],
                text=True,
            )
            for arguments in commands
        ]
        printed = [rank.communicate(timeout=HANG_SECONDS)[0].split() for rank in ranks]
    assert printed == [["3"], ["3"]]
    assert [rank.returncode for rank in ranks] == [0, 0]
