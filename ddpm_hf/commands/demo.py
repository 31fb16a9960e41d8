"""Serve a page to try a model in the browser."""


def add_arguments(parser) -> None:
    parser.add_argument("model", help="a pipeline folder, or user/model on the Hub")
    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for other machines too")
    server.add_argument("--port", type=int, default=7860, help="port to listen on; 0: one that is free")


def run(args) -> None:
    import torch

    from ddpm_hf.commands.page import build_demo, serve
    from ddpm_hf.pipelines.pipeline import load_pipeline

    pipeline = load_pipeline(args.model, "model")
    pipeline.set_progress_bar_config(disable=True)
    if torch.cuda.is_available():
        pipeline.to("cuda")
    page = build_demo(pipeline)
    print(f"{args.model} -> {serve(page, args.host, args.port)} (Ctrl-C ends it)", flush=True)
    page.block_thread()
