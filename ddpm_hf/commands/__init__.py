"""`ddpm-hf <command>`: one module per command, with `add_arguments(parser)` and `run(args)`; `main` runs them."""
