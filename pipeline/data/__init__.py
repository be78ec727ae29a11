"""What is read: benchmarks, COCO folders, label maps, samples and their views."""
