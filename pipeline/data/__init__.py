"""The input data: benchmarks, COCO folders, label maps, samples and their views."""
