"""Finds images, decodes them and makes batches."""
