"""Conversion of tutorial and diffusers checkpoints to pipelines of this package, and back to diffusers.

Every module here that defines `SOURCE` is a source with the name of the module.
"""
