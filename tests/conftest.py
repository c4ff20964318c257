"""For every test: no model hub, and two torch threads."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.command_line import call  # noqa: F401 - a fixture for all

torch.set_num_threads(1)
