"""Serve a web page on which to try a model."""

from ddpm_hf.commands.device import add_device


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 accepts other machines")
    server.add_argument("--port", type=int, default=7860, help="port to listen on; 0 chooses a free one")
    add_device(server)


def run(args) -> None:
    from ddpm_hf.commands.demo_page import build_demo, serve
    from ddpm_hf.pipelines.pipeline import load_pipeline
    from ddpm_hf.utils.devices import choose_device

    device = choose_device(getattr(args, "device", None))
    pipeline = load_pipeline(args.model, "model").to(device)
    pipeline.set_progress_bar_config(disable=True)
    page = build_demo(pipeline)
    print(f"{args.model} -> {serve(page, args.host, args.port)} (press Ctrl-C to stop)", flush=True)
    page.block_thread()
