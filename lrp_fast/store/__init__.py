"""The store of a run over a data set: one Zarr v3 group, written in whole shards, read lazily.

Arrays, one row for each of N samples: ``heatmap`` [N, H, W], float16 of the map over its largest magnitude with that
``scale``, or (with levels) uint8 level indices with each map's ``low`` and ``high``; ``channels/LAYER`` [N, C], relevance
summed over space; ``relevance/LAYER`` [N, C, H, W], float16 over ``relevance_scale/LAYER``; ``key``, ``label`` (-1: none),
``target``, ``probability``, ``leak``, ``status`` and ``reason``.

A finished batch is staged as a file of its own (``.staging``); once all batches of a shard are, they are compacted:
every array's shard is written once, ``status`` last, and the staged files go. What a run has done is therefore on the disk
whenever it is stopped, and a shard whose ``status`` exists is complete. Several processes may write at once, each its own
part: whole shards, which it locks. zarr is imported when a store is opened.
"""

from lrp_fast.store.files import chunk_file
from lrp_fast.store.layout import (
    CHANNELS,
    DONE,
    FAILED,
    INPUT,
    MISSING,
    RELEVANCE,
    RELEVANCE_SCALE,
    WHOLE,
    Array,
    Layout,
    Part,
    Rows,
    StoreError,
)
from lrp_fast.store.reading import Column, Record, Store, StoreDataset, open_store
from lrp_fast.store.settings import SettingsError, check_settings, differences
from lrp_fast.store.writing import StoreWriter, stage

__all__ = [
    "CHANNELS",
    "DONE",
    "FAILED",
    "INPUT",
    "MISSING",
    "RELEVANCE",
    "RELEVANCE_SCALE",
    "WHOLE",
    "Array",
    "Column",
    "Layout",
    "Part",
    "Record",
    "Rows",
    "SettingsError",
    "Store",
    "StoreDataset",
    "StoreError",
    "StoreWriter",
    "check_settings",
    "chunk_file",
    "differences",
    "open_store",
    "stage",
]
