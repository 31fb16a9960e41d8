"""List the recipes for `ddpm-hf train --config` and the images that each is for."""


def add_arguments(parser) -> None:
    pass


def run(args) -> None:
    from ddpm_hf.training.recipes import listing

    print("\n".join(listing()))
