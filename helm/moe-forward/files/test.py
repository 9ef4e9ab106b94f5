"""`helm test`: the service says that it is ready, then a token goes through the experts of its first layer."""

import argparse
import json
import math
import ssl
import urllib.request
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("url")
parser.add_argument("--forward", action="store_true", help="also post a token")
parser.add_argument("--api-keys", type=Path, help="file with a key a line, as NAME:KEY or KEY")
parser.add_argument("--tls", type=Path, help="folder with tls.crt and tls.key")
options = parser.parse_args()

headers = {"Content-Type": "application/json"}
if options.api_keys:
    lines = [line.strip() for line in options.api_keys.read_text().splitlines()]
    key = next(line for line in lines if line and not line.startswith("#"))
    headers["Authorization"] = f"Bearer {key.partition(':')[2] or key}"
context = None
if options.tls:
    # The Service's name may be in no certificate; what counts is that the server has the Secret's.
    context = ssl.create_default_context(cafile=str(options.tls / "tls.crt"))
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    context.load_cert_chain(options.tls / "tls.crt", options.tls / "tls.key")


def call(path: str, document: object = None) -> bytes:
    body = None if document is None else json.dumps(document).encode()
    request = urllib.request.Request(options.url + path, body, headers)
    with urllib.request.urlopen(request, timeout=60, context=context) as reply:
        content: bytes = reply.read()
    return content


call("/v2/health/ready")
print(f"{options.url} is ready")
if options.forward:
    placement = json.loads(call("/v1/placement"))
    hidden_size, layer = placement["hidden_size"], placement["layers"][0]
    token = [math.sin(channel) for channel in range(hidden_size)]
    (output,) = json.loads(call(f"/v1/moe/forward?layer={layer}", {"hidden_states": [token]}))["output"]
    if len(output) != hidden_size or not all(map(math.isfinite, output)) or not any(output):
        raise SystemExit(f"expected {hidden_size} finite channels that are not all zero, got {output[:8]}...")
    print(f"layer {layer} of {placement['model']} answered a token of {hidden_size} channels")
