"""Make a model whose weights are averaged over another share of the training, from a run with --post_hoc_ema true."""


def add_arguments(parser) -> None:
    parser.add_argument("run", help="the output folder of a training run")
    parser.add_argument(
        "--sigma_rel", type=float, required=True,
        help="length of the average: its standard deviation as a share of the updates, 0.001 ... 0.28",
    )  # fmt: skip
    parser.add_argument("--output_dir", help="the folder to write; it must not exist (default: <run>-ema-<sigma_rel>)")


def run(args) -> None:
    from ddpm_hf.training.post_hoc import make_average

    print("\n".join(make_average(args.run, args.sigma_rel, args.output_dir)))
