"""Checkpoints of tutorials and of diffusers as pipelines of ours, and ours as diffusers' own.

A module here that has a `SOURCE` is a source, under the name of the module.
"""
