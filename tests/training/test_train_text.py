"""The training tasks of the text encoders."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nanosd3.config import CONFIGS
from nanosd3.errors import InputError
from nanosd3.storage.run import Run
from nanosd3.text import Tokenizers
from nanosd3.training.stages import Job
from nanosd3.training.train_text import clip_loss, span_corruptions, train_tokenizers


def test_clip_loss():
    """Perfect matches at a high scale have no loss; equal captions share the probability."""
    eye = torch.eye(4)
    assert clip_loss(eye, eye, eye, torch.tensor(100.0)) < 1e-6
    assert clip_loss(eye, eye.flip(0), eye, torch.tensor(100.0)) > 10
    same = torch.block_diag(torch.ones(2, 2), torch.ones(2, 2))
    text = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert clip_loss(text, text, same, torch.tensor(100.0)) == pytest.approx(np.log(2), abs=1e-4)


def test_span_corruption():
    inputs, targets = span_corruptions([[5, 6, 7, 8, 1], [9, 1]], sentinels=(30, 31), length=6)
    rows = list(zip(inputs.tolist(), targets.tolist(), strict=True))
    assert ([5, 30, 8, 1, 0, 0], [30, 6, 7, 31, 1, 0]) in rows
    assert ([30, 6, 7, 8, 1, 0], [30, 5, 31, 1, 0, 0]) in rows
    assert ([30, 1, 0, 0, 0, 0], [30, 9, 31, 1, 0, 0]) in rows
    assert len(rows) == 4 + 3 + 1


def job_in(folder, texts: list[str]) -> Job:
    run, source = Run.open(folder, {"config": {}}), SimpleNamespace(texts=texts)
    return Job(run, CONFIGS["tiny"], source, torch.device("cpu"), 0)


def test_tokenizers_are_trained_once(tmp_path, monkeypatch):
    """By the main process; a resumed run and the other processes read them."""
    job = job_in(tmp_path, ["a 3", "a bold 7"])
    before = replace(job, group=SimpleNamespace(is_main=False, barrier=lambda: None))
    with pytest.raises(InputError, match="no such file"):  # it does not train any
        train_tokenizers(before)
    trained = train_tokenizers(job)
    content = (tmp_path / "tokenizers.json").read_bytes()
    monkeypatch.setattr(Tokenizers, "train", None)
    other = replace(job, group=SimpleNamespace(is_main=False, barrier=lambda: None))
    for again in (train_tokenizers(job), train_tokenizers(other)):
        assert again.to_json() == trained.to_json() and again.words == {"a", "bold", "3", "7"}
    assert (tmp_path / "tokenizers.json").read_bytes() == content


def test_damaged_tokenizers_say_how_to_go_on(tmp_path):
    job = job_in(tmp_path, ["a"])
    (tmp_path / "tokenizers.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizers.json: .*; delete it to train them again"):
        train_tokenizers(job)
