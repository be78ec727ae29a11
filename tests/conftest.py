"""One thread a test: two threads on small tensors mostly wait for each other."""

import torch

torch.set_num_threads(1)
