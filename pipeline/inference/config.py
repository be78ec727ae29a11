"""The settings of prediction."""

from __future__ import annotations

# The teacher's exponents of seen and of unseen classes (pipeline/inference/teacher.py). FC-CLIP's, taken over and not tuned.
ALPHA, BETA = 0.4, 0.8
