"""Distributed training of image super-resolution GANs from streamed tar shards."""

__version__ = "0.1.0"
