"""Serve a web page on which to try a model."""

import socket
import sys

from ddpm_hf.commands.device import add_device


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines")
    server.add_argument("--port", type=int, default=7860, help="port to listen on; 0 chooses a free one")
    add_device(server)


def run(args) -> None:
    port = free_port(args.host, args.port)
    print(f"Loading {args.model}", file=sys.stderr, flush=True)  # the imports take seconds too

    from ddpm_hf.commands.demo_page import build_demo, serve
    from ddpm_hf.pipelines.pipeline import load_pipeline
    from ddpm_hf.utils.devices import choose_device

    device = choose_device(getattr(args, "device", None))
    pipeline = load_pipeline(args.model, "model").to(device)
    page = build_demo(pipeline)
    print(f"{args.model} -> {serve(page, args.host, port)} (press Ctrl-C to stop)", flush=True)
    page.block_thread()


def free_port(host: str, port: int) -> int:
    """`port`, or a free one for 0. Gradio would find out that it is taken only after the model was loaded.

    Raises:
        ValueError: the host or the port can't be used.
    """
    try:
        with socket.create_server((host, port)) as free:
            return free.getsockname()[1]
    except (OSError, OverflowError) as error:
        raise ValueError(f"host={host!r}, port={port}: the server can't listen there: {error}") from error
