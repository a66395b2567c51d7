"""A store for others: files of safetensors, Parquet and Arrow, what SAELens reads, and batches for trainers of SAEs."""

from flex_model.store.export.batches import Batches, HookBatches
from flex_model.store.export.replay import Replay
from flex_model.store.export.saelens import to_saelens
from flex_model.store.export.safetensors import to_safetensors
from flex_model.store.export.shards import Exported
from flex_model.store.export.tables import to_arrow, to_parquet

__all__ = ["Batches", "Exported", "HookBatches", "Replay", "to_arrow", "to_parquet", "to_saelens", "to_safetensors"]
