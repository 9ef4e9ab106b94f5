"""The echo behind Ray Serve's FastAPI ingress, for bench_service.py: `python ray_serve_echo.py PORT`.

One replica, no batching, request log off: what Ray Serve costs at least. Needs `ray[serve]`, which the service does
not.
"""

# No postponed annotations: Ray sends the class to another process, where FastAPI could not look `Request` up.
import signal
import sys
from typing import Any

import ray
from fastapi import FastAPI, Request, Response
from ray import serve

app = FastAPI()


@serve.deployment(max_ongoing_requests=64, logging_config={"enable_access_log": False})
@serve.ingress(app)
class Echo:
    """Sends a body back."""

    @app.post("/v1/moe/forward")
    async def forward(self, request: Request) -> Response:
        """Answer with the same bytes."""
        return Response(await request.body(), media_type="application/vnd.safetensors")


def main(port: int) -> None:
    """Serve until SIGTERM."""
    ray.init(include_dashboard=False, num_cpus=4, log_to_driver=False)
    options: dict[str, Any] = {"host": "127.0.0.1", "port": port}
    serve.start(http_options=options)
    serve.run(Echo.bind())
    signal.sigwait([signal.SIGTERM, signal.SIGINT])
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
    main(int(sys.argv[1]))
