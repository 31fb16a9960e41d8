"""What the server of `ddpm-hf demo` accepts, and how the drawings of several visitors share the machine."""

import asyncio
import html
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs

import gradio as gr
from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse

LONGEST_BODY = 64 * 1024  # bytes; a request of the page has some hundreds
SIDE_BY_SIDE = 4  # drawings at a time, so that a short one need not wait for a long one
WAITING = 16  # drawings in the queue; more are refused
PATIENCE = 5.0  # seconds that a client may take to ask for the answer
REPORT_EVERY = 0.25  # seconds
LISTENING = Counter()  # session -> number of connections on which it waits for answers


class Limits:
    """ASGI middleware: refuses files and long requests, and answers a malformed request in one sentence."""

    def __init__(self, app):
        self.app = app

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        kind = dict(scope["headers"]).get(b"content-type", b"")
        if kind.startswith(b"multipart/") or scope["path"].endswith("/upload"):
            return await PlainTextResponse("This page takes no files.", 413)(scope, receive, send)
        size, answered = 0, False

        async def limited() -> dict:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > LONGEST_BODY:
                raise HTTPException(413, f"A request to this page has at most {LONGEST_BODY} bytes.")
            return message

        async def noted(message) -> None:
            nonlocal answered
            answered = True
            await send(message)

        query = parse_qs(scope["query_string"].decode("latin-1"))
        listens = query.get("session_hash", []) if scope["path"].endswith("/queue/data") else []
        listens += [scope["path"].split("/")[-1]] if scope["method"] == "GET" and "/call/" in scope["path"] else []
        LISTENING.update(listens)
        try:
            await self.app(scope, limited, noted)
        except Exception as error:
            print(f"refused {scope['method']} {scope['path']}: {type(error).__name__}", file=sys.stderr, flush=True)
            if not answered:
                await PlainTextResponse("This page can't answer such a request.", 400)(scope, receive, send)
        finally:
            LISTENING.subtract(listens)
            for session in listens:
                if not LISTENING[session]:
                    del LISTENING[session]


class Page(gr.Blocks):
    """A page that answers settings which it does not offer in one sentence, where Gradio prints a traceback."""

    async def preprocess_data(self, *args, **kwargs):
        try:
            return await super().preprocess_data(*args, **kwargs)
        except gr.Error as error:
            raise gr.Error(error.message, print_exception=False) from error
        except Exception as error:
            raise gr.Error("The settings are not those that this page asks for.", print_exception=False) from error


class Drawings:
    """Runs drawings in a few threads, and ends those that nobody waits for between two steps."""

    def __init__(self):
        self.threads = ThreadPoolExecutor(SIDE_BY_SIDE, "drawing")

    def handler(self, draw, expected, outputs: int):
        """Make the handler of a button, which Gradio closes if the visitor presses Stop or closes the page.

        Args:
            draw: called with the settings and `progress`, returns `outputs` pictures and texts. After each step it
                calls `progress` with (steps done, number of steps).
            expected: called with the settings, returns a sentence on the time that `draw` will take. A ValueError of
                either is shown to the visitor.
        """

        async def handle(request: gr.Request, *settings):
            began, steps, left, made = time.monotonic(), [0, 0], threading.Event(), ()
            work = None

            def progress(done: tuple[int, int]) -> None:
                steps[:] = done
                if left.is_set():
                    raise InterruptedError

            unchanged = [gr.skip()] * outputs
            try:
                sentence = expected(*settings)
                yield *unchanged, sentence
                work = asyncio.wrap_future(self.threads.submit(draw, *settings, progress=progress))
                while not (await asyncio.wait([work], timeout=REPORT_EVERY))[0]:
                    waited = time.monotonic() - began
                    if waited > PATIENCE and not LISTENING[request.session_hash]:
                        return
                    yield *unchanged, f"Step {steps[0]} of {steps[1]}, {waited:.0f} s. {sentence}"
                made = work.result()
                yield *made, sentence
            except ValueError as error:
                raise gr.Error(html.escape(str(error), quote=False), print_exception=False) from error
            finally:
                left.set()
                if work is not None:
                    work.cancel()  # it does not start any more, and asyncio does not report how it ends
                for each in made:
                    if isinstance(each, Path):  # Gradio has copied it
                        each.unlink()

        return handle
