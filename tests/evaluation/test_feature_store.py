"""The store of an evaluation or of embeddings: what is removed, and when."""

import os
import time

import torch

from cosmos_ssl.evaluation.feature_store import FeatureStore, Piece


def test_what_nobody_went_on_with_is_removed(tmp_path):
    own, old, young = (FeatureStore(tmp_path / name) for name in ("own", "old", "young"))
    for store in (own, old, young):
        store.put("piece", Piece(torch.zeros(1), [], [], []))
    week = 7 * 86_400
    for store, age in ((own, 2 * week), (old, week + 3600), (young, week - 3600)):
        os.utime(store.folder, (time.time() - age,) * 2)
    own.clear_old()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own", "young"]
    FeatureStore(None).clear_old()


def test_what_was_written_before_the_disk_was_full_is_removed(tmp_path, monkeypatch):
    store = FeatureStore(tmp_path / "store")
    store.put("a", Piece(torch.zeros(1), [], [], []))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    store.put("b", Piece(torch.zeros(1), [], [], []))
    assert store.get("a") is not None and store.get("b") is None
    store.clear()
    assert not list(tmp_path.iterdir())
