"""Naive training against a plain loop over the recorded batches."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch

from cl.core import Setting
from strategies.naive import Naive


@pytest.mark.parametrize("setting", [Setting.CLASS_INCREMENTAL, Setting.TASK_INCREMENTAL])
def test_naive_is_the_plain_loop(lab, setting):
    recorder, _ = lab.run([Naive()], setting)
    model = deepcopy(recorder.start)
    for step in recorder.steps:
        gradients = lab.gradient(model, lab.label_loss(model, step.batch))
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= lab.lr * gradients[name]
        lab.close(step.after, lab.weights(model))
        assert len(step.batch) == lab.batch_size
