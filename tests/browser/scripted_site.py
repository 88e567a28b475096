"""A server with scripted models and the real page, for browser tests: PORT DATABASE [PACE_S [PIECE]].

The question chooses the answer: `slow` writes for a long time, `payload N` answers with an attack, `count N`
with N numbered tokens, `think` thinks first (`think long`: for long), `cite` names two sources, anything
else with a page of Markdown. `count N hold M` waits after the M-th until the test says `go`: the answer is
still being written however long the test takes.
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI

from bise.assistant.accounts import Accounts
from bise.assistant.models import Job, Piece
from bise.assistant.scripted import ScriptedModels, quick_hasher
from bise.assistant.service import Assistant
from bise.errors import BiseError
from bise.server.assistant_accounts import accounts_router
from bise.server.assistant_page import StaticPage
from bise.server.assistant_people import Household
from bise.server.assistant_routes import assistant_router, page_router
from bise.server.problem import error_response
from bise.store.database import Database

SHOWCASE = """The **bise** is a cold, dry wind from the north-east. It forms when high pressure over \
northern Europe meets low pressure in the Mediterranean; the Jura and the Alps squeeze the air between them.

### How strong does it get?

| Place | Mean gust | Record |
|:------|----------:|-------:|
| Geneva | 60 km/h | 119 km/h |
| Lausanne | 55 km/h | 108 km/h |
| La Dôle | 95 km/h | 203 km/h |

The pressure on a wall grows with the square of the speed: $p = \\tfrac{1}{2} \\rho v^2$. In full:

$$
F = \\tfrac{1}{2}\\, c_d\\, \\rho\\, A\\, v^2
$$

```python
def pressure(speed_kmh: float, density: float = 1.25) -> float:
    \"\"\"Return the dynamic pressure in pascal.\"\"\"
    speed = speed_kmh / 3.6
    return 0.5 * density * speed ** 2


print(f"{pressure(100):.0f} Pa")  # about 480
```

What to remember:

1. It is strongest in **late winter**.
2. It brings *clear* skies, see [the Swiss weather service](https://www.meteoswiss.admin.ch).
3. `noire` is its wet sister, the *bise noire*.

> Quand la bise fut venue, la cigale se trouva fort dépourvue.
"""
PAYLOADS = Path(__file__).with_name("payloads.json")


def answer(question: str) -> str:
    """Return the prepared answer to a question."""
    if found := re.match(r"payload (\d+)", question):
        return json.loads(PAYLOADS.read_text())[int(found[1])]
    if found := re.match(r"count (\d+)", question):
        return "".join(f"{number:03d} " for number in range(int(found[1])))
    if question.startswith("Name this conversation"):
        return "The *bise*, a cold wind"
    if question.startswith("FAIL"):
        return "abcdFAIL"
    if re.search(r"\bcite\b", question):
        return "It blows from the north-east [1]. The records say more [2], the list [99] does not."
    if question.startswith("slow"):
        return "".join(f"word{number:04d} " for number in range(4000))
    return SHOWCASE


class Thinkers(ScriptedModels):
    """Think aloud before they answer a question that begins with `think`; price every answer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(answer, **options)
        self.go = asyncio.Event()

    async def stream(self, job: Job) -> AsyncGenerator[Piece]:
        """Yield thoughts, then the prepared answer."""
        question = str(job.messages[-1]["content"])
        asked, begun = (job.messages[-2]["content"], question) if job.continues else (question, "")
        held = re.match(r"count \d+ hold (\d+)", asked)
        left = 4 * int(held[1]) - len(begun) if held else None  # characters
        if question.startswith("think"):
            words = ["First", "the", "pressure,", "then", "the", "mountains."]
            for word in words * (4000 if question.startswith("think long") else 1):
                yield Piece(thought=f"{word} ", tokens=1)
                await asyncio.sleep(self.pace_s)
        async for piece in super().stream(job):
            if left is not None and (left := left - len(piece.text)) < 0:
                left = None
                await self.go.wait()
                self.go.clear()
            yield piece if piece.usage is None else replace(piece, cost="0.00042", currency="EUR")


def main() -> None:
    """Serve until killed."""
    port, path = int(sys.argv[1]), sys.argv[2]
    pace = float(sys.argv[3]) if len(sys.argv) > 3 else 0.004
    piece = int(sys.argv[4]) if len(sys.argv) > 4 else 4
    database = Database.open(path)
    models = Thinkers(pace_s=pace, piece=piece, delay_s=0.1)
    made: list[Assistant] = []
    app = FastAPI()
    app.add_exception_handler(BiseError, lambda request, error: error_response(error, path=""))
    accounts = Accounts(database, quick_hasher())
    people = Household(accounts)
    app.include_router(assistant_router(lambda: made[0], people))
    app.include_router(accounts_router(accounts, people, lambda: made[0]))

    @app.post("/go")
    async def go() -> None:
        models.go.set()

    app.include_router(page_router(StaticPage()))

    async def serve() -> None:
        made.append(Assistant(database, models))
        config = uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1)
        await uvicorn.Server(config).serve()
        await made[0].close()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
