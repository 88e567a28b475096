"""What runs beside the requests, from start to stop: late ledger rows, leases, batch jobs, fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bise.server.batch_worker import BatchWorker
from bise.server.tuning_worker import TuningWorker

if TYPE_CHECKING:
    import socket

    from bise.server.app import Application
    from bise.server.gate import StoreGate
    from bise.server.serving import Serving


async def serve_all(serving: Serving, app: Application, gate: StoreGate, listener: socket.socket) -> None:
    """Serve until told to stop, with the gate's and the jobs' background work around it."""
    worker = BatchWorker(app, gate, is_draining=lambda: app.service.is_draining)
    tuning = TuningWorker(app.service, gate)
    await gate.start()
    worker.start()
    await tuning.start()
    try:
        async with app.lifespan():
            await serving.serve(sockets=[listener])
    finally:
        await tuning.stop()
        await worker.stop()
        await gate.stop()
