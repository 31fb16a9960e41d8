"""`ddpm-hf <command>`: one module a command, each with `add_arguments(parser)` and `run(args)`; `main` finds them."""
