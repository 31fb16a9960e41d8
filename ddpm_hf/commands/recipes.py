"""List the recipes of `ddpm-hf train --config`, with the images that each is made for."""


def add_arguments(parser) -> None:
    pass


def run(args) -> None:
    from ddpm_hf.training.recipes import listing

    print("\n".join(listing()))
