"""Chooses adapters: finds those of a base on the Hub, reads examples, and tells which of many help on them."""

from .data import LabelledData, read_data
from .encoding import EncodedRows, load_processor


__all__ = ["EncodedRows", "LabelledData", "load_processor", "read_data"]
