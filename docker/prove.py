"""Serve from an unpacked image as its configuration says, post one forward, stop it: docker/prove.sh runs this as root.

python3 docker/prove.py TREE INSPECTED: the read-only root, and what `buildah inspect --type image` says of the image.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

START_SECONDS = 300
STOP_SECONDS = 60


def main(tree: Path, inspected: dict[str, Any]) -> None:
    """Raise AssertionError at the first thing that is not as it must be."""
    image = inspected["Docker"]["config"]
    assert image["User"] == "10001:0", image["User"]
    ports = free_port(), free_port()
    url = f"http://127.0.0.1:{ports[0]}"
    environment = [*image["Env"], f"MOE_FORWARD_HEALTH_URL={url}/v2/health/live"]
    command = [*image["Entrypoint"], "--host", "127.0.0.1", "--port", str(ports[0]), "--metrics-port", str(ports[1])]
    served = subprocess.Popen([*in_tree(tree, image, environment, new_processes=True), *command])
    try:
        until_ready(served, url)
        first = first_process(served)
        say(f"process 1 is {Path(f'/proc/{first}/comm').read_text().strip()}, of user {user_of(first)}")
        assert user_of(first) == 10001
        healthy = subprocess.run([*in_tree(tree, image, environment), *health_check(image)], check=False)
        assert healthy.returncode == 0, f"the image's own health check says {healthy.returncode}"
        writes = subprocess.run([*in_tree(tree, image, environment), "touch", "/opt/x"], check=False)
        assert writes.returncode != 0, "the root file system can be written to"
        say(forward(url))
        started = time.monotonic()
        first_process_gets(first, signal.SIGTERM)
        status = served.wait(STOP_SECONDS)
        say(f"SIGTERM: status {status} after {time.monotonic() - started:.1f} s")
        assert status == 0, status
        left = [path.name for path in (tree / "tmp").iterdir() if path.name.startswith("moe-forward-")]
        assert left == [], left
    finally:
        served.kill()


def in_tree(tree: Path, image: dict[str, Any], environment: list[str], new_processes: bool = False) -> list[str]:
    """Put before a command what makes it run there as a container would, without any capability."""
    separate = ["unshare", "--pid", "--fork", "--kill-child", f"--mount-proc={tree}/proc"] if new_processes else []
    user, group = image["User"].split(":")
    drop = ["--clear-groups", "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all"]
    become = ["setpriv", f"--reuid={user}", f"--regid={group}", *drop]
    inside = ["env", "-i", f"--chdir={image['WorkingDir']}", *environment]
    return [*separate, "chroot", str(tree), *become, *inside]


def health_check(image: dict[str, Any]) -> list[str]:
    """The command of HEALTHCHECK."""
    kind, *command = image["Healthcheck"]["Test"]
    assert kind == "CMD", kind
    return command


def until_ready(served: subprocess.Popen[bytes], url: str) -> None:
    """Wait for /v2/health/ready."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        assert served.poll() is None, f"the service ended with status {served.returncode}"
        assert time.monotonic() < deadline, f"not ready after {START_SECONDS} s"
        try:
            urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5)
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)


def forward(url: str) -> str:
    """Post two tokens to the first layer; return what came back in a few words."""
    placement = json.load(urllib.request.urlopen(f"{url}/v1/placement", timeout=5))
    hidden = [[(row + column) % 7 - 3 for column in range(placement["hidden_size"])] for row in range(2)]
    request = urllib.request.Request(
        f"{url}/v1/moe/forward?layer={placement['layers'][0]}",
        data=json.dumps({"hidden_states": hidden}).encode(),
        headers={"Content-Type": "application/json"},
    )
    output = json.load(urllib.request.urlopen(request, timeout=60))["output"]
    assert [len(row) for row in output] == [placement["hidden_size"]] * 2
    assert any(value != 0 for row in output for value in row)
    return f"forward of 2 tokens: {len(output)} x {len(output[0])} numbers, the first is {output[0][0]:.4f}"


def first_process(served: subprocess.Popen[bytes]) -> int:
    """Process 1 of the service, as this system numbers it."""
    (child,) = Path(f"/proc/{served.pid}/task/{served.pid}/children").read_text().split()
    return int(child)


def first_process_gets(process: int, number: signal.Signals) -> None:
    """What `docker stop` does."""
    subprocess.run(["kill", f"-{number.value}", str(process)], check=True)


def user_of(process: int) -> int:
    """Its user id."""
    return Path(f"/proc/{process}").stat().st_uid


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
