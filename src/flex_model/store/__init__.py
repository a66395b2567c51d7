"""Activations on disk: written by every rank at once, read a few rows at a time, or as shuffled batches."""

from flex_model.store.dataset import RowDataset
from flex_model.store.manifest import StoredSite
from flex_model.store.reader import ActivationStore, StoredRows
from flex_model.store.writer import StoreWriter

__all__ = ["ActivationStore", "RowDataset", "StoreWriter", "StoredRows", "StoredSite"]
